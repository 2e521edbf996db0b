"""What finds the right part of a long film, each by itself: the indexer's evidence, the windows' "yes", attention,
change of the picture, chance. Every method gives scores to frames; its best spans are compared with when the event is
seen. For `benchmarks/find.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keye.chat.times import Interval
from keye.engine.continuations import continue_sequences
from keye.engine.engine import Engine
from keye.engine.evidence import counted_layers
from keye.evals.figures.searches import percent
from keye.ops import registry
from keye.ops.backend import Stretch
from keye.scoring import metrics, search
from keye.sessions.search.scoring import WindowScore, encode_question, rank_evidence
from keye.sessions.search.search_index import SearchIndex

#: Spans that a method may name, and their length in seconds.
SPANS, WIDTH = 8, 12.0
#: (film, hits by method) of one question.
RetrievalRow = tuple[int, Mapping[str, bool]]


def retrieve(index: SearchIndex, scores: Sequence[WindowScore], gold: Interval) -> dict[str, bool]:
    """Whether the best spans of each method meet the event:

    yes: the windows surest of "yes", as a whole. evidence: frames by the scores of one layer's indexer
    (`keye.sessions.search.scoring.rank_evidence`). selections: frames by how often the indexers choose them, over the
    null question. change: how much the picture changes.
    """
    surest = sorted(scores, key=lambda score: -score.yes)[:SPANS]
    hits = {"yes": search.overlaps([(index.all[s.number].start, index.all[s.number].end) for s in surest], gold)}
    if evidence := rank_evidence(scores):
        hits["evidence"] = meets(index, scores, evidence, gold)
    if lifts := [score.lifts for score in scores if score.lifts is not None]:
        hits["selections"] = meets(index, scores, lifts, gold)
    times, changes = index.changes
    if len(times):
        hits["change"] = search.overlaps(search.best_spans(times.tolist(), changes, SPANS, WIDTH), gold)
    return hits


def meets(
    index: SearchIndex, scores: Sequence[WindowScore], frames: Sequence[NDArray[np.floating]], gold: Interval
) -> bool:
    """Whether the best spans by values of all windows' frames, [frames] for each of `scores`, meet the event."""
    times = np.concatenate([np.asarray(index.all[score.number].times) for score in scores])
    return search.overlaps(search.best_spans(times.tolist(), np.concatenate(frames), SPANS, WIDTH), gold)


def summarise_retrieval(rows: Sequence[RetrievalRow], length: float, duration: float) -> dict[str, Any]:
    """Per cent of events of `length` seconds that the spans of each method meet, with standard errors (films are the
    clusters), and the share that spans at random do."""
    methods = sorted({name for _, hits in rows for name in hits})
    groups = {name: [(film, float(hits[name])) for film, hits in rows if name in hits] for name in methods}
    return {
        "spans": SPANS, "seconds": WIDTH, "n": len(rows),
        **{name: {"value": percent(metrics.mean([value for _, value in group])),
                  "error": percent(metrics.clustered_error([group])), "n": len(group)}
           for name, group in groups.items()},
        "random": {"value": percent(search.random_span_recall(duration, length, SPANS, WIDTH))},
    }  # fmt: skip


def dense_shares(engine: Engine, index: SearchIndex, question: str) -> dict[int, NDArray[np.float64]]:
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
    numbers, ids = [window.number for window in index.windows], encode_question(engine.runtime, question)
    with _watch_dense(layers, watched, count) as counts:
        sequences = continue_sequences(
            engine, lambda start, stop: [index.sequence(n) for n in numbers[start:stop]], len(numbers), ids,
            attention="dense",
        )  # fmt: skip
        assert sum(1 for _ in sequences) == len(numbers) == len(counts)
    shares = {}
    for number, row in zip(numbers, counts, strict=True):
        sums, spans = np.concatenate([[0], row.numpy().cumsum()]), index.frame_spans(number)
        hits = sums[spans[:, 1]] - sums[spans[:, 0]]
        shares[number] = hits / max(1, hits.sum())
    return shares


@contextmanager
def _watch_dense(layers: int, watched: set[int], watch: Callable[[Tensor, Stretch], Tensor]) -> Iterator[list[Tensor]]:
    """Replaces dense attention by one that also calls `watch` in some layers; the list has the sum of what it returned
    for each sequence, in their order."""
    sums: list[Tensor] = []
    attend, calls = registry.dense_attention, [0]

    def replacement(q: Tensor, stretches: Sequence[Stretch], out: Tensor) -> None:
        attend(q, stretches, out)
        layer = calls[0] % layers
        calls[0] += 1
        if layer == 0:
            sums.extend(torch.zeros(stretch.length, dtype=torch.int64) for stretch in stretches)
        if layer in watched:
            for total, stretch in zip(sums[-len(stretches) :], stretches, strict=True):
                total += watch(q, stretch)

    registry.dense_attention = replacement
    try:
        yield sums
    finally:
        registry.dense_attention = attend
