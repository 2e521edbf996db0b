"""The search for an event in all videos of a library.

Every window of every index is asked in an order that visits all videos early, so that the best so far means something
after a second or two; then the videos with the best windows are looked at closely, as `keye find` does with one video.
Where vectors of an image-text embedder are stored, they rank the videos instead, and only the best are asked.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from keye.errors import KeyeError
from keye.library.catalog import Catalog, Entry
from keye.library.vectors import rank_frames
from keye.media.source.fetch import as_source
from keye.moments import FindNote, FindProgress, FindResult, Moment, MomentsFound
from keye.sessions.search.embedders import Embedder
from keye.sessions.search.find import MomentSearch
from keye.sessions.search.options import FindOptions
from keye.sessions.search.questions import check_event, presence_question
from keye.sessions.search.scoring import WindowScore, score_windows
from keye.sessions.search.search_index import SearchIndex, open_search_index

if TYPE_CHECKING:
    from keye.api import Keye

#: Videos that are looked at closely, and those that vectors choose to be asked.
CLOSE_VIDEOS: Final = 6
EMBEDDED_VIDEOS: Final = 8
#: Log-odds of yes of a window below which a video is not looked at closely.
LEAST_YES: Final = -3.0
#: Seconds between two events of the best so far.
_EMIT_SECONDS: Final = 1.0
#: Windows are asked in so many rounds, each spread over all videos.
_ROUNDS: Final = 8


@dataclass(frozen=True)
class LibraryCoverage:
    """What was searched: seconds and numbers of all videos, of those that are indexed, windows that were asked, and
    videos looked at closely. `missing` are the videos that are not, or only in part, indexed, with the reason."""

    videos: int
    searched_videos: int
    duration: float
    searched: float
    windows: int
    scored_windows: int
    close_videos: int
    query_tokens: int
    missing: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        missing = [{"file": file, "reason": reason} for file, reason in self.missing]
        return {**asdict(self), "missing": missing}


@dataclass(frozen=True)
class LibraryResult:
    """The outcome of a search in a library. Moments are ranked over all videos, each names its `file`."""

    query: str
    model: str
    moments: tuple[Moment, ...]
    weaker: tuple[Moment, ...]
    threshold: float
    coverage: LibraryCoverage
    notes: tuple[FindNote, ...]
    seconds: float
    stopped: bool = False

    @property
    def is_found(self) -> bool:
        """Whether there is a moment above the threshold."""
        return bool(self.moments)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "query": self.query, "model": self.model, "found": self.is_found,
            "moments": [moment.to_dict() for moment in self.moments],
            "weaker": [moment.to_dict() for moment in self.weaker], "threshold": self.threshold,
            "coverage": self.coverage.to_dict(), "notes": [asdict(note) for note in self.notes],
            "seconds": self.seconds, "stopped": self.stopped,
        }  # fmt: skip


LibraryEvent = FindProgress | MomentsFound | LibraryResult


@dataclass
class _Video:
    """A video that can be searched."""

    entry: Entry
    index: SearchIndex
    numbers: list[int]
    scores: dict[int, WindowScore] = field(default_factory=dict)

    @property
    def best(self) -> float:
        return max((score.yes for score in self.scores.values()), default=-np.inf)


class LibrarySearch:
    """A search while it goes on; `run` emits its events, the last one is the result."""

    def __init__(
        self, model: Keye, catalog: Catalog, event: str, *, top: int = 12, threshold: float | None = None,
        budget: int | None = None, seconds: float | None = None, embedder: Embedder | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.catalog, self.event, self.embedder = model, catalog, check_event(event), embedder
        options = FindOptions(top=top, threshold=threshold, budget=budget)
        self.options = replace(options, budget=None, most_tokens=budget)
        if seconds is not None and not seconds > 0:
            raise KeyeError(f"seconds is {seconds}; it must be above 0")
        self.limit, self.check = seconds, check
        self.begin = time.perf_counter()
        self.videos: list[_Video] = []
        self.missing: list[tuple[str, str]] = []
        self.notes: list[FindNote] = []
        self.results: list[FindResult] = []
        self.tokens = 0
        self.chosen: set[int] | None = None
        self._stop = self._is_cut_short = False

    def stop(self) -> None:
        """Ends the search as soon as it can; the last event is the best so far. From any thread."""
        self._stop = True

    @property
    def is_over(self) -> bool:
        """Whether it was stopped, or its time or its tokens are spent."""
        if self.check is not None:
            self.check()
        return self._stop or self._seconds_left() <= 0 or self._tokens_left() <= 0

    def _seconds_left(self) -> float:
        return np.inf if self.limit is None else self.limit - (time.perf_counter() - self.begin)

    def _tokens_left(self) -> float:
        return np.inf if self.options.most_tokens is None else self.options.most_tokens - self.tokens

    def run(self) -> Generator[LibraryEvent]:
        """The events of the search."""
        if self.embedder is not None:
            yield from self._rank_by_vectors()
        self._open()
        try:
            yield from self._score([v for v in self.videos if self.chosen is None or v.entry.id in self.chosen])
            yield from self._look_closely()
        finally:
            for video in self.videos:
                video.index.release()
        yield self.result()

    def _open(self) -> None:
        for entry in self.catalog.entries():
            if entry.state == "failed":
                self.missing.append((str(entry.path), entry.reason or "it could not be read"))
                continue
            if entry.state != "indexed":
                until = (
                    f"it is searchable up to {entry.searchable:.0f} s" if entry.searchable else "it is not indexed yet"
                )
                self.missing.append((str(entry.path), until))
            if not entry.searchable:
                continue
            try:
                index = open_search_index(self.model.runtime, self.catalog.index_path(entry))
            except KeyeError as error:
                self.missing.append((str(entry.path), str(error)))
                continue
            self.videos.append(_Video(entry, index, [window.number for window in index.windows]))
        if not self.videos:
            why = f" ({self.missing[0][0]}: {self.missing[0][1]})" if self.missing else ""
            raise KeyeError(f"nothing in the library can be searched{why}; keye library add FOLDER indexes videos")

    def _rank_by_vectors(self) -> Iterator[LibraryEvent]:
        """The best frames by stored vectors, as moments of no certainty; chooses the videos that are asked."""
        assert self.embedder is not None
        entries = [entry for entry in self.catalog.entries("indexed", "indexing") if entry.searchable]
        paths = [self.catalog.index_path(entry) for entry in entries]
        matches, without = rank_frames(paths, self.embedder, self.event, 4 * self.options.top)
        if without:
            self._note("no_vectors", f"{len(without)} of {len(entries)} videos have no vectors of {self.embedder.name} "
                       "and are asked window by window")  # fmt: skip
        videos = list(dict.fromkeys(match.number for match in matches))[:EMBEDDED_VIDEOS]
        self.chosen = {entries[number].id for number in (*videos, *without)}
        yield MomentsFound(tuple(
            Moment(f"v{entry.id}-{match.time:.1f}", rank, max(0.0, match.time - 1), match.time + 1, None,
                   file=str(entry.path))
            for rank, match in enumerate(matches[: self.options.top], 1) for entry in [entries[match.number]]
        ))  # fmt: skip

    def _score(self, videos: Sequence[_Video]) -> Iterator[LibraryEvent]:
        by_index = {id(video.index): video for video in videos}
        windows = [
            (video.index, number)
            for turn in range(_ROUNDS) for video in videos for number in video.numbers[turn::_ROUNDS]
        ]  # fmt: skip
        question = presence_question(self.model.runtime.generation_config, self.event)
        begun = time.perf_counter()
        last = begun - _EMIT_SECONDS  # so that the first batch is shown at once
        scores = score_windows(self.model.engine, windows, question, check=self.check)
        for done, score in enumerate(scores, 1):
            by_index[id(score.index)].scores[score.number] = score
            self.tokens += score.tokens
            now = time.perf_counter()
            if now - last >= _EMIT_SECONDS or done == len(windows):
                last = now
                left = (now - begun) / done * (len(windows) - done)
                yield FindProgress("coarse", done, len(windows), "window", round(left, 1))
                yield MomentsFound(self._best_windows())
            if self.is_over:
                self._is_cut_short |= done < len(windows)
                return

    def _best_windows(self) -> tuple[Moment, ...]:
        """The best windows so far, as moments that were not looked at closely yet."""
        scored = ((score, video) for video in self.videos for score in video.scores.values() if score.yes > 0)
        best = heapq.nlargest(self.options.top, scored, lambda pair: pair[0].yes)
        return tuple(
            Moment(f"w{video.entry.id}-{score.number}", rank, video.index.all[score.number].start,
                   video.index.all[score.number].end, None, file=str(video.entry.path))
            for rank, (score, video) in enumerate(best, 1)
        )  # fmt: skip

    def _look_closely(self) -> Iterator[LibraryEvent]:
        ranked = sorted((v for v in self.videos if v.best >= LEAST_YES), key=lambda v: -v.best)[:CLOSE_VIDEOS]
        for number, video in enumerate(ranked):
            if self.is_over:
                self._is_cut_short = True
                return
            yield FindProgress("close", number, len(ranked), "video")
            yield from self._search(video)
        yield FindProgress("close", len(ranked), len(ranked), "video")

    def _search(self, video: _Video) -> Iterator[LibraryEvent]:
        path = video.entry.path
        try:
            source = as_source(str(path)) if path.exists() else None
            search = MomentSearch(
                self.model.engine, source, self.event, self._options_left(), check=self._check_close,
                index=video.index, name=str(path),
            )  # fmt: skip
            search.scored.update(video.scores)
            for event in search.run():
                if self.is_over:
                    search.stop()
                if isinstance(event, FindResult):
                    self._is_cut_short |= event.stopped
                    self.results.append(event)
                    self.tokens += event.coverage.query_tokens
                    yield MomentsFound(self._ranked()[0] or self._best_windows())
        except KeyeError as error:
            self._note("unreadable", f"{path}: {error}")

    def _options_left(self) -> FindOptions:
        """The options of a search in one video: what is left of time and tokens bounds it."""
        options = self.options
        if self.limit is not None:
            options = replace(options, seconds=max(self._seconds_left(), 1e-3))
        if options.most_tokens is not None:
            options = replace(options, most_tokens=max(options.most_tokens - self.tokens, 1))
        return options

    def _check_close(self) -> None:
        if self.check is not None:
            self.check()

    def _note(self, code: str, text: str) -> None:
        self.notes.append(FindNote(code, text, "library"))

    def _ranked(self) -> tuple[tuple[Moment, ...], tuple[Moment, ...]]:
        def order(moment: Moment) -> tuple[float, int]:
            return -(moment.probability if moment.probability is not None else -1.0), moment.rank

        above = sorted((moment for result in self.results for moment in result.moments), key=order)
        below = sorted((moment for result in self.results for moment in result.weaker), key=order)
        numbers = {str(video.entry.path): video.entry.id for video in self.videos}
        named = [
            replace(moment, rank=rank, id=f"{numbers[moment.file or '']}-{moment.id}")
            for rank, moment in enumerate((*above, *below)[: self.options.top], 1)
        ]
        return tuple(named[: len(above)]), tuple(named[len(above) :])

    def result(self) -> LibraryResult:
        """The best so far."""
        moments, weaker = self._ranked()
        if not self.results:
            weaker = self._best_windows()
        notes = {(note.code, note.text): note for result in self.results for note in result.notes}
        entries = self.catalog.entries()
        first = self.results[0] if self.results else None
        return LibraryResult(
            self.event, self.model.name, moments, weaker,
            first.threshold if first is not None else self.options.threshold or 0.5,
            LibraryCoverage(
                len(entries), len(self.videos), sum(entry.duration or 0.0 for entry in entries),
                sum(video.entry.searchable for video in self.videos),
                sum(len(video.numbers) for video in self.videos), sum(len(video.scores) for video in self.videos),
                len(self.results), self.tokens, tuple(self.missing),
            ),
            (*notes.values(), *self.notes), round(time.perf_counter() - self.begin, 3),
            self._stop or self._is_cut_short,
        )  # fmt: skip
