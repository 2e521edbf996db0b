"""From candidates to ranked moments: overlapping ones joined, probabilities given, names kept while things change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from keye.moments import Moment, OnCut, SubtitleLine
from keye.sessions.search.calibration import Calibration
from keye.sessions.search.coarse import SUPPRESSED, Span
from keye.sessions.search.questions import to_probability
from keye.sessions.search.verify import agreement
from keye.sessions.search.zoom import Candidate

#: Log-odds that stand for a look of a model that says neither yes nor no, but names times.
_NAMED = 1.0


@dataclass
class MomentNames:
    """Names of moments, which stay while borders move: what lies within `SUPPRESSED` seconds is the same moment."""

    known: list[tuple[str, float]] = field(default_factory=list)

    def assign(self, middles: Sequence[float]) -> list[str]:
        """A name for each moment by its middle, no name twice."""
        free = list(self.known)
        names = []
        for middle in middles:
            near = min(free, key=lambda entry: abs(entry[1] - middle), default=None)
            if near is not None and abs(near[1] - middle) <= SUPPRESSED:
                free.remove(near)
                names.append(near[0])
                self.known[self.known.index(near)] = (near[0], middle)
            else:
                names.append(f"m{len(self.known) + 1}")
                self.known.append((names[-1], middle))
        return names


def join_candidates(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates that overlap are one event, seen in two looks: it lasts from the first start to the last end."""
    joined: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda candidate: candidate.start):
        last = joined[-1] if joined else None
        if last is None or candidate.start > last.end:
            joined.append(candidate)
            continue
        surer = max(last, candidate, key=certainty)
        later = max(last, candidate, key=lambda item: item.end)
        joined[-1] = replace(
            surer, start=last.start, end=later.end, slack=(last.slack[0], later.slack[1]),
            is_refined=last.is_refined and later.is_refined,
        )  # fmt: skip
    return joined


def certainty(candidate: Candidate) -> float:
    """Log-odds that order the candidates of a model without a calibration."""
    close = _NAMED if candidate.close is None else candidate.close
    return close if candidate.alone is None else (close + candidate.alone) / 2


@dataclass(frozen=True)
class RankedMoments:
    """Moments above the threshold, the others, and the log-odds of all that were looked at closely."""

    moments: tuple[Moment, ...]
    weaker: tuple[Moment, ...]
    log_odds: tuple[float, ...]


@dataclass(frozen=True)
class Ranking:
    """How candidates become moments: by the calibration if there is one, else what a second question confirmed counts
    as found. `top` moments are kept, `file` is named in each."""

    calibration: Calibration | None
    threshold: float
    top: int
    file: str | None = None

    def rank(
        self, candidates: Sequence[tuple[Candidate, OnCut | None]], names: MomentNames,
        lines: Sequence[SubtitleLine | None] | None = None,
    ) -> RankedMoments:  # fmt: skip
        """Candidates with the borders that lie on a cut, and the subtitle that belongs to each."""
        lines = lines or [None] * len(candidates)
        odds = [self._log_odds(candidate) for candidate, _ in candidates]
        ids = names.assign([(candidate.start + candidate.end) / 2 for candidate, _ in candidates])
        order = sorted(range(len(candidates)), key=lambda i: -odds[i])[: self.top]
        above, below = list[Moment](), list[Moment]()
        for i in order:
            candidate, on_cut = candidates[i]
            probability = None if self.calibration is None else to_probability(odds[i])
            agreed = agreement(candidate)
            moment = Moment(
                ids[i], 0, round(candidate.start, 3), round(candidate.end, 3), probability, agreed,
                candidate.is_refined, on_cut, self.file, lines[i],
            )  # fmt: skip
            is_above = agreed != "failed" and odds[i] > 0 if probability is None else probability >= self.threshold
            (above if is_above else below).append(moment)
        ranked = [replace(moment, rank=rank) for rank, moment in enumerate((*above, *below), 1)]
        return RankedMoments(tuple(ranked[: len(above)]), tuple(ranked[len(above) :]), tuple(odds))

    def _log_odds(self, candidate: Candidate) -> float:
        return certainty(candidate) if self.calibration is None else self.calibration.moment_log_odds(candidate)

    def rank_spans(self, spans: Sequence[Span], names: MomentNames) -> tuple[Moment, ...]:
        """Spans that were not looked at closely yet, as moments without a probability."""
        chosen = [span for span in spans if span.probability > 0.5][: self.top]
        ids = names.assign([span.middle for span in chosen])
        return tuple(
            Moment(name, rank, round(span.start, 3), round(span.end, 3), None, file=self.file)
            for rank, (name, span) in enumerate(zip(ids, chosen, strict=True), 1)
        )
