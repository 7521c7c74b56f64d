"""Runs the application on a port until it is told to stop. Knows uvicorn."""

import time

import uvicorn

from kiloq.engine import LLM

from .app import create_app
from .bridge import BridgeConfig, EngineThread
from .service import ServeConfig, Service


def serve(llm: LLM, config: ServeConfig, bridge: BridgeConfig | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that run may end first."""
    service = Service(llm=llm, engine=EngineThread(llm, bridge), config=config, created=int(time.time()))
    uvicorn.run(create_app(service), host=config.host, port=config.port, log_level="warning", access_log=False)
