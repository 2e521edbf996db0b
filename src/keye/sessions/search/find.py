"""The search for an event in one video, from its windows to ranked moments, as events that a reader takes one by one.

    read    the video becomes a search index, or the one of before is opened; windows are scored as they come
    coarse  scores of frames are fused to spans
    close   the best spans are looked at closely, as arms of a bandit
    verify  borders are found to the frame, and a second question about each interval alone must agree

Whatever ends a search early (`stop`, a deadline, Ctrl-C), `MomentSearch.result` gives the best so far and says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from keye.cache.segments import is_segmented
from keye.chat.messages import Medium
from keye.chat.times import Interval
from keye.engine.engine import Engine
from keye.errors import KeyeError, KeyeWarning, MediaError, collect_warnings
from keye.media.source.fetch import Source, is_index
from keye.moments import (
    Coverage,
    FindEvent,
    FindNote,
    FindProgress,
    FindResult,
    Moment,
    MomentsFound,
    OnCut,
    SeenSpan,
    Stage,
)  # fmt: skip
from keye.sessions.scope import scope_notes, warn_scope
from keye.sessions.search.build import WindowsReady, build_search_index
from keye.sessions.search.calibration import DEFAULT_THRESHOLD, load_calibration
from keye.sessions.search.coarse import FrameScores, Span, find_spans, score_by_evidence, score_by_yes  # fmt: skip
from keye.sessions.search.looks import FAULTS, Asker, LookReader
from keye.sessions.search.options import DEPTHS, LEAST_BUDGET, FindOptions
from keye.sessions.search.places import default_index_path, identify_source, note_use
from keye.sessions.search.questions import check_event, presence_question
from keye.sessions.search.ranking import MomentNames, RankedMoments, Ranking, certainty, join_candidates
from keye.sessions.search.scoring import WindowScore, score_windows
from keye.sessions.search.search_index import SearchIndex, open_search_index
from keye.sessions.search.spoken import Spoken, read_spoken
from keye.sessions.search.verify import ALONE_FRAMES, check_alone, refine_borders, snap_borders
from keye.sessions.search.zoom import Arm, Candidate, ZoomLimits, look_closely

_VERIFY_SHARE: Final = 0.3  # of the budget is kept for the second questions
#: Spans looked at together, and frames of a look of a model that does not say how many it was measured on.
_WIDTH: Final = 3
_FRAMES: Final = 64
#: Log-odds of yes from which on a window is asked when the event happens.
_ASK_WINDOW: Final = -3.0


class _Stopped(Exception):
    """Ends a search early, from inside whatever it waits for."""


@dataclass
class MomentSearch:
    """A search while it goes on. `run` emits its events; `result` is the best so far at any time. `candidates` are what
    was looked at closely, `best_coarse` the log-odds of the window that is surest.

    `source` is the video, or None where only its `index` is there: then nothing is looked at closely. `check` is called
    again and again and may raise.
    """

    engine: Engine
    source: Source | None
    event: str
    options: FindOptions = field(default_factory=FindOptions)
    media_options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[], None] | None = None
    index: SearchIndex | None = None
    name: str | None = None
    candidates: list[Candidate] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[FindNote] = field(default_factory=list)
    is_stopped: bool = False

    def __post_init__(self) -> None:
        self.event = check_event(self.event)
        runtime = self.engine.runtime
        self.depth = DEPTHS[self.options.effort]
        self.calibration = load_calibration(runtime.folder)
        default = DEFAULT_THRESHOLD if self.calibration is None else self.calibration.threshold
        threshold = default if self.options.threshold is None else self.options.threshold
        self.ranking = Ranking(self.calibration, threshold, self.options.top, self.name)
        self.asker = Asker(self.engine, self.event, self._check)
        self.names, self.spoken = MomentNames(), Spoken()
        self.scored: dict[int, WindowScore] = {}
        self.arms: list[Arm] = []
        self.spans: list[Span] = []
        self.on_cuts: list[OnCut | None] = []
        self._question_tokens = 0
        self._begin = self._mark = time.perf_counter()
        self._stop = False
        self.notes += scope_notes(runtime.generation_config.scope, self.event)
        warn_scope(self.notes)

    # What ends it

    def stop(self) -> None:
        """Ends the search as soon as it can; the last event is the best so far. From any thread."""
        self._stop = True

    def _check(self) -> None:
        if self.check is not None:
            self.check()
        late = self.options.seconds is not None and time.perf_counter() - self._begin > self.options.seconds
        most = self.options.most_tokens
        if self._stop or late or (most is not None and self._question_tokens + self.asker.tokens >= most):
            raise _Stopped

    # Stages

    def run(self) -> Generator[FindEvent]:
        """The events of the search; the last one is its result."""
        with collect_warnings() as warnings:
            try:
                yield from self._read()
                yield from self._coarse()
                yield from self._close_and_verify()
            except _Stopped:
                self.is_stopped = True
            finally:
                self._take_time("index" if "index" not in self.seconds else "close")
                if self.index is not None:
                    self.index.release()
        self._note_warnings(warnings)
        yield self.result()

    def _read(self) -> Iterator[FindEvent]:
        """The windows, scored as they come."""
        self.spoken = read_spoken(self.options.subtitles, self.source, self.event)
        self.notes += self.spoken.notes
        if self.index is None:
            yield from self._build()
        assert self.index is not None
        self._take_time("index")
        if left := [window.number for window in self.index.windows if window.number not in self.scored]:
            yield from self._score(left)

    def _build(self) -> Iterator[FindEvent]:
        """The index of before, or a new one, of which windows are scored as soon as they are there."""
        assert self.source is not None
        plan = (self.options.effort, sorted(self.media_options.items()))
        path = self.options.index or default_index_path(self.source, self.engine.runtime.fingerprint, plan)
        note_use(path)
        try:
            self.index = self._open_complete(path)
        except KeyeError:  # of other weights, or damaged
            if not self.options.overwrite:
                raise
        if self.index is not None:
            return
        medium = Medium("video", self.source, dict(self.media_options))
        events = build_search_index(
            self.engine, medium, path, effort=self.options.effort, scenes=self.options.scenes,
            overwrite=self.options.overwrite, check=self._check,
        )  # fmt: skip
        for event in events:
            if isinstance(event, WindowsReady):
                self.index = event.index
                self._take_time("index")
                yield from self._score(event.numbers)
            else:
                yield event

    def _open_complete(self, path: Path) -> SearchIndex | None:
        """The index at a path if nothing of it is missing."""
        assert self.source is not None
        if not is_segmented(path):
            return None
        index = open_search_index(self.engine.runtime, path)
        is_own = index.head.source["identity"] == identify_source(self.source)
        return index if is_own and index.is_complete and index.suits(self.media_options) else None

    def _score(self, numbers: Sequence[int]) -> Iterator[FindEvent]:
        """Puts the question to windows."""
        assert self.index is not None
        index, question = self.index, presence_question(self.engine.runtime.generation_config, self.event)
        begin, total = time.perf_counter(), len(numbers)
        windows = [(index, number) for number in numbers]
        for done, score in enumerate(score_windows(self.engine, windows, question, check=self._check), 1):
            self.scored[score.number] = score
            self._question_tokens += score.tokens
            if done % 32 == 0 or done == total:
                left = (time.perf_counter() - begin) / done * (total - done)
                yield FindProgress("coarse", done, total, "window", round(left, 1))
        self._take_time("coarse")
        self.spans = self._find_spans({})
        if moments := self.ranking.rank_spans(self.spans, self.names):
            yield MomentsFound(moments)

    def _coarse(self) -> Iterator[FindEvent]:
        """The best spans: the best windows are asked when the event happens."""
        assert self.index is not None
        best = sorted((s for s in self._current() if s.yes >= _ASK_WINDOW), key=lambda score: -score.yes)
        numbers = [score.number for score in best[: self.depth.windows]]
        certain = [self.scored[number].yes > 0 for number in numbers]
        named = dict(zip(numbers, self.asker.ask_windows(self.index, numbers, certain), strict=True))
        self.spans = self._find_spans({number: spans for number, spans in named.items() if spans})
        self._take_time("coarse")
        if moments := self.ranking.rank_spans(self.spans, self.names):
            yield MomentsFound(moments)

    def _current(self) -> list[WindowScore]:
        """Scores of the windows that cover the video best."""
        assert self.index is not None
        return [self.scored[window.number] for window in self.index.windows if window.number in self.scored]

    def _find_spans(self, named: Mapping[int, Sequence[Interval]]) -> list[Span]:
        """The spans by all scores; `named` are the times that the model has named in windows."""
        assert self.index is not None
        scored, index = self._current(), self.index
        yes = score_by_yes(index, scored, named)
        intervals = [(start, end, self.scored[number].yes) for number, spans in named.items() for start, end in spans]
        replies = [(index.all[number].start, index.all[number].end) for number in named]
        tracks: list[FrameScores | None] = [
            yes, score_by_evidence(index, scored), self.spoken.scores,
            *(scorer.score(index, self.event) for scorer in self.options.scorers),
        ]  # fmt: skip
        return find_spans(index.duration, tracks, yes, self.depth.spans, intervals, replies)

    def _close_and_verify(self) -> Iterator[FindEvent]:
        if self.source is None:
            self._note("no_video", "the video of the index was not found")
            return
        frames = min(self._frames(), _FRAMES)
        with LookReader(self.source, self.engine, self.media_options) as reader:
            self.arms = [Arm(span, reader) for span in self.spans]
            left = self.budget - self._question_tokens
            limits = ZoomLimits(frames, self.depth.least, self.depth.most, _WIDTH, int(left * (1 - _VERIFY_SHARE)))
            for _ in look_closely(self.asker, self.arms, limits, self._note_unreadable):
                looked = sum(bool(arm.looks) for arm in self.arms)
                yield FindProgress("close", looked, max(looked, self.depth.least), "place")
                self._set_candidates([c for arm in self.arms for c in arm.candidates])
                yield from self._emit_ranked()
            self._take_time("close")
            yield from self._verify(reader, left)

    def _verify(self, reader: LookReader, budget: int) -> Iterator[FindEvent]:
        """Borders and the second question, for as many candidates as may be returned."""
        ordered = sorted(self.candidates, key=certainty, reverse=True)
        best, others = ordered[: self.options.top], ordered[self.options.top :]
        if not best:
            return
        yield FindProgress("verify", 0, len(best), "place")
        try:
            reserve = min(budget // 2, len(best) * reader.count_tokens(ALONE_FRAMES))  # for the second questions
            best = join_candidates(refine_borders(self.asker, reader, best, budget - reserve, self.depth.rounds))
            assert self.index is not None
            cuts = self.index.cuts if self.options.scenes else []
            snapped = [snap_borders(candidate, cuts, reader.info.fps) for candidate in best]
            best = check_alone(self.asker, reader, [candidate for candidate, _ in snapped], budget)
        except MediaError as error:
            self._note("unreadable", str(error))
        else:
            self._set_candidates([*best, *others], [*(on_cut for _, on_cut in snapped), *[None] * len(others)])
        yield FindProgress("verify", len(best), len(best), "place")
        yield from self._emit_ranked()
        self._take_time("verify")

    # Results

    def _set_candidates(self, candidates: Sequence[Candidate], on_cuts: Sequence[OnCut | None] | None = None) -> None:
        joined = join_candidates(candidates) if on_cuts is None else list(candidates)
        self.candidates, self.on_cuts = joined, list(on_cuts or [None] * len(joined))

    def _ranked(self) -> RankedMoments:
        pairs = list(zip(self.candidates, self.on_cuts, strict=True))
        lines = [self.spoken.line_of(candidate.start, candidate.end) for candidate in self.candidates]
        return self.ranking.rank(pairs, self.names, lines)

    def _emit_ranked(self) -> Iterator[FindEvent]:
        ranked = self._ranked()
        if ranked.moments or ranked.weaker:
            yield MomentsFound((*ranked.moments, *ranked.weaker))

    @property
    def budget(self) -> int:
        """Tokens that may be spent on the question."""
        tokens = 0 if self.index is None else self.index.tokens
        budget = self.options.budget or max(LEAST_BUDGET, int(tokens * self.depth.share))
        return min(budget, self.options.most_tokens or budget)

    @property
    def best_coarse(self) -> float | None:
        """The log-odds of the surest window."""
        known = [score.yes for score in self.scored.values()]
        return max(known, default=None)

    def result(self) -> FindResult:
        """The best so far."""
        ranked = self._ranked()
        moments, weaker = ranked.moments, ranked.weaker
        presence, looked = None, any(arm.looks for arm in self.arms)
        if not looked:  # then what the windows promise is all that is known, and no probability holds
            moments, weaker = self.ranking.rank_spans(self.spans, self.names), ()
        elif self.calibration is not None and not self.is_stopped:
            presence = self.calibration.presence_probability(list(ranked.log_odds), self.best_coarse)
        name = self.name or (self.source.name if self.source is not None else self._index_name())
        return FindResult(
            self.event, name, self.engine.runtime.name, moments, (*weaker, *self._spoken_moments(moments, weaker)),
            presence, self.ranking.threshold, self._coverage(), tuple(self._all_notes()),
            {stage: round(value, 3) for stage, value in self.seconds.items()}, self.is_stopped,
        )  # fmt: skip

    def _index_name(self) -> str:
        return "" if self.index is None else self.index.source_name

    def _spoken_moments(self, *displayed: Sequence[Moment]) -> list[Moment]:
        """Lines that match the event where no moment of the picture is."""
        present = [moment for moments in displayed for moment in moments]
        free = [line for line in self.spoken.strong_lines()
                if all(line.end < moment.start or line.start > moment.end for moment in present)]  # fmt: skip
        free = free[: max(0, self.options.top - len(present))]
        ids = self.names.assign([(line.start + line.end) / 2 for line in free])
        return [
            Moment(name, len(present) + rank, line.start, line.end, None, file=self.name, subtitle=line)
            for rank, (name, line) in enumerate(zip(ids, free, strict=True), 1)
        ]

    def _coverage(self) -> Coverage:
        looks = [look for arm in self.arms for look in arm.looks]
        close = [
            SeenSpan(
                round(look.start, 3), round(look.end, 3), round((look.end - look.start) / len(look.indices), 3), True
            )
            for look in looks
        ]
        index = self.index
        seen = [*(index.seen if index is not None else ()), *close]
        duration = index.duration if index is not None else 0.0
        return Coverage(
            duration, tuple(seen), tuple(index.unseen) if index is not None else (),
            sum(bool(arm.looks) for arm in self.arms),
            (index.frames if index is not None else 0) + sum(len(look.indices) for look in looks),
            index.tokens if index is not None else 0, self._question_tokens + self.asker.tokens,
        )  # fmt: skip

    # Notes

    def _note(self, code: str, text: str, place: str = "file") -> None:
        self.notes.append(FindNote(code, text, place))

    def _note_unreadable(self, arm: Arm, error: MediaError) -> None:
        self._note("unreadable", f"a place at {arm.span.middle:.1f} s could not be looked at: {error}")

    def _note_warnings(self, warnings: Sequence[KeyeWarning]) -> None:
        for text in dict.fromkeys(map(str, warnings)):
            self._note("media", text)

    def _all_notes(self) -> Iterator[FindNote]:
        yield from dict.fromkeys(self.notes)
        faults = self.asker.faults
        for code, what in FAULTS.items():
            if count := faults.count(code):
                yield FindNote(code, f"{count} of the replies {what}, and counted no further", "reply")
        if not (looked := any(arm.looks for arm in self.arms)) and not self.is_stopped:
            yield FindNote("no_look", f"not looked at closely: {self._obstacle()}; moments are what windows "
                           "promise, and whether the event is there is not known", "search")  # fmt: skip
        if self.calibration is None:
            confirmed = "; moments are those that a second question confirmed" if looked else ""
            text = f"no probabilities: {self.engine.runtime.name} has no calibration for them{confirmed}"
            yield FindNote("uncalibrated", text, "model")
        if self.is_stopped:
            yield FindNote("stopped", "the search was ended early; these are the best so far", "search")

    def _obstacle(self) -> str:
        """Why no place was looked at closely."""
        if self.source is None:
            return "only the index is there, and not its video"
        if any(arm.is_unreadable for arm in self.arms):
            return "the places could not be read"
        return f"the budget of {self.budget:,} tokens is too small" if self.arms else "no place stood out"

    def _frames(self) -> int:
        scope = self.engine.runtime.generation_config.scope
        return _FRAMES if scope is None or scope.frames is None else scope.frames

    def _take_time(self, stage: Stage) -> None:
        """Adds what passed since the last call to a stage."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._mark
        self._mark = now


