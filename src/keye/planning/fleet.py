"""How many decode workers and engines a load of videos needs: a small simulation, fed with measured times.

Videos arrive at random. Each is decoded by one of `decoders` workers, in turn, and asked about on one of `replicas`
engines, always the same one for a video. An engine works on several requests at once, faster together than one after
another but each slower than alone. Nothing here reads a video or a model; times are seconds, rates are per second.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Final

from keye.errors import KeyeError

#: Share of their time that workers and engines may be busy in the hour that counts.
MOST_BUSY: Final = 0.8
#: Decode workers, and engines, of the largest fleet that is planned.
MOST_WORKERS: Final = 100_000
#: Videos of one simulation, the share of them that only fills the queues, and steps by which a fleet may grow.
VIDEOS: Final = 4000
WARM_UP: Final = 0.1
_STEPS: Final = 40


@dataclass(frozen=True)
class Load:
    """`rate` videos a second, each with `questions` questions; the later ones find it in the engine's cache."""

    rate: float
    questions: int = 1

    def __post_init__(self) -> None:
        if not self.rate > 0 or self.questions < 1:
            amount = f"{self.rate:g} videos a second of {self.questions} questions"
            raise KeyeError(f"the load is {amount}; give more than 0")


@dataclass(frozen=True)
class Costs:
    """Measured times. `decode` seconds of a worker for one video; `engine` (requests at once, seconds of the engine for
    each of them) for the first question about a video, ascending; `later` is what a later question takes as a share of
    the first. `spread` is the standard deviation of all of these over their mean. `file_bytes` and `frame_bytes` are
    what a video has before and after it is decoded."""

    decode: float
    engine: tuple[tuple[int, float], ...]
    later: float = 1.0
    spread: float = 0.3
    file_bytes: int = 0
    frame_bytes: int = 0

    def __post_init__(self) -> None:
        counts = [count for count, _ in self.engine]
        if not counts or counts[0] != 1 or counts != sorted(set(counts)):
            raise KeyeError(f"times of the engine are given for {counts} requests at once; begin with 1 and ascend")
        if not all(value > 0 for value in (self.decode, self.later, *(seconds for _, seconds in self.engine))):
            raise KeyeError("a time of decoding or of the engine is not above 0")
        if not 0 <= self.spread <= 10:
            raise KeyeError(f"the spread of times is {self.spread:g}; give the standard deviation over the mean, 0 to "
                            "10")  # fmt: skip

    def each(self, count: float) -> float:
        """Seconds of an engine for each of `count` requests at once: on the line between what was measured."""
        known = self.engine
        if count >= known[-1][0]:
            return known[-1][1]
        place = next(i for i, (most, _) in enumerate(known) if count < most)
        (low, before), (high, after) = known[place - 1], known[place]
        return before + (after - before) * (count - low) / (high - low)


@dataclass(frozen=True)
class Fleet:
    """`decoders` workers and `replicas` engines, each of which takes `together` requests at once. At most `waiting`
    decoded videos for each engine lie between them; then decoding waits."""

    decoders: int
    replicas: int
    together: int = 16
    waiting: int = 16


@dataclass(frozen=True)
class Outcome:
    """What a fleet made of a load: `answers` a second, `seconds` from a video's arrival to the answer of its first
    question (mean, median, p95), and the share of time that `decoders` and `engines`
    were busy. `videos` a second were answered for the first time."""

    answers: float
    videos: float
    mean: float
    median: float
    p95: float
    decoders: float
    engines: float


@dataclass
class _Job:
    arrived: float
    work: float
    decode: float
    first: bool
    replica: int


@dataclass
class _Engine:
    """Requests in work with what is left of each, in shares of one first question."""

    left: dict[int, float] = field(default_factory=dict)
    queue: deque[int] = field(default_factory=deque)
    since: float = 0.0
    version: int = 0
    busy: float = 0.0


