"""The page: static files of the package, read once at start-up, and the sample clip. The guard adds the headers."""

from __future__ import annotations

import hashlib
import mimetypes
from pathlib import Path
from typing import Final

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response

from keye.server.edge.errors import ApiError
from keye.version import PACKAGE_FOLDER

_FOLDER: Final = Path(__file__).parent / "static"
_SCRIPTS: Final = {".js": "text/javascript", ".mjs": "text/javascript"}
_SAMPLE: Final = PACKAGE_FOLDER / "assets" / "demo.mp4"


def install(app: FastAPI) -> None:
    """Adds `/` and `/static/...`. Only files that were there at start-up are served, by their exact names."""
    pages: dict[str, tuple[bytes, str, str]] = {}
    for path in sorted(_FOLDER.rglob("*")):
        if path.is_file():
            body = path.read_bytes()
            kind = _SCRIPTS.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            pages[str(path.relative_to(_FOLDER))] = body, kind, f'"{hashlib.sha256(body).hexdigest()[:32]}"'

    def answer(request: Request, name: str) -> Response:
        if name not in pages:
            raise ApiError(404, "there is no such file")
        body, kind, tag = pages[name]
        headers = {"ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=kind, headers=headers)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(request: Request) -> Response:
        return answer(request, "index.html")

    @app.api_route("/static/sample.mp4", methods=["GET", "HEAD"], include_in_schema=False)
    async def sample(request: Request) -> Response:
        return FileResponse(_SAMPLE, media_type="video/mp4")

    @app.api_route("/static/{name:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def static(request: Request, name: str) -> Response:
        return answer(request, name)
