"""Which prompts can never be computed, whatever else is given up, and which could after beginning anew."""

from __future__ import annotations

from keye.engine.kvstore import KVStore
from keye.engine.ledger import OutOfMemory, megabytes
from keye.engine.prompt import Prompt
from keye.engine.request import Request, Task
from keye.errors import KeyeError, Option
from keye.ops.pages import PAGE


def refusal(prompt: Prompt, request: Request, store: KVStore, scratch: int) -> KeyeError | None:
    """Why `prompt` cannot be computed in `store` beside `scratch` bytes of a step; None where it can."""
    if prompt.past is not None and request.prompt_logprobs:
        return KeyeError("the prompt begins with an index, whose tokens are computed already: leave out "
                         "prompt_logprobs, or give the video itself")  # fmt: skip
    tokens = prompt.token_ids.shape[0] + 1
    short = store.shortage(tokens - (0 if prompt.past is None else prompt.past.length(0)), scratch)
    if short is None:
        return None
    need, budget, most = short
    return OutOfMemory(
        "the prompt of {} tokens takes {} of keys and values, but the memory budget leaves {}, enough for {} tokens; "
        "sample fewer or smaller frames ({}, {}), store fewer bits ({}), or raise the budget",
        f"{tokens - 1:,}", megabytes(need), megabytes(budget), f"{most:,}",
        Option("max_frames"), Option("max_pixels"), Option("kv", "int4"),
    )  # fmt: skip


def scattered(task: Task) -> bool:
    """Whether the blocks of a task lie in more slabs than they need, among what others have left."""
    held = [cache for cache in (task.cache, *(choice.cache for choice in task.choices)) if cache is not None]
    store = held[0].store if held else None
    return store is not None and store.nbytes() > store.slab_bytes * store.slabs_for(
        PAGE * sum(cache.blocks for cache in held)
    )
