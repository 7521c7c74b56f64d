"""Real servers on free loopback ports, one process for each model and set of flags, shared by all tests of a run."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kiloq.checkpoint import bundled, convert_checkpoint, open_checkpoint

# The words by which kiloq knows the formats of 2.5 and 3.
TEMPLATES = {
    "qwen2.5": "<|im_start|>system\nYou are a helpful assistant.<|im_end|><tools></tools>{% add_generation_prompt %}",
    "qwen3": "<|im_start|><tools></tools>{% add_generation_prompt %}{% enable_thinking %}",
}


@dataclass(frozen=True)
class Server:
    """A running `kiloq serve`."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def openai(self) -> str:
        return f"{self.url}/v1"


StartServer = Callable[..., Server]


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundled model as a checkpoint of a generation: "qwen1", "qwen2.5" or "qwen3", in prompts and calls."""
    folders: dict[str, Path] = {"qwen1": bundled()}

    def folder(generation: str) -> Path:
        if generation not in folders:
            out = tmp_path_factory.mktemp("served") / generation
            convert_checkpoint(open_checkpoint(bundled()), out, family="qwen2")
            (out / "chat_template.jinja").write_text(TEMPLATES[generation])
            folders[generation] = out
        return folders[generation]

    return folder


@pytest.fixture(scope="session")
def start_server(model_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """start_server("qwen1", "--max-queue", "4"): the same arguments give the same server."""
    running: dict[tuple[str, ...], Server] = {}

    def start(generation: str = "qwen1", *flags: str) -> Server:
        key = (generation, *flags)
        if key not in running or running[key].process.poll() is not None:
            log = tmp_path_factory.mktemp("log") / "server.log"
            running[key] = _start(model_of(generation), flags, log)
        return running[key]

    yield start
    for server in running.values():
        server.process.terminate()
    for server in running.values():
        server.process.wait(30)


@pytest.fixture(scope="session")
def server(start_server: StartServer) -> Server:
    """The bundled v1 model without flags."""
    return start_server()


def _start(model: Path, flags: tuple[str, ...], log: Path) -> Server:
    command = [sys.executable, "-m", "kiloq", "serve", "-m", str(model), "--port", "0", *flags]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text().splitlines():
            if " on http://" in line:
                url = "http://" + line.split(" on http://")[1].split()[0].rstrip(",")  # more may follow
                if _answers(url):
                    return Server(url, process, log)
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"the server did not come up:\n{log.read_text()}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=5):
            return True
    except urllib.error.HTTPError:
        return True  # it wants a key
    except OSError:
        return False
