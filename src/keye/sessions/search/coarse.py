"""From scores of frames to the spans that are looked at closely: fusion by rank, smoothing, suppression of neighbours.

A scorer says how well frames of an indexed video match an event, on whatever scale it has. Scales are not compared:
each scorer ranks the seconds of the video, and ranks are fused (reciprocal rank fusion). Knows numbers and times, no
pixels and no model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from keye.sessions.search.questions import LEAST_MASS, clip_log_odds, to_probability
from keye.sessions.search.scoring import WindowScore, rank_evidence

if TYPE_CHECKING:
    from keye.sessions.search.search_index import SearchIndex

#: Seconds of a cell of the grid on which scores are fused.
CELL: Final = 0.5
#: Ranks count as 1 / (RANK_OFFSET + rank): the smaller, the more the first ranks of one scorer outweigh the others.
RANK_OFFSET: Final = 10.0
#: Seconds over which fused scores are smoothed, and around a peak in which no other peak is taken.
SMOOTHED: Final = 2.0
SUPPRESSED: Final = 5.0
#: Log-odds that a window loses for all but the times that the model has named in it.
ELSEWHERE: Final = 4.0


@dataclass(frozen=True)
class FrameScores:
    """Scores of frames, float [n], higher for better matches; frame i is shown from `starts[i]` to `ends[i]` seconds.
    A frame may be there more than once; the better score counts."""

    starts: NDArray[np.float64]
    ends: NDArray[np.float64]
    scores: NDArray[np.float64]


class FrameScorer(Protocol):
    """Scores the frames of an indexed video for an event."""

    def score(self, index: SearchIndex, event: str) -> FrameScores: ...


@dataclass(frozen=True)
class Span:
    """A part of a video that may show the event: `score` is the fused one, `yes` the log-odds of the best window that
    covers it (None where the model gives none). `is_named` says that the model has named these times in a
    window, `is_elsewhere` that it has named others in the window that shows this span."""

    start: float
    end: float
    score: float
    yes: float | None
    is_named: bool = False
    is_elsewhere: bool = False

    @property
    def middle(self) -> float:
        return (self.start + self.end) / 2

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def probability(self) -> float:
        """How likely the window says the event is there; even odds where it says nothing."""
        return 0.5 if self.yes is None else to_probability(self.yes)


def score_by_yes(
    index: SearchIndex, scored: Iterable[WindowScore], answers_in: Collection[int] = ()
) -> FrameScores | None:
    """Every frame of a window by the log-odds of yes; None where the model says neither yes nor no. In windows that
    are in `answers_in` the model has named its times, so that it is less likely to be elsewhere in them."""
    rows = [
        (index.all[score.number], clip_log_odds(score.yes) - ELSEWHERE * (score.number in answers_in))
        for score in scored if score.mass >= LEAST_MASS
    ]  # fmt: skip
    if not rows:
        return None
    return _join([(window.times, window.end, [yes] * len(window.times)) for window, yes in rows])


def score_by_evidence(index: SearchIndex, scored: Sequence[WindowScore]) -> FrameScores | None:
    """Every frame by what the sparse-attention indexer scores it for the question; None without an indexer."""
    ranked = rank_evidence(scored)
    if not ranked:
        return None
    windows = [index.all[score.number] for score in scored]
    return _join([(w.times, w.end, evidence) for w, evidence in zip(windows, ranked, strict=True)])


def merge_named(named: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Intervals (start, end, log-odds) that the model named in windows: those that overlap or touch are one, which
    goes on where a window ended. The surest first."""
    merged: list[tuple[float, float, float]] = []
    for start, end, odds in sorted(named):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1]), max(odds, merged[-1][2])
        else:
            merged.append((start, end, odds))
    return sorted(merged, key=lambda item: -item[2])