class _Simulation:
    """Events by time: a video arrives, is decoded, a request is answered."""

    def __init__(self, load: Load, costs: Costs, fleet: Fleet, arrivals: Sequence[float] | int, seed: int) -> None:
        self.load, self.costs, self.fleet, self.arrivals = load, costs, fleet, arrivals
        self.random = random.Random(seed)
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.engines = [_Engine() for _ in range(fleet.replicas)]
        self.jobs: list[_Job] = []
        self.to_decode: deque[int] = deque()
        self.free, self.between = fleet.decoders, 0
        self.now, self.count, self.decode_busy = 0.0, 0, 0.0
        self.ended: list[tuple[float, float]] = []
        self.answers_given = 0

    def run(self) -> Outcome:
        arrivals = self.arrivals
        if isinstance(arrivals, int):
            arrivals = list(accumulate(self.random.expovariate(self.load.rate) for _ in range(arrivals)))
        for at in arrivals:
            self._at(at, self._arrive)
        while self.events:
            self.now, _, act = heapq.heappop(self.events)
            act()
        return self._outcome()

    def _at(self, when: float, act: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.events, (when, self.count, act))

    def _varied(self) -> float:
        """A factor of mean 1: log-normal, since times are never negative and sometimes long."""
        sigma = math.sqrt(math.log1p(self.costs.spread**2))
        return self.random.lognormvariate(-(sigma**2) / 2, sigma)

    def _arrive(self) -> None:
        replica = self.random.randrange(self.fleet.replicas)
        self.jobs.append(_Job(self.now, self._varied(), self.costs.decode * self._varied(), True, replica))
        self.to_decode.append(len(self.jobs) - 1)
        self._decode_more()

    def _decode_more(self) -> None:
        room = self.fleet.waiting * self.fleet.replicas
        while self.free and self.to_decode and self.between < room:
            number = self.to_decode.popleft()
            self.free, self.between = self.free - 1, self.between + 1
            self.decode_busy += self.jobs[number].decode
            self._at(self.now + self.jobs[number].decode, lambda number=number: self._decoded(number))  # type: ignore[misc]

    def _decoded(self, number: int) -> None:
        self.free += 1
        engine = self.engines[self.jobs[number].replica]
        engine.queue.append(number)
        self._advance(engine)

    def _advance(self, engine: _Engine) -> None:
        """Works off what has been done since the last event of this engine, and finds out when the next one ends."""
        speed = self._speed(engine)
        passed = self.now - engine.since
        engine.since = self.now
        if engine.left:
            engine.busy += passed
        for number in list(engine.left):
            engine.left[number] -= passed * speed
            if engine.left[number] <= 1e-9:
                del engine.left[number]
                self._answer(number)
        while engine.queue and len(engine.left) < self.fleet.together:
            number = engine.queue.popleft()
            engine.left[number] = self.jobs[number].work
            if self.jobs[number].first:
                self.between -= 1
        engine.version += 1
        if engine.left:
            version, wait = engine.version, min(engine.left.values()) / self._speed(engine)
            self._at(self.now + wait, lambda: self._advance(engine) if engine.version == version else None)
        self._decode_more()

    def _speed(self, engine: _Engine) -> float:
        """Shares of a first question a second, for each request in work."""
        count = max(1, len(engine.left))
        return 1 / (count * self.costs.each(count))

    def _answer(self, number: int) -> None:
        job = self.jobs[number]
        self.answers_given += 1
        if not job.first:
            return
        self.ended.append((job.arrived, self.now - job.arrived))
        for _ in range(self.load.questions - 1):
            self.jobs.append(_Job(self.now, self.costs.later * self._varied(), 0.0, False, job.replica))
            self.engines[job.replica].queue.append(len(self.jobs) - 1)

    def _outcome(self) -> Outcome:
        end = self.now
        counted = sorted(seconds for _, seconds in self.ended[int(WARM_UP * len(self.ended)) :])
        return Outcome(
            answers=self.answers_given / end, videos=len(self.ended) / end, mean=sum(counted) / len(counted),
            median=counted[len(counted) // 2], p95=counted[len(counted) * 95 // 100],
            decoders=self.decode_busy / (end * self.fleet.decoders),
            engines=sum(engine.busy for engine in self.engines) / (end * len(self.engines)),
        )  # fmt: skip


def simulate(
    load: Load, costs: Costs, fleet: Fleet, *, videos: int | Sequence[float] = VIDEOS, seed: int = 0
) -> Outcome:
    """Plays so many `videos`, or those that arrive at given seconds, through a fleet; the same seed gives the same
    outcome. The first tenth does not count in `mean`, `median` and `p95`."""
    count = videos if isinstance(videos, int) else len(videos)
    if min(fleet.decoders, fleet.replicas, fleet.together, fleet.waiting, count) < 1:
        raise KeyeError("a fleet needs a decoder, an engine and room for a request; give 1 or more of each")
    return _Simulation(load, costs, fleet, videos, seed).run()


def size_fleet(load: Load, costs: Costs, *, seconds: float, together: int = 16) -> tuple[Fleet, Outcome]:
    """The smallest fleet, found by growing one, in which nothing is busy for more than `MOST_BUSY` of the time and 95
    of 100 first answers come within `seconds`. `KeyeError` where even a fleet without queues is slower than that."""
    alone = costs.decode + costs.each(1)
    if alone * 1.2 > seconds:
        raise KeyeError(f"one video alone takes {alone:.3g} s, so that a p95 of {seconds:g} s cannot be reached: "
                        "sample fewer frames, or allow more time")  # fmt: skip
    work = 1 + (load.questions - 1) * costs.later
    need = load.rate * costs.decode / MOST_BUSY, load.rate * work * costs.each(together) / MOST_BUSY
    if not max(need) <= MOST_WORKERS:  # also where it is NaN
        raise KeyeError(f"the load is beyond any fleet: it would take {need[0]:.3g} decode workers and {need[1]:.3g} "
                        f"engines, and a plan has at most {MOST_WORKERS:,} of each; give fewer videos a day, or sample "
                        "fewer frames")  # fmt: skip
    decoders, replicas = map(math.ceil, need)
    fleet = Fleet(max(1, decoders), max(1, replicas), together)
    for _ in range(_STEPS):
        outcome = simulate(load, costs, fleet)
        if outcome.p95 <= seconds:
            return fleet, outcome
        more_decoders = replace(fleet, decoders=fleet.decoders + max(1, fleet.decoders // 10))
        more_engines = replace(fleet, replicas=fleet.replicas + max(1, fleet.replicas // 10))
        fleet = min((more_decoders, more_engines), key=lambda option: simulate(load, costs, option).p95)
    raise KeyeError(f"no fleet of up to {fleet.decoders} decoders and {fleet.replicas} engines keeps to {seconds:g} s")


def throughput(costs: Costs, fleet: Fleet, questions: int = 1) -> float:
    """Videos a second that a fleet can keep up with: what its busier half does."""
    work = 1 + (questions - 1) * costs.later
    return min(fleet.decoders / costs.decode, fleet.replicas / (work * costs.each(fleet.together)))
