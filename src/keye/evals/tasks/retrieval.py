"""What finds the right part of a long film, each by itself: the indexer's evidence, the windows' "yes", change, chance.

Every method gives scores to frames; its best spans are compared with when the event is seen. Takes the scores that a
search has computed already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keye.chat.times import Interval
from keye.evals.searches import percent
from keye.scoring import metrics, search
from keye.sessions.search.scoring import WindowScore
from keye.sessions.search.search_index import SearchIndex

#: Spans that a method may name, and their length in seconds.
SPANS, WIDTH = 8, 12.0
#: (film, hits by method) of one question.
RetrievalRow = tuple[int, Mapping[str, bool]]


def retrieve(index: SearchIndex, scores: Sequence[WindowScore], gold: Interval) -> dict[str, bool]:
    """Whether the best spans of each method meet the event:

    yes: the windows surest of "yes", as a whole. evidence: frames by the lift of the indexers' selections over the null
    question's. raw_evidence: the same without the null question. change: how much the picture changes.
    """
    surest = sorted(scores, key=lambda score: -score.yes)[:SPANS]
    hits = {"yes": search.overlaps([(index.all[s.number].start, index.all[s.number].end) for s in surest], gold)}
    if scores and all(score.lifts is not None for score in scores):
        hits["evidence"] = meets(index, scores, lambda score: score.lifts, gold)
        hits["raw_evidence"] = meets(index, scores, lambda score: score.raw_lifts, gold)
    times, changes = index.changes
    if len(times):
        hits["change"] = search.overlaps(search.best_spans(times.tolist(), changes, SPANS, WIDTH), gold)
    return hits


def meets(
    index: SearchIndex, scores: Iterable[WindowScore],
    frames: Callable[[WindowScore], NDArray[np.floating] | None], gold: Interval,
) -> bool:  # fmt: skip
    """Whether the best spans by the scores of all windows' frames meet the event."""
    rows = [(index.all[score.number].times, frames(score)) for score in scores]
    times = np.concatenate([np.asarray(times) for times, values in rows if values is not None])
    values = np.concatenate([values for _, values in rows if values is not None])
    return search.overlaps(search.best_spans(times.tolist(), values, SPANS, WIDTH), gold)


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