def _join(rows: Sequence[tuple[Sequence[float], float, Sequence[float] | NDArray[np.float32]]]) -> FrameScores:
    starts = np.concatenate([np.asarray(times, dtype=float) for times, _, _ in rows])
    ends = np.concatenate([np.asarray([*times[1:], end], dtype=float) for times, end, _ in rows])
    return FrameScores(starts, ends, np.concatenate([np.asarray(scores, dtype=float) for _, _, scores in rows]))


def to_grid(scores: FrameScores, cells: int) -> NDArray[np.float64]:
    """The best score in each cell, float [cells]; -inf where no frame was shown that has one."""
    grid = np.full(cells, -math.inf)
    first = np.clip(np.floor(scores.starts / CELL + 1e-6).astype(int), 0, cells - 1)
    last = np.clip(np.ceil(scores.ends / CELL - 1e-6).astype(int), first + 1, cells)
    for begin, end, value in zip(first.tolist(), last.tolist(), scores.scores.tolist(), strict=True):
        np.maximum(grid[begin:end], value, out=grid[begin:end])
    return grid


def fuse(tracks: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Reciprocal rank fusion of scores of the same cells: float [cells]. Equal scores share the best of their ranks,
    and ranks count distinct scores, so that a window of a minute is one rank and not sixty."""
    assert tracks
    fused = np.zeros(len(tracks[0]))
    for track in tracks:
        _, inverse = np.unique(-track, return_inverse=True)
        fused += np.where(np.isfinite(track), 1 / (RANK_OFFSET + inverse), 0.0)
    return fused


def smooth(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over `SMOOTHED` seconds around each cell; at both ends over what there is."""
    width = max(1, round(SMOOTHED / CELL) // 2 * 2 + 1)
    kernel = np.ones(width)
    return np.convolve(scores, kernel, "same") / np.convolve(np.ones_like(scores), kernel, "same")


def pick_peaks(scores: NDArray[np.float64], count: int) -> list[int]:
    """Cells of at most `count` peaks, the highest first, no two within `SUPPRESSED` seconds."""
    left, reach, peaks = scores.copy(), round(SUPPRESSED / CELL), list[int]()
    while len(peaks) < count and len(left):
        best = int(left.argmax())
        if left[best] <= 0:
            break
        plateau = best  # the middle of cells that score alike
        while plateau + 1 < len(left) and left[plateau + 1] == left[best]:
            plateau += 1
        peak = (best + min(plateau, best + 2 * reach)) // 2
        peaks.append(peak)
        left[max(0, peak - reach) : peak + reach + 1] = -math.inf
    return peaks


def find_spans(
    duration: float, tracks: Sequence[FrameScores | None], yes: FrameScores | None, count: int,
    named: Sequence[tuple[float, float, float]] = (), replies: Sequence[tuple[float, float]] = (),
) -> list[Span]:  # fmt: skip
    """The best `count` spans of a video, the best first: the intervals (start, end, log-odds) that the model has
    `named` in windows, then peaks of the fused scores of `tracks` elsewhere. `yes` gives their log-odds; `replies` are
    the windows (start, end) in which it has named any."""
    cells = max(1, math.ceil(duration / CELL))
    grids = [to_grid(track, cells) for track in tracks if track is not None]
    if not grids:
        return []
    fused = smooth(fuse(grids))
    spans = [
        Span(start, end, float(fused[min(int(start / CELL), cells - 1)]), odds, is_named=True)
        for start, end, odds in merge_named(named)
    ][:count]
    odds = None if yes is None else to_grid(yes, cells)
    for peak in pick_peaks(fused, count):
        middle = (peak + 0.5) * CELL
        if len(spans) >= count or any(s.start - SUPPRESSED <= middle <= s.end + SUPPRESSED for s in spans):
            continue
        known = None if odds is None or not math.isfinite(odds[peak]) else float(odds[peak])
        start, end = max(0.0, middle - SMOOTHED / 2), min(duration, middle + SMOOTHED / 2)
        is_elsewhere = any(a <= middle <= b for a, b in replies)
        spans.append(Span(start, max(end, start), float(fused[peak]), known, is_elsewhere=is_elsewhere))
    return spans