class FindStream(Iterator[FindEvent]):
    """The events of a search; `result` is there once the iteration has ended. `stop` ends it early, from any thread;
    after an exception such as Ctrl-C `best_so_far` is the result that there is."""

    def __init__(self, search: MomentSearch) -> None:
        self.search, self.result = search, None
        self._events = search.run()

    result: FindResult | None

    def __next__(self) -> FindEvent:
        event = next(self._events)
        if isinstance(event, FindResult):
            self.result = event
        return event

    def stop(self) -> None:
        """Ends the search as soon as it can, with the best so far as its result."""
        self.search.stop()

    def close(self) -> None:
        """Ends the search now, without a result."""
        self._events.close()

    def finish(self) -> FindResult:
        """Runs to the end and returns the result."""
        for _ in self:
            pass
        assert self.result is not None
        return self.result

    def best_so_far(self) -> FindResult:
        """The result of a search that was interrupted."""
        self.search.is_stopped = True
        return self.search.result()


def open_find(
    engine: Engine, video: Source, event: str, options: FindOptions, media_options: Mapping[str, Any] | None = None,
    check: Callable[[], None] | None = None, name: str | None = None,
) -> MomentSearch:  # fmt: skip
    """A search of a video, or of a search index of one: then the video is looked at closely if it is still where it
    was."""
    if video.path is None or not is_segmented(video.path):
        if is_index(video):
            raise KeyeError(f"{video.name} is an index of keye index, which is asked as a whole: give the video itself")
        return MomentSearch(engine, video, event, options, dict(media_options or {}), check, name=name)
    index = open_search_index(engine.runtime, video.path)
    wanted = [name for name, value in (media_options or {}).items() if value is not None]
    if wanted and not index.suits(media_options or {}):
        raise KeyeError(f"{video.name} is a search index, which keeps the options that it was made with: give the "
                        f"video itself for {', '.join(wanted)}")  # fmt: skip
    media = dict(index.head.plan["options"])
    return MomentSearch(engine, index.find_source(), event, options, media, check, index, name)
