"""/health and /metrics: whether this server can answer now, and what it did. Knows the engine's thread, no model."""

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from .errors import ApiError, Problem
from .metrics import CONTENT_TYPE
from .service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["Operations"])

    @router.get("/health")
    @router.head("/health", include_in_schema=False)  # what many probes ask with
    @router.get("/ping", include_in_schema=False)
    async def health() -> dict[str, str]:
        """200 when requests are answered; 503 while the server shuts down, or when the engine has failed."""
        if service.engine.is_draining or not service.engine.healthy:
            message = "The server is shutting down, or its engine has failed; send nothing more here."
            raise ApiError(Problem(status=503, message=message, type="server_error", code="unavailable", retry_after=5))
        return {"status": "ok"}

    @router.get("/health/live")
    async def live() -> dict[str, str]:
        """200 as long as the process answers at all."""
        return {"status": "ok"}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Queue, tokens, latencies, cache and requests, in the text format of Prometheus."""
        return Response(service.engine.metrics.render(), media_type=CONTENT_TYPE)

    return router
