"""Which frames dense attention weighs most while a question is read: a baseline of `benchmarks/find.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keye.engine.continuations import continue_sequences
from keye.engine.engine import Engine
from keye.engine.evidence import counted_layers
from keye.ops import registry
from keye.ops.backend import Stretch
from keye.sessions.search.scoring import encode_question
from keye.sessions.search.search_index import SearchIndex


def dense_shares(engine: Engine, index: SearchIndex, question: str) -> dict[int, NDArray[np.float32]]:
    """Of each window the share of its frames among the k keys that each head of each query weighs most, as many as the
    indexer selects, in the layers whose selections are evidence; all together 1."""
    numbers, ids = [window.number for window in index.windows], encode_question(engine.runtime, question)
    sparse = engine.runtime.config.text.sparse
    assert sparse is not None, "the model has an indexer"
    layers = engine.runtime.config.text.num_hidden_layers
    with _read_weights(sparse.topk, layers) as counts:
        sequences = continue_sequences(
            engine, lambda start, stop: [index.sequence(n) for n in numbers[start:stop]], len(numbers), ids,
            attention="dense",
        )  # fmt: skip
        done = sum(1 for _ in sequences)
    assert done == len(numbers) == len(counts)
    shares: dict[int, NDArray[np.float32]] = {}
    for number, row in zip(numbers, counts, strict=True):
        sums = np.concatenate([[0], row.numpy().cumsum()])
        spans = index.frame_spans(number)
        hits = sums[spans[:, 1]] - sums[spans[:, 0]]
        shares[number] = (hits / max(1, hits.sum())).astype(np.float32)
    return shares


@contextmanager
def _read_weights(topk: int, layers: int) -> Iterator[list[Tensor]]:
    """Replaces dense attention by one that also counts, for each sequence in order, the `topk` keys of the largest
    weights; the list has int64 [positions] of each."""
    counts: list[Tensor] = []
    attend, calls = registry.dense_attention, [0]
    first = counted_layers(layers).start

    def watch(q: Tensor, stretches: Sequence[Stretch], out: Tensor) -> None:
        attend(q, stretches, out)
        layer = calls[0] % layers
        calls[0] += 1
        if layer == 0:
            counts.extend(torch.zeros(stretch.length, dtype=torch.int64) for stretch in stretches)
        if layer >= first:
            for total, stretch in zip(counts[-len(stretches) :], stretches, strict=True):
                _count_heaviest(q, stretch, topk, total)

    registry.dense_attention = watch
    try:
        yield counts
    finally:
        registry.dense_attention = attend


def _count_heaviest(q: Tensor, stretch: Stretch, topk: int, counts: Tensor) -> None:
    keys = stretch.rows(torch.arange(stretch.length))[0].float()  # [N, G, D]
    queries = q[stretch.start : stretch.stop].float()  # [T, H, D]
    groups = queries.unflatten(1, (keys.shape[1], -1))  # [T, G, H / G, D]
    scores = torch.einsum("tghd,ngd->tghn", groups, keys)
    places = stretch.first + torch.arange(stretch.stop - stretch.start)
    scores.masked_fill_((torch.arange(stretch.length) > places[:, None])[:, None, None], -torch.inf)
    chosen = scores.topk(min(topk, stretch.length), dim=-1).indices.flatten()
    counts += torch.bincount(chosen, minlength=stretch.length)
