"""`kiloq serve`: a model behind HTTP. The work is done in kiloq.serve."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from kiloq.cli.options import ModelOptions
from kiloq.cli.terminal import say


def serve(
    *,
    model: ModelOptions = ModelOptions(),  # noqa: B008  # frozen
    host: Annotated[str, Parameter(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="Port to listen on; 0 takes a free one.")] = 8000,
) -> None:
    """Serve a model to OpenAI and DashScope clients, and a web page, on one port."""
    from kiloq.serve.server import serve
    from kiloq.serve.service import ServeConfig

    llm = model.load(max_batch=32)
    name = Path(model.model).name if model.model else "kiloq-mini-chat"
    config = ServeConfig(host=host, port=port, names=(name,))
    serve(llm, config, ready=lambda url: say(f"serving {name} on {url}"))
