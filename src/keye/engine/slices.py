"""What a step computes of one request: which tokens of its prompt can be computed, and the slices for a pass."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from keye.engine.request import Choice, Request, Task
from keye.engine.step import Slice, Wanted

#: Prompt tokens at once where logits of all of them are wanted, and in deterministic requests.
PROBED_TOKENS: Final = 128
FIXED_TOKENS: Final = 256


def computable(task: Task) -> int:
    """Tokens of a prompt that can be computed now: those before the first visual token that is not ready."""
    assert task.vision is not None and task.visual is not None
    stop, request = task.length, task.request
    if request.evidence and task.done < stop - 1:
        stop -= 1  # the last token goes alone: it produces the first of the reply
    if request.prompt_logprobs is not None:
        stop = min(stop, task.done + PROBED_TOKENS)
    if request.deterministic:
        stop = min(stop, task.done + FIXED_TOKENS)
    ready = stop
    if not task.vision.done:
        ready = min(stop, int(torch.searchsorted(task.visual, task.vision.ready, right=True)))
    if request.deterministic and ready < stop:
        return 0  # its slices are always cut at the same places
    return max(0, ready - task.done)


def prompt_slice(task: Task, stop: int, counts: Tensor | None) -> Slice:
    """The next tokens of a prompt, up to `stop`; there is room for them."""
    prompt, cache = task.prompt, task.cache
    assert prompt is not None and cache is not None and task.vision is not None and task.visual is not None
    before = int(task.visual[task.done - 1]) if task.done else 0
    after = int(task.visual[stop - 1])
    wanted: Wanted = "all" if task.request.prompt_logprobs is not None else "last" if stop == task.length else "none"
    return Slice(
        cache, prompt.token_ids[task.done : stop], prompt.position_ids[:, task.done : stop],
        task.vision.tokens(before, after) if after > before else None,
        wanted, task.request.attention, counts, task.request.deterministic,
    )  # fmt: skip


def reply_slice(task: Task, choice: Choice, counts: Tensor | None) -> Slice:
    """The next pending token of a choice; there is room for it."""
    assert choice.cache is not None
    place = torch.full((3, 1), choice.position)
    return Slice(
        choice.cache, torch.tensor(choice.pending[:1]), place, None, "last",
        task.request.attention, counts, task.request.deterministic,
    )  # fmt: skip


def least_rows(request: Request) -> tuple[int, int]:
    """Tokens that a request computes at once at least, and those of them whose logits it needs."""
    if not request.deterministic:
        return 1, 1
    return (PROBED_TOKENS, PROBED_TOKENS) if request.prompt_logprobs is not None else (FIXED_TOKENS, 1)
