"""`kiloq web`: the browser opened at a server's page. The server is that of `kiloq serve`."""

import os
import sys
import threading
import urllib.error
import urllib.request
import webbrowser
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

from cyclopts import Parameter

from kiloq.cli.options import ModelOptions
from kiloq.cli.serve import DoorOptions, run
from kiloq.cli.terminal import write
from kiloq.errors import ConfigError

if TYPE_CHECKING:
    from socket import socket

_PORTS = 20  # so many are tried, from the given one on
_TIMEOUT = 10.0  # seconds


def web(
    *,
    url: Annotated[str | None, Parameter(help="Open the page of a server that runs already.")] = None,
    browser: Annotated[bool, Parameter(help="Open a browser; without one, the page's address is only printed.")] = True,
    model: ModelOptions = ModelOptions(),
    door: DoorOptions = DoorOptions(),
) -> int:
    """Serve a model and open its page, whose address goes to stdout. A port that is taken gives way to the next."""
    if url is not None:
        show(_running(url), browser=browser)
        return 0
    listening = _first_free(door.host, door.port)
    return run(model, door, opened=lambda own: show(_page(own), browser=browser), listening=listening)


def show(page: str, *, browser: bool) -> None:
    """Print the page's address, and open it where there is a screen to open it on."""
    write(f"{page}\n")
    if browser and _has_screen():
        # Some browsers keep the command that opened them waiting; the server must not wait.
        threading.Thread(target=webbrowser.open, args=(page,), daemon=True).start()


def _has_screen() -> bool:
    # Without a screen webbrowser would take the terminal for a text browser.
    names = ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY", "WSL_DISTRO_NAME")
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in names)


def _page(url: str) -> str:
    # What a server listens on ("any address") is nothing to go to.
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:") + "/"


def _running(url: str) -> str:
    """The page of a running server, looked at; an error says what is there instead."""
    page = url if "//" in url else f"http://{url}"
    parts = urlsplit(page)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"--url is {url!r}; it must be a server's address, such as http://127.0.0.1:8000.")
    page = f"{parts.scheme}://{parts.netloc}{parts.path.removesuffix('/').removesuffix('/v1')}/"
    try:
        with urllib.request.urlopen(page, timeout=_TIMEOUT) as answer:
            found = b"kiloq" in answer.read(4096)
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ConfigError(f"no page at {page}: {reason}. `kiloq serve` or `kiloq web` starts a server.") from None
    if not found:
        raise ConfigError(f"what answers at {page} is not kiloq. `kiloq web` starts a server.")
    return page


def _first_free(host: str, port: int) -> "socket":
    # Not any free one: browsers keep conversations by host and port, and should find them again.
    from kiloq.serve.server import listen

    for one in range(port, port + _PORTS):
        try:
            return listen(host, one)
        except ConfigError:
            continue
    return listen(host, port)  # which says what is wrong
