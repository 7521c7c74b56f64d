"""`kiloq serve`: a model behind HTTP. The work is done in kiloq.serve."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from kiloq.cli.options import ModelOptions
from kiloq.cli.terminal import say
from kiloq.errors import ConfigError

if TYPE_CHECKING:
    from socket import socket

    from kiloq.serve.bridge import BridgeConfig
    from kiloq.serve.service import ServeConfig


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DoorOptions:
    """Where the server listens, who may ask, and how much."""

    host: Annotated[str, Parameter(help="Address to listen on; 0.0.0.0 or :: is every one of this machine.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Parameter(help="Port to listen on; 0 takes a free one.")] = 8000
    api_key: Annotated[
        tuple[str, ...],
        Parameter(
            negative="",
            help="A key that requests must bring; may be given again. Others on this machine see it in the list of "
            "processes: a file or the variable KILOQ_API_KEY (commas between several) keep it private.",
        ),
    ] = ()
    api_key_file: Annotated[Path | None, Parameter(help="A file of keys, one a line.")] = None
    allow_host: Annotated[
        tuple[str, ...],
        Parameter(
            negative="",
            help="Without a key a server on loopback answers only to this machine's names; this one too, or * for any.",
        ),
    ] = ()
    cors_origin: Annotated[
        tuple[str, ...],
        Parameter(negative="", help="Pages of this origin may ask, such as https://chat.example.com; may be repeated."),
    ] = ()
    served_model_name: Annotated[
        tuple[str, ...],
        Parameter(negative="", help="What clients call the model; may be repeated. Default: the model's own name."),
    ] = ()
    lora: Annotated[
        tuple[str, ...], Parameter(negative="", help="NAME=DIR: a LoRA adapter that requests choose as a model.")
    ] = ()
    max_queue: Annotated[int, Parameter(help="Requests that may wait besides those that run.")] = 256
    max_batch: Annotated[int, Parameter(help="Answers that are made at once.")] = 32
    request_timeout: Annotated[
        float | None, Parameter(help="Seconds from a request's arrival to its last token; default: none.")
    ] = None
    max_body: Annotated[float, Parameter(help="The longest request, in MB.")] = 4.0
    drain_timeout: Annotated[float, Parameter(help="Seconds for running answers when the server is stopped.")] = 30.0
    seed: Annotated[int, Parameter(help="Answers without a seed of their own begin from this one.")] = 0
    log_format: Annotated[Literal["text", "json"], Parameter(help="One line for each request, on stderr.")] = "text"
    quiet: Annotated[bool, Parameter(negative="", help="No line for each request.")] = False

    def config(self, model: str) -> "ServeConfig":
        from kiloq.serve.auth import gathered_keys
        from kiloq.serve.service import ServeConfig

        if not 0 < self.max_body < 1e6:
            raise ConfigError(f"--max-body is {self.max_body:g} MB; it must be more than 0 and below 1,000,000.")
        return ServeConfig(
            host=self.host,
            port=self.port,
            names=self.served_model_name or (model,),
            adapters=tuple(_named_folder(one) for one in self.lora),
            api_keys=gathered_keys(self.api_key, self.api_key_file, os.environ),
            allowed_hosts=self.allow_host,
            max_body=int(self.max_body * 1e6),
            cors_origins=self.cors_origin,
            drain_seconds=self.drain_timeout,
            log_format="none" if self.quiet else self.log_format,
        )

    def bridge(self) -> "BridgeConfig":
        from kiloq.serve.bridge import BridgeConfig

        if self.max_queue < 0:
            raise ConfigError(f"--max-queue is {self.max_queue:,}; it must be 0 or more.")
        if self.max_batch < 1:
            raise ConfigError(f"--max-batch is {self.max_batch:,}; it must be at least 1.")
        if self.request_timeout is not None and not self.request_timeout > 0:
            raise ConfigError(f"--request-timeout is {self.request_timeout:g}; it must be more than 0 seconds.")
        return BridgeConfig(max_queue=self.max_queue, request_timeout=self.request_timeout)


def serve(
    *,
    model: ModelOptions = ModelOptions(),
    door: DoorOptions = DoorOptions(),
) -> int:
    """Serve a model to OpenAI and DashScope clients, and a web page, on one port."""
    return run(model, door, opened=lambda _: None)


def run(
    model: ModelOptions, door: DoorOptions, *, opened: Callable[[str], None], listening: "socket | None" = None
) -> int:
    """Serve until it is stopped; `opened` is told the URL once it answers. Gives the exit code."""
    from kiloq.serve.auth import readable_by_others
    from kiloq.serve.limits import is_loopback
    from kiloq.serve.server import listen, serve

    config, bridge = door.config(_name_of(model.model)), door.bridge()
    # A port that is taken is told before a large model is loaded.
    listening = listening or listen(config.host, config.port)
    if not config.api_keys and not is_loopback(config.host):
        say(f"warning: {config.host} is open to others, and there is no API key: whoever reaches it may use the model.")
    if door.api_key_file is not None and readable_by_others(door.api_key_file):
        say(f"warning: {door.api_key_file} can be read by other users; chmod 600 keeps its keys private.")
    llm = model.load(max_batch=door.max_batch, short_steps=True, adapters=dict(config.adapters), seed=door.seed)

    def ready(url: str) -> None:
        say(f"serving {', '.join((*config.names, *dict(config.adapters)))} on {url}")
        say(f"OpenAI base URL {url}/v1, DashScope {url}/api/v1, page {url}/, docs {url}/docs; Ctrl-C ends it.")
        opened(url)

    cut_by = serve(llm, config, bridge, ready=ready, listening=listening)
    return 0 if cut_by is None else 128 + cut_by


def _name_of(model: str | None) -> str:
    return Path(model).name if model else "kiloq-mini-chat"


def _named_folder(given: str) -> tuple[str, Path]:
    name, equals, folder = given.partition("=")
    if not (name and equals and folder):
        raise ConfigError(f"--lora is {given!r}; it must be NAME=DIR, such as style=adapters/style.")
    return name, Path(folder)
