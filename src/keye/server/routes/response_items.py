"""GET and DELETE of responses that were stored, and their items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from keye.server.context import context_of, owner_of
from keye.server.edge.errors import ApiError
from keye.server.edge.ids import new_id
from keye.server.routes.json_route import JsonRoute

router = APIRouter(route_class=JsonRoute)


@router.get("/v1/responses/{response_id}")
async def get_response(request: Request, response_id: str) -> JSONResponse:
    """A response as it was returned."""
    context = context_of(request)
    kept = await context.in_thread(context.responses.get, owner_of(request), response_id)
    return JSONResponse(kept.response)


@router.delete("/v1/responses/{response_id}")
async def delete_response(request: Request, response_id: str) -> JSONResponse:
    """Forgets a response; those that follow it cannot be continued any more."""
    context = context_of(request)
    await context.in_thread(context.responses.delete, owner_of(request), response_id)
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


@router.get("/v1/responses/{response_id}/input_items")
async def input_items(
    request: Request,
    response_id: str,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: Annotated[str | None, Query(max_length=256)] = None,
) -> JSONResponse:
    """What a response answers, from `after` on, at most `limit` of its items."""
    context = context_of(request)
    kept = await context.in_thread(context.responses.get, owner_of(request), response_id)
    items = list(kept.items) if order == "asc" else list(reversed(kept.items))
    if after is not None:
        at = next((index for index, item in enumerate(items) if item["id"] == after), None)
        if at is None:
            raise ApiError(404, "after: the response has no item of this id", param="after", code="not_found")
        items = items[at + 1 :]
    page = items[:limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return JSONResponse({"object": "list", "data": page, **ends, "has_more": len(items) > limit})


def items_with_ids(given: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The input of a request as items, each with an id, as they are kept."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    items = []
    for item in given:
        kind = item.get("type") or "message"
        prefix = {"message": "msg_", "function_call": "fc_", "reasoning": "rs_"}.get(str(kind), "item_")
        kept = {"type": kind, **item}
        if not isinstance(kept.get("id"), str):
            kept["id"] = new_id(prefix)
        if kind == "message" and isinstance(kept.get("content"), str):
            part = "output_text" if kept.get("role") == "assistant" else "input_text"
            kept["content"] = [{"type": part, "text": kept["content"]}]
        items.append(kept)
    return items
