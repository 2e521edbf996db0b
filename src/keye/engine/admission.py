"""Which prompts can never be computed, whatever else is given up, and which could after beginning anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from keye.cache.ledger import OutOfMemory
from keye.cache.slabs import KVStore
from keye.engine.prompt import Prompt
from keye.engine.request import Request, Task
from keye.errors import KeyeError, KeyeWarning, Option
from keye.ops.kv_blocks import KV_BLOCK
from keye.units import format_bytes

#: Most probabilities of prompt tokens, and of others beside them, that one request gets.
MAX_PROBS: Final = 100_000


def refusal(prompt: Prompt, request: Request, store: KVStore, scratch: int) -> KeyeError | None:
    """Why `prompt` cannot be computed in `store` beside `scratch` bytes of a step; None where it can."""
    if prompt.past is not None and request.prompt_logprobs is not None:
        return KeyeError("the prompt begins with an index, whose tokens are computed already: leave out "
                         "prompt_logprobs, or give the video itself")  # fmt: skip
    tokens = prompt.token_ids.shape[0] + 1
    if request.prompt_logprobs is not None and (tokens - 1) * (request.prompt_logprobs + 1) > MAX_PROBS:
        return KeyeError(
            f"prompt_logprobs of {tokens - 1:,} tokens, {request.prompt_logprobs} others with each, are more than "
            f"{MAX_PROBS:,} probabilities: ask for fewer others or send a shorter prompt"
        )
    short = store.shortage(tokens - (0 if prompt.past is None else prompt.past.length(0)), scratch)
    if short is None:
        return None
    need, budget, most = short
    return OutOfMemory(
        "the prompt of {} tokens takes {} of keys and values, but the memory budget leaves {}, enough for {} tokens; "
        "sample fewer or smaller frames ({}, {}), store fewer bits ({}), or raise the budget",
        f"{tokens - 1:,}", format_bytes(need), format_bytes(budget), f"{most:,}",
        Option("max_frames"), Option("max_pixels"), Option("kv", "int4"),
    )  # fmt: skip


def clamped(request: Request, length: int, context: int) -> tuple[Request, list[KeyeWarning]]:
    """The request with a reply that fits into what a prompt of `length` tokens leaves of the context, and a note where
    that is less than was asked for; as it was unless it may be clamped."""
    left, params = context - length, request.params
    if not request.clamp or params.max_tokens <= left or left < 1:
        return request, []
    note = f"max_tokens is {params.max_tokens:,}; the context of {context:,} tokens leaves {left:,} for the reply"
    least = min(params.min_tokens, left)
    return replace(request, params=replace(params, max_tokens=left, min_tokens=least)), [KeyeWarning(note)]


def scattered(task: Task) -> bool:
    """Whether the blocks of a task lie in more slabs than they need, among what others have left."""
    held = [cache for cache in (task.cache, *(choice.cache for choice in task.choices)) if cache is not None]
    store = held[0].store if held else None
    return store is not None and store.nbytes() > store.slab_bytes * store.slabs_for(
        KV_BLOCK * sum(cache.blocks for cache in held)
    )
