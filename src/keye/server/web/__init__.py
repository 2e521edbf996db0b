"""The page: static files of the package, read once at start-up, and the sample clip. The guard adds the headers."""

from __future__ import annotations

import hashlib
import mimetypes
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response

from keye.server.edge.errors import ApiError
from keye.version import PACKAGE_FOLDER

_FOLDER: Final = Path(__file__).parent / "static"
_SAMPLE: Final = PACKAGE_FOLDER / "assets" / "demo.mp4"


@dataclass(frozen=True)
class _Page:
    body: bytes
    kind: str
    tag: str


def install(app: FastAPI) -> None:
    """Adds `/` and `/static/...`. Only files that were there at start-up are served, by their exact names."""
    pages = {str(path.relative_to(_FOLDER)): _read(path) for path in sorted(_FOLDER.rglob("*")) if path.is_file()}

    def answer(request: Request, name: str) -> Response:
        page = pages.get(name)
        if page is None:
            raise ApiError(404, "there is no such file")
        headers = {"ETag": page.tag}
        if request.headers.get("if-none-match") == page.tag:
            return Response(status_code=304, headers=headers)
        return Response(page.body, media_type=page.kind, headers=headers)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(request: Request) -> Response:
        return answer(request, "index.html")

    @app.api_route("/static/sample.mp4", methods=["GET", "HEAD"], include_in_schema=False)
    async def sample(request: Request) -> Response:
        return FileResponse(_SAMPLE, media_type="video/mp4")

    @app.api_route("/static/{name:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def static(request: Request, name: str) -> Response:
        return answer(request, name)


def _read(path: Path) -> _Page:
    body = path.read_bytes()
    kind = {".js": "text/javascript", ".mjs": "text/javascript"}.get(path.suffix) or mimetypes.guess_type(path.name)[0]
    return _Page(body, kind or "application/octet-stream", f'"{hashlib.sha256(body).hexdigest()[:32]}"')
