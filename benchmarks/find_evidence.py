"""What attention says of frames while a question is read, without the model's answer: for `benchmarks/find.py`.

Two baselines that the package does not need: the keys that dense attention weighs most, and the scores by which the
indexer of one layer chooses keys, before it chooses. Both watch the kernels while a question is put to all windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keye.engine.continuations import continue_sequences
from keye.engine.engine import Engine
from keye.engine.evidence import counted_layers
from keye.models.attention import AttentionMode
from keye.ops import registry
from keye.ops.backend import Stretch
from keye.sessions.search.scoring import encode_question
from keye.sessions.search.search_index import SearchIndex

#: Scores of frames [frames] by window.
FrameValues = dict[int, NDArray[np.floating]]
#: Sees queries, what a layer's kernel was given besides, and one stretch; a tensor [.., positions].
_Watch = Callable[..., Tensor]


def dense_shares(engine: Engine, index: SearchIndex, question: str) -> FrameValues:
    """Of each window the share of its frames among the k keys that each head of each query weighs most, as many as the
    indexer selects, in the layers whose selections are evidence; all together 1."""
    sparse = engine.runtime.config.text.sparse
    assert sparse is not None, "the model has an indexer"

    def count(q: Tensor, stretch: Stretch) -> Tensor:
        keys = stretch.rows(torch.arange(stretch.length))[0].float()  # [N, G, D]
        groups = q[stretch.start : stretch.stop].float().unflatten(1, (keys.shape[1], -1))  # [T, G, H / G, D]
        scores = torch.einsum("tghd,ngd->tghn", groups, keys)
        places = stretch.first + torch.arange(stretch.stop - stretch.start)
        scores.masked_fill_((torch.arange(stretch.length) > places[:, None])[:, None, None], -torch.inf)
        chosen = scores.topk(min(sparse.topk, stretch.length), dim=-1).indices.flatten()
        return torch.bincount(chosen, minlength=stretch.length)

    layers = engine.runtime.config.text.num_hidden_layers
    watched = set(range(layers)[counted_layers(layers)])
    shares: FrameValues = {}
    for number, spans, rows in _read(engine, index, question, "dense", watched, count):
        sums = np.concatenate([[0], torch.stack(rows).sum(0).numpy().cumsum()])
        hits = sums[spans[:, 1]] - sums[spans[:, 0]]
        shares[number] = hits / max(1, hits.sum())
    return shares


def indexer_scores(engine: Engine, index: SearchIndex, question: str) -> FrameValues:
    """How high the indexer of the middle layer scores each frame: of every token of the question the highest score
    I[t, s] of the frame's tokens, standardised over all frames of the video; of these the highest."""

    def score(q: Tensor, stretch: Stretch, indexer_q: Tensor, gate: Tensor) -> Tensor:
        assert stretch.key_tiles is not None
        keys, rows = stretch.key_tiles(0, stretch.length).float(), slice(stretch.start, stretch.stop)
        heads = torch.einsum("tji,ni->tjn", indexer_q[rows].float(), keys).relu()
        return torch.einsum("tj,tjn->tn", gate[rows].float(), heads)

    layer = engine.runtime.config.text.num_hidden_layers // 2
    values: FrameValues = {
        number: np.stack([rows[0][:, first:stop].amax(1).numpy() for first, stop in spans], axis=1)
        for number, spans, rows in _read(engine, index, question, "sparse", {layer}, score)
    }
    joined = np.concatenate(list(values.values()), axis=1)
    mean, deviation = joined.mean(1, keepdims=True), joined.std(1, keepdims=True) + 1e-9
    return {number: ((value - mean) / deviation).max(0) for number, value in values.items()}


def _read(
    engine: Engine, index: SearchIndex, question: str, mode: AttentionMode, layers: set[int], watch: _Watch
) -> Iterator[tuple[int, NDArray[np.int64], list[Tensor]]]:
    """Of each window its number, the positions of its frames, and what `watch` returned in `layers`."""
    numbers, ids = [window.number for window in index.windows], encode_question(engine.runtime, question)
    with _watch_kernel(f"{mode}_attention", engine.runtime.config.text.num_hidden_layers, layers, watch) as seen:
        sequences = continue_sequences(
            engine, lambda start, stop: [index.sequence(n) for n in numbers[start:stop]], len(numbers), ids,
            attention=mode,
        )  # fmt: skip
        assert sum(1 for _ in sequences) == len(numbers) == len(seen)
    for number, rows in zip(numbers, seen, strict=True):
        yield number, index.frame_spans(number), rows


@contextmanager
def _watch_kernel(name: str, layers: int, watched: set[int], watch: _Watch) -> Iterator[list[list[Tensor]]]:
    """Replaces a function of the registry by one that also calls `watch`; the list has what it returned for each
    sequence, in their order."""
    seen: list[list[Tensor]] = []
    attend, calls = getattr(registry, name), [0]

    def replacement(q: Tensor, *others: object) -> None:
        attend(q, *others)
        stretches: Sequence[Stretch] = next(item for item in others if isinstance(item, list))
        layer = calls[0] % layers
        calls[0] += 1
        if layer == 0:
            seen.extend([] for _ in stretches)
        if layer in watched:
            tensors = [item for item in others[:-1] if isinstance(item, Tensor)]
            for rows, stretch in zip(seen[-len(stretches) :], stretches, strict=True):
                rows.append(watch(q, stretch, *tensors))

    setattr(registry, name, replacement)
    try:
        yield seen
    finally:
        setattr(registry, name, attend)
