"""Close looks at the best spans, as arms of a bandit: the one that may be best is looked at next.

A span has the probability that its window gave it and an upper bound above that, wide where the window was unsure. What
was looked at closely has a probability of its own. The search goes on until no bound is worth a look, or the tokens are
spent. Several spans are decoded and asked about together, which costs one pass through the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from keye.errors import MediaError
from keye.sessions.search.coarse import Span
from keye.sessions.search.looks import Asker, Look, LookReader, Spans
from keye.sessions.search.questions import to_probability

#: Seconds on both sides of the middle of a span that a look shows, and its frames a second.
REACH: Final = 6.0
RATE: Final = 4.0
#: Probabilities between which a look has not settled whether the event is there; it is then looked at once more.
UNSETTLED: Final = (0.1, 0.9)
MOST_LOOKS: Final = 2
#: An upper bound below this is not worth a look.
LEAST_BOUND: Final = 0.15
#: Log-odds of yes from which on the model is asked when the event happens.
_ASK_WHEN: Final = -2.0
#: Borders known to so many seconds were looked at more closely than windows show them.
_REFINED: Final = 0.5
#: Seconds that two spans of one window lie apart at most, about.
_WINDOW_SECONDS: Final = 64.0
#: Tokens of a question and its reply, to predict what a look costs.
_QUESTION_TOKENS = 60


@dataclass(frozen=True)
class Candidate:
    """An interval that may show the event. `slack` says how far before the start, and before the end, the border may
    lie: the time between two frames of the look. `coarse`, `close` and `alone` are log-odds of yes: of the window, of
    the close look, and of the interval by itself, None where there are none."""

    start: float
    end: float
    slack: tuple[float, float]
    coarse: float | None
    close: float | None
    alone: float | None = None
    is_refined: bool = False

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(eq=False)
class Arm:
    """A span and what is known of it: `yes` of each look so far, the candidates found in the last one."""

    span: Span
    reader: LookReader
    yes: list[float | None] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    is_unreadable: bool = False

    @property
    def bound(self) -> float:
        """The upper bound of the probability that another look finds the event here."""
        if self.is_unreadable or len(self.looks) >= MOST_LOOKS:
            return 0.0
        if not self.looks:
            p = self.span.probability
            return min(1.0, p + math.sqrt(p * (1 - p)))
        if (known := self.yes[-1]) is None:
            return 0.0
        p = to_probability(known)
        lacks_times = p >= UNSETTLED[1] and not self.candidates
        return p if UNSETTLED[0] < p < UNSETTLED[1] or lacks_times else 0.0

    def next_look(self, frames: int) -> Look:
        """The frames of the next look: around the middle of the span; the second time fewer seconds, more densely."""
        reach = REACH if not self.looks else REACH / 2
        reach = max(reach, self.span.seconds / 2 + reach / 3)
        start = max(self.span.middle - reach, 0.0)
        end = min(self.span.middle + reach, self.reader.info.duration)
        return self.reader.choose(start, end, min(frames, round(2 * REACH * RATE)))

    def take(self, look: Look, yes: float | None, spans: Spans) -> None:
        """Takes what the model says of a look."""
        self.looks.append(look)
        self.yes.append(yes)
        if spans or len(self.looks) == 1:
            self.candidates = [make_candidate(look, span, self.span.yes, yes) for span in spans]
        is_last = len(self.looks) == MOST_LOOKS
        if is_last and not self.candidates and self.span.is_named and max(odds or 0.0 for odds in self.yes) > 0:
            # The look shows the event but names no times that can be used: those of the window stand.
            self.candidates = [Candidate(self.span.start, self.span.end, (1.0, 1.0), self.span.yes, yes)]


def make_candidate(look: Look, span: tuple[int, int], coarse: float | None, close: float | None) -> Candidate:
    """The candidate of the first and last frame of a look in which the event is."""
    (start, end), (first, last) = look.seconds_of(span), span
    before = look.times[first] - look.times[first - 1] if first else 0.0
    slack = before, end - look.times[last]
    return Candidate(start, end, slack, coarse, close, is_refined=max(slack) <= _REFINED)


@dataclass(frozen=True)
class ZoomLimits:
    """How far to go: `frames` of a look at most, at least `least` arms are looked at whatever their bound, at most
    `most`, `width` at a time, and `tokens` in all."""

    frames: int
    least: int
    most: int
    width: int
    tokens: int


def look_closely(
    asker: Asker, arms: Sequence[Arm], limits: ZoomLimits, note: Callable[[Arm, MediaError], None]
) -> Iterator[list[Arm]]:
    """Looks at the arms that are worth it, and yields those that were looked at after each batch. `note` is called with
    an arm whose frames cannot be decoded."""
    while batch := _choose(asker, arms, limits):
        looked = list[Arm]()
        for reader in dict.fromkeys(arm.reader for arm in batch):
            looked += _look(asker, reader, [arm for arm in batch if arm.reader is reader], limits, note)
        yield looked


def _choose(asker: Asker, arms: Sequence[Arm], limits: ZoomLimits) -> list[Arm]:
    """The next arms, as many as tokens are left for."""
    seen = sum(bool(arm.looks) or arm.is_unreadable for arm in arms)
    chosen = sorted((arm for arm in arms if arm.bound >= LEAST_BOUND), key=lambda arm: -arm.bound)
    # Where the model has named times of a window, the rest of it waits until they turn out not to show the event.
    if any(not arm.span.is_elsewhere for arm in chosen):
        chosen = [arm for arm in chosen if arm.looks or not arm.span.is_elsewhere]
    else:
        chosen = [arm for arm in chosen if arm.looks or not _is_explained(arm, arms)]
    if seen >= limits.most:
        chosen = [arm for arm in chosen if arm.looks]
    if not chosen:  # once all that promises something is settled, in the order of the fused scores
        fresh = [arm for arm in arms if not arm.looks and not arm.is_unreadable]
        chosen = fresh[: max(0, limits.least - seen)]
    batch, left = list[Arm](), limits.tokens - asker.tokens
    for arm in chosen[: limits.width]:
        left -= cost_of(arm, limits.frames)
        if left < 0:
            break
        batch.append(arm)
    return batch


def _is_explained(arm: Arm, arms: Sequence[Arm]) -> bool:
    """Whether what a window says of an event is explained by the times named in it, which were looked at."""
    return any(
        other.span.is_named and other.candidates and other.reader is arm.reader
        and abs(other.span.middle - arm.span.middle) <= _WINDOW_SECONDS
        for other in arms
    )  # fmt: skip


def cost_of(arm: Arm, frames: int) -> int:
    """Tokens that a look at an arm takes, about."""
    return arm.reader.count_tokens(min(frames, round(2 * REACH * RATE))) + _QUESTION_TOKENS


def _look(
    asker: Asker, reader: LookReader, arms: list[Arm], limits: ZoomLimits, note: Callable[[Arm, MediaError], None]
) -> list[Arm]:
    looks = [arm.next_look(limits.frames) for arm in arms]
    try:
        looks = reader.read(looks)
    except MediaError as error:
        if len(arms) > 1:  # which of them cannot be read shows one by one
            return [done for arm in arms for done in _look(asker, reader, [arm], limits, note)]
        arms[0].is_unreadable = True
        note(arms[0], error)
        return []
    present = asker.ask_presence(looks)
    likely = [i for i, yes in enumerate(present) if yes is None or yes >= _ASK_WHEN]
    certain = [(present[i] or 0.0) > 0 for i in likely]
    when = dict(zip(likely, asker.ask_spans([looks[i] for i in likely], certain), strict=True))
    for i, (arm, look) in enumerate(zip(arms, looks, strict=True)):
        arm.take(look, present[i], when.get(i) or ())
    return arms
