"""Several continuations of one prefix, decoded together: many questions about a video that is read once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from keye.cache.sequence import KVCache
from keye.engine.sampling import check_logits
from keye.models.attention import AttentionMode, CachedStep, Selection, Span
from keye.models.keye import KeyeModel


@dataclass
class _Branch:
    """One continuation: its cache, the tokens not computed yet, the position of the first of them, its reply."""

    cache: KVCache
    pending: list[int]
    position: int
    reply: list[int] = field(default_factory=list)


@torch.inference_mode()
def greedy_branches(
    model: KeyeModel,
    trunk: KVCache,
    position: int,
    branches: Sequence[Sequence[int]],
    *,
    stop_ids: Collection[int],
    max_tokens: int,
    mode: AttentionMode = "sparse",
    select: Selection = "indexer",
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """The greedy reply to each of `branches`, which all continue the sequence in `trunk`.

    `branches` are token ids of text, at least one each; the first of each sits at `position` (text counts up by one on
    all axes). `trunk` stays as it is. Every step computes the unfinished branches as one ragged batch: first all their
    tokens, then one token each. A reply ends before a token of `stop_ids`, or after `max_tokens`. `generator` feeds
    `select="random"`. `KeyeError` when the model computes NaN.
    """
    assert all(branches), "a branch needs at least one token"
    started = [_Branch(trunk.fork(), list(tokens), position) for tokens in branches]
    live = started
    for _ in range(max_tokens):
        if not live:
            break
        spans = _spans(live)
        step = CachedStep(spans, model.config.text, mode=mode, select=select, generator=generator)
        logits = _logits(model, live, step)
        check_logits(logits)
        chosen = logits.argmax(-1).tolist()
        for branch, token in zip(live, chosen, strict=True):
            branch.position += len(branch.pending)
            branch.pending = [] if token in stop_ids else [token]
            branch.reply += branch.pending
        live = [branch for branch in live if branch.pending]
    return [branch.reply for branch in started]


def _spans(branches: Sequence[_Branch]) -> list[Span]:
    spans, start = [], 0
    for branch in branches:
        spans.append(Span(start, start + len(branch.pending), branch.cache))
        start = spans[-1].stop
    return spans


def _logits(model: KeyeModel, branches: Sequence[_Branch], step: CachedStep) -> Tensor:
    """Logits after the last pending token of each branch, float32 [branches, V]."""
    tokens = [token for branch in branches for token in branch.pending]
    places = [branch.position + offset for branch in branches for offset in range(len(branch.pending))]
    x = model.embed(torch.tensor(tokens, device=model.device))
    positions = torch.tensor(places, device=model.device).expand(3, -1)
    hidden = model(x, positions, step)
    return model.logits(hidden[[span.stop - 1 for span in step.spans]])
