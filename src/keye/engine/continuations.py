"""One text behind many stored sequences: what the model would say next after each, in passes over many at a time.

This is how a question is put to every window of a video. A request each would cost milliseconds before anything is
computed; here a pass takes as many sequences as a step has tokens. Passes alternate with the steps of requests, and
their memory is reserved in the ledger as that of a step is. Knows token ids and sequences, not what is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keye.cache.ledger import OutOfMemory
from keye.cache.sequence import KVCache
from keye.engine.core import EngineCore
from keye.engine.engine import Engine
from keye.engine.request import Generating
from keye.engine.step import Slice
from keye.models.attention import AttentionMode, GroupScores


@dataclass(frozen=True)
class StoredSequence:
    """What is stored of a prompt's first tokens, and the position of the token after them. `groups` int64 [F, 2] are
    the first and one past the last position of stored tokens that are of interest together, such as those of a
    frame."""

    cache: KVCache
    next_position: int
    groups: Tensor | None = None


@dataclass(frozen=True)
class Continuation:
    """What comes after a text behind sequence `number`: float32 [V] `logits`, and `counts` int64 [layers, positions] of
    how often each stored position was selected while the text was read; None where it was not counted, or every
    position was read. `scores` float32 [tokens of the text, F] are the greatest indexer scores of each group; None
    where they were not wanted, and for dense attention."""

    number: int
    logits: Tensor
    counts: Tensor | None
    scores: Tensor | None = None


def scored_layer(layers: int) -> int:
    """The layer whose indexer scores are reported: of keye-nano's the one that finds frames best, on training films."""
    return layers // 2


def continue_sequences(
    engine: Engine, sequences: Callable[[int, int], Sequence[StoredSequence]], total: int, token_ids: Sequence[int], *,
    attention: AttentionMode, count: bool = False, check: Callable[[], None] | None = None,
) -> Iterator[Continuation]:  # fmt: skip
    """Computes the text behind each of `total` stored sequences, in their order; `sequences` gives those from a first
    to before a last number, and they stay as they are. `count` asks for the selections, and the scores of groups.
    `check` is called before each pass and may raise. `OutOfMemory` where not even one fits beside what else is there;
    damage of a stored file is its `KeyeError`."""
    core, ids, done = engine.core, torch.tensor(list(token_ids)), 0
    while done < total:
        if check is not None:
            check()
        most = _count_sequences(core, len(ids))
        try:
            with core.exclusive():
                items = _compute(core, sequences(done, min(done + most, total)), ids, attention, count, done)
        except OutOfMemory:
            if core.is_idle():
                raise
            items = []
        done += len(items)
        yield from items
        if not core.is_idle() and not core.step():  # others go on in between
            core.wait_for_work()


def _count_sequences(core: EngineCore, tokens: int) -> int:
    """How many sequences a pass takes: as many as prompts may have tokens in a step, at least one."""
    replies = sum(len(task.state.branches) for task in core.tasks if isinstance(task.state, Generating))
    return max(1, core.scheduler.timer.token_budget(replies) // tokens)


def _compute(
    core: EngineCore,
    sequences: Sequence[StoredSequence],
    ids: Tensor,
    attention: AttentionMode,
    count: bool,
    first: int,
) -> list[Continuation]:
    """One pass; over fewer sequences where memory is short, at least one."""
    scratch, forks = core.scheduler.scratch, list[KVCache]()
    try:
        slices = list[Slice]()
        for item in sequences:
            try:
                forks.append(item.cache.fork())
                forks[-1].reserve(forks[-1].length(0) + len(ids))
            except OutOfMemory:
                if not slices:
                    raise
                break
            slices.append(_slice(core, forks[-1], item, ids, attention, count))
        fitting = scratch.count_fitting(slices)
        slices = slices[: max(fitting, 1)]
        scratch.reserve(slices)
        logits = core.run_slices(core.runtime.model, slices)
    finally:
        scratch.release(least=not core.is_idle())
        for fork in forks:
            fork.free()
    for fork in forks[: len(slices)]:
        if fork.damage is not None:
            raise fork.damage
    return [
        Continuation(first + i, row[-1].float(), piece.counts, None if piece.scored is None else piece.scored.scores)
        for i, (row, piece) in enumerate(zip(logits, slices, strict=True)) if row is not None
    ]  # fmt: skip


def _slice(
    core: EngineCore, cache: KVCache, item: StoredSequence, ids: Tensor, attention: AttentionMode, count: bool
) -> Slice:
    config = core.runtime.config.text
    length, counts, scored = cache.length(0) + len(ids), None, None
    if count and config.sparse is not None and attention == "sparse":
        if length > config.sparse.topk:
            counts = torch.zeros(config.num_hidden_layers, length, dtype=torch.int64)
        if item.groups is not None:
            scored = GroupScores(scored_layer(config.num_hidden_layers), item.groups)
    positions = torch.arange(item.next_position, item.next_position + len(ids)).expand(3, len(ids))
    return Slice(cache, ids, positions, None, "last", attention, counts, scored=scored)
