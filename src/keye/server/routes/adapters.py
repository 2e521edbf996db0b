"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse

from keye.errors import KeyeError
from keye.server.context import Context, context_of
from keye.server.edge.errors import ApiError
from keye.server.openai.http import JsonRoute
from keye.server.openai.schemas import LoadAdapterRequest, UnloadAdapterRequest

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load(request: Request, body: LoadAdapterRequest) -> PlainTextResponse:
    """Loads a LoRA adapter from a folder of the server; requests choose it by its name in `model`."""
    context = context_of(request)
    path = _inside(_folder(context), body.lora_path)
    check_adapter_name(context.names, context.model.name, body.lora_name)
    load = context.model.engine.load_adapter
    await context.in_thread(lambda: load(path, body.lora_name, replace=body.load_inplace))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload(request: Request, body: UnloadAdapterRequest) -> PlainTextResponse:
    """Forgets an adapter; requests that use it go on with it."""
    context = context_of(request)
    _folder(context)
    if body.lora_name not in context.model.adapters:
        sentence = f"no adapter {body.lora_name!r} is loaded"
        raise ApiError(404, sentence, param="lora_name", code="not_found")
    context.model.unload_adapter(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def check_adapter_name(names: tuple[str, ...], model: str, adapter: str) -> None:
    """`KeyeError` for the name of the model itself."""
    if adapter in (*names, model):
        raise KeyeError(f"{adapter!r} is the name of the model itself: choose another name for the adapter")


def _folder(context: Context) -> Path:
    folder = context.settings.adapter_folder
    if folder is None:
        raise ApiError(403, "clients may load adapters only where the server was started with --adapter-folder",
                       code="not_allowed")  # fmt: skip
    return folder.expanduser().resolve()


def _inside(folder: Path, named: str) -> Path:
    """A path that a client names, relative to the folder of adapters or absolute; `ApiError` for one outside."""
    try:
        path = (folder / named).resolve()
        is_inside = path.is_relative_to(folder) and path.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        is_inside = False
    if not is_inside:
        raise ApiError(400, f"lora_path: {named[:200]!r} is not a folder of adapters on this server", param="lora_path")
    return path
