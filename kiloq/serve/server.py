"""Runs the application on a port until it is told to stop. Knows uvicorn and sockets."""

import socket
import time
from collections.abc import Callable

import uvicorn

from kiloq.engine import LLM

from .app import create_app
from .bridge import BridgeConfig, EngineThread
from .service import ServeConfig, Service


def serve(llm: LLM, config: ServeConfig, bridge: BridgeConfig | None = None, *, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that run may end first. `ready` is told the URL once the port is open."""
    service = Service(llm=llm, engine=EngineThread(llm, bridge), config=config, created=int(time.time()))
    listening = socket.create_server((config.host, config.port))
    host, port = listening.getsockname()[:2]
    ready(f"http://{host}:{port}")
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning", access_log=False))
    server.run(sockets=[listening])
