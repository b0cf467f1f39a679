"""The chat page at `/`: a few static files, served beside the API by the same application.

In: the application. Out: the same with `GET /` and `GET /page/{name}`. The page needs nothing from another host, and
its headers hold it to that: no inline scripts or styles, no frames, no markup made from strings (Trusted Types), so
that neither a model nor a document can put code into a user's browser. Files are read once; browsers revalidate them
by ETag. Not covered: API keys (the page itself holds no data; the API asks for them), compression.
"""

from __future__ import annotations

import hashlib
import mimetypes
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

HOME = "index.html"
HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
# By name: a machine's own MIME table may call JavaScript text/plain, and browsers then refuse the module.
_TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class _PageFile:
    content: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> _PageFile:
        content = path.read_bytes()
        media_type = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return cls(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')

    def response(self, request: Request) -> Response:
        headers = {**HEADERS, "ETag": self.etag}
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if self.etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


def mount_page(api: FastAPI) -> None:
    """Adds the chat page at `/` and its files under `/page/`; they are not part of the API's schema."""
    folder = Path(__file__).parent / "page"
    files = {path.name: _PageFile.read(path) for path in sorted(folder.iterdir()) if path.suffix in _TYPES}
    assert HOME in files, f"the package lacks {HOME}"

    async def home(request: Request) -> Response:
        return files[HOME].response(request)

    async def part(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "there is no such file")
        return files[name].response(request)

    api.add_api_route("/", home, methods=["GET", "HEAD"], include_in_schema=False)
    api.add_api_route("/page/{name}", part, methods=["GET", "HEAD"], include_in_schema=False)
