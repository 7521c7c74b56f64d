"""The web page at `/`: static files, what a browser may do with them, and how long it keeps them. Knows no model."""

import gzip
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fastapi import APIRouter, Request, Response

from .errors import Problem, error_response
from .service import Service

WEB = Path(__file__).parent / "web"

# What the page may do: load its own files, call its own server, nothing else. No inline script or style, no frame, no
# form, no picture from elsewhere; markup made from text must have passed DOMPurify (Trusted Types).
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "font-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",  # for browsers older than frame-ancestors
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}
# Not mimetypes: what a system's tables say of .js and .mjs differs, and browsers refuse modules of another type.
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
_COMPRESSED = (".css", ".html", ".js", ".mjs", ".svg")
_FOREVER = "public, max-age=31536000, immutable"


@dataclass(frozen=True)
class Asset:
    """A file of the page; compressed once, when it is first asked for."""

    suffix: str
    body: bytes

    @cached_property
    def gzipped(self) -> bytes | None:
        return gzip.compress(self.body, mtime=0) if self.suffix in _COMPRESSED else None

    @cached_property
    def etag(self) -> str:
        return f'W/"{hashlib.sha256(self.body).hexdigest()[:20]}"'


def load_assets(folder: Path) -> tuple[str, dict[str, Asset]]:
    """The files by their paths in the folder, and a digest of all of them; licences and lists are not served."""
    assets: dict[str, Asset] = {}
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in MEDIA_TYPES:
            name = path.relative_to(folder).as_posix()
            assets[name] = Asset(path.suffix, path.read_bytes())
            digest.update(f"{name}\n".encode() + assets[name].body)
    return digest.hexdigest()[:12], assets


def routes(service: Service) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    digest, assets = load_assets(WEB)
    # The files' addresses change when any of them does, so that a browser may keep them for good.
    page = Asset(".html", assets["index.html"].body.replace(b'"web/', f'"web/{digest}/'.encode()))

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        """The page itself: asked for again at each visit, sent only if it has changed."""
        return _answer(request, page, "no-cache")

    @router.api_route("/web/{version}/{path:path}", methods=["GET", "HEAD"])
    async def file(request: Request, version: str, path: str) -> Response:
        """A file of the page."""
        asset = assets.get(path)
        if asset is None:
            problem = Problem(status=404, message=f"The page has no file {path!r}.", code="not_found")
            return error_response(problem, request.scope, HEADERS)
        return _answer(request, asset, _FOREVER if version == digest else "no-cache")

    return router


def _answer(request: Request, asset: Asset, keep: str) -> Response:
    headers = HEADERS | {"Cache-Control": keep, "ETag": asset.etag, "Vary": "Accept-Encoding"}
    if asset.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    body = asset.body
    if asset.gzipped is not None and "gzip" in request.headers.get("accept-encoding", ""):
        body, headers["Content-Encoding"] = asset.gzipped, "gzip"
    return Response(body, headers=headers, media_type=MEDIA_TYPES[asset.suffix])
