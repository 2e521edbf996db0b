"""Bodies of JSON, parsed straight from their bytes: of a body of many megabytes, media above all, nothing is held twice
for longer than that takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, Final

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

#: What FastAPI is told that a parsed body is: it asks only whether there is any.
_PARSED: Final = b"{}"


class JsonRequest(Request):
    """A request whose JSON is parsed when its body is asked for, and whose bytes are then let go."""

    async def body(self) -> bytes:
        if not self.headers.get("content-type", "").startswith("application/json"):
            return await super().body()
        if not hasattr(self, "_json"):
            data = await super().body()
            self._body = _PARSED if data else b""
            self._json = _parsed(data) if data else None
        return self._body

    async def json(self) -> Any:
        await self.body()
        return self._json


class JsonRoute(APIRoute):
    """The route class of all routers here."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_lean(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_lean


def _parsed(data: bytes) -> Any:
    try:
        return from_json(data, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise json.JSONDecodeError(str(error), "", 0) from None
