"""The second check of an interval: its borders to the frame, and a question about it alone.

A moment lasts from the time at which the first frame with the event is shown until the first frame without it is. One
more look at the frames around both borders, as they are in the file, finds them; a border beside a hard cut lies on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from keye.media.scenes import snap
from keye.moments import Checked, OnCut
from keye.sessions.search.looks import Asker, Look, LookReader
from keye.sessions.search.zoom import Candidate

#: Seconds within which a border is that of a cut, at most.
SNAP: Final = 0.3
#: Frames of a look at one border, and of one at an interval alone.
BORDER_FRAMES: Final = 16
ALONE_FRAMES: Final = 16
#: Looks at the borders of a candidate, until they are known to a frame.
ROUNDS: Final = 2
#: An interval alone is padded by this part of it on both sides, and by so many seconds at most.
_PADDED, _MOST_PADDED = 0.1, 0.4
#: Looks that are read and asked together.
_TOGETHER: Final = 8
#: A border is known where it is off by no more than this many frames of the file.
_KNOWN: Final = 1.5


def refine_borders(
    asker: Asker, reader: LookReader, candidates: Sequence[Candidate], budget: int, rounds: int = ROUNDS
) -> list[Candidate]:
    """The candidates with their borders looked at in the frames of the file around them, as many as `budget` tokens
    afford beside those that were spent."""
    refined = list(candidates)
    for _ in range(rounds):
        coarse = [i for i, candidate in enumerate(refined) if max(candidate.slack) > _KNOWN / reader.info.fps]
        looks = _afford(reader, [(i, _border_look(reader, refined[i])) for i in coarse], budget - asker.tokens)
        for part in _batches(looks):
            read = reader.read([look for _, look in part])
            for (i, _), look, spans in zip(part, read, asker.ask_spans(read, [True] * len(read)), strict=True):
                refined[i] = _move_borders(refined[i], look, spans or ())
    return refined


def _afford(reader: LookReader, looks: Sequence[tuple[int, Look]], left: int) -> list[tuple[int, Look]]:
    """The looks, in their order, that `left` tokens pay for."""
    affordable = list[tuple[int, Look]]()
    for i, look in looks:
        left -= reader.count_tokens(len(look.indices))
        if left >= 0:
            affordable.append((i, look))
    return affordable


def _batches(looks: Sequence[tuple[int, Look]]) -> Iterator[Sequence[tuple[int, Look]]]:
    """Looks whose frames are in memory together."""
    return (looks[start : start + _TOGETHER] for start in range(0, len(looks), _TOGETHER))


def _border_look(reader: LookReader, candidate: Candidate) -> Look:
    """The frames around both borders; what lies between them is left out where it is long."""
    step = 1 / reader.info.fps
    zones = []
    for border, slack in zip((candidate.start, candidate.end), candidate.slack, strict=True):
        reach = max(slack, 3 * step, ((BORDER_FRAMES - 2) * step - slack) / 2)
        zones.append((max(border - slack - reach, 0.0), min(border + reach, reader.info.duration)))
    (first, before), (after, last) = zones
    if after - before < 4 * step:
        return reader.choose(first, last, 2 * BORDER_FRAMES)
    parts = [reader.choose(*zone, BORDER_FRAMES).indices for zone in zones]
    return reader.look_at(sorted({*parts[0], *parts[1]}))


def _move_borders(candidate: Candidate, look: Look, spans: Sequence[tuple[int, int]]) -> Candidate:
    """The candidate with the borders that a look found; one that lies at the edge of the look stays."""
    joined = list[tuple[int, int]]()
    for first, last in sorted(spans):  # frames in which a small model missed the event do not end it
        if joined and first <= joined[-1][1] + 2:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        else:
            joined.append((first, last))
    best = max(joined, key=lambda span: _overlap(look.seconds_of(span), candidate), default=None)
    if best is None or _overlap(look.seconds_of(best), candidate) <= 0:
        return candidate
    first, last = best
    start, end, (before, after) = candidate.start, candidate.end, candidate.slack
    if first > 0:
        start, before = look.times[first], look.times[first] - look.times[first - 1]
    if last < len(look.indices) - 1:
        end, after = look.ends[last], look.ends[last] - look.times[last]
    if end <= start:
        return candidate
    return replace(candidate, start=start, end=end, slack=(before, after), is_refined=True)


def _overlap(interval: tuple[float, float], candidate: Candidate) -> float:
    return min(interval[1], candidate.end) - max(interval[0], candidate.start)


def snap_borders(candidate: Candidate, cuts: Sequence[float], fps: float) -> tuple[Candidate, OnCut | None]:
    """The candidate with borders on hard cuts that lie as near as its borders are uncertain, and which do."""
    tolerance = min(SNAP, max(*candidate.slack, 2 / fps))
    start, end, on_cut = snap((candidate.start, candidate.end), cuts, tolerance)
    return (replace(candidate, start=start, end=end), on_cut) if start < end else (candidate, None)


def check_alone(asker: Asker, reader: LookReader, candidates: Sequence[Candidate], budget: int) -> list[Candidate]:
    """The candidates with the log-odds that the event is in their interval, shown by itself; those that `budget` tokens
    do not pay for beside what was spent stay as they are, the least sure first."""
    looks = []
    for i in sorted(range(len(candidates)), key=lambda i: -(candidates[i].close or 0.0)):
        pad = min(_MOST_PADDED, _PADDED * candidates[i].seconds)
        looks.append((i, reader.choose(max(candidates[i].start - pad, 0.0), candidates[i].end + pad, ALONE_FRAMES)))
    checked = list(candidates)
    for part in _batches(_afford(reader, looks, budget - asker.tokens)):
        present = asker.ask_presence(reader.read([look for _, look in part]))
        for (i, _), yes in zip(part, present, strict=True):
            checked[i] = replace(checked[i], alone=yes)
    return checked


def agreement(candidate: Candidate) -> Checked:
    """What the second question said."""
    if candidate.alone is None:
        return "no"
    return "twice" if candidate.alone > 0 else "failed"
