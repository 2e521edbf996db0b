"""Everything that can be known of sets of data before a run: rows that cannot be learnt from, and media that cannot be
opened, each with its file and line.

All rows are read and converted, and every path is looked up once; media of some rows, or of all, are opened in confined
workers.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from keye.chat.messages import Medium
from keye.chat.times import parse_intervals
from keye.config import ProcessorConfig
from keye.config.media import media_options
from keye.data.formats.context import GroundQuestion, Paths, default_question
from keye.data.mixing import derive_key, scramble
from keye.data.samples import BadRow, Place, Sample, Skip
from keye.data.sources import DataSet, OpenSet, open_set
from keye.errors import KeyeError, MediaError
from keye.media.decode.image_reader import ImageReader
from keye.media.source.fetch import MAX_IMAGE_BYTES, Source, as_source, fetch_source, untrusted
from keye.media.video import VideoReader

#: Faults that are kept with their reasons; the rest is counted.
MAX_FAULTS: Final = 10_000
#: Images that one worker opens.
_TOGETHER: Final = 64
_INTERVAL: Final = 0.2
#: Seconds by which an answer may name a time after the end of its video: annotations are rounded.
_SLACK: Final = 1.0

#: What is checked ("rows", "media"), how many are done, of how many, and the seconds left where they are known.
Progress: TypeAlias = Callable[[str, int, int, float | None], None]


@dataclass(frozen=True)
class DataCheck:
    """What a check has found: `rows` read, `media_checked` media opened, `faults` with their places, `more` beyond
    those that are listed. `notes` are sentences on what was tolerated, with the number of rows; `formats` has for each
    set its kind of file and the rows that are used."""

    rows: int
    media_checked: int
    faults: tuple[Skip, ...]
    more: int = 0
    notes: Mapping[str, int] = field(default_factory=dict)
    formats: tuple[tuple[str, str, int], ...] = ()

    @property
    def bad_rows(self) -> int:
        """Rows with a fault, of those listed and beyond."""
        return len({skip.place for skip in self.faults}) + self.more


def check_sets(
    sets: Sequence[DataSet],
    *,
    seed: int,
    media: int | None = 200,
    on_progress: Progress | None = None,
    ground_question: GroundQuestion = default_question,
) -> DataCheck:
    """Reads all rows that a run with `seed` uses, and opens the media of `media` rows of them (None: all).

    Raises `KeyeError` for sets that cannot be opened at all.
    """
    paths = Paths(remember=True)
    opened = [open_set(dataset, ground_question=ground_question, paths=paths, opens=False) for dataset in sets]
    check = _Check(seed, media, on_progress)
    for number, opened_set in enumerate(opened):
        check.read_rows(number, opened_set)
    check.open_media(opened)
    notes = sum((each.context.notes.counts for each in opened), start=Counter[str]())
    formats = tuple((str(each.dataset.path), each.rows.kind, each.count) for each in opened)
    faults = tuple(sorted(check.faults, key=lambda skip: (skip.place.file, skip.place.line)))
    return DataCheck(check.rows, check.media_checked, faults, check.more, dict(notes), formats)


class _Clock:
    """Reports progress now and then."""

    def __init__(self, what: str, total: int, on_progress: Progress | None) -> None:
        self._what, self._total, self._emit = what, total, on_progress
        self._begin = self._last = time.monotonic()

    def report(self, done: int) -> None:
        """Called after every item."""
        now = time.monotonic()
        if self._emit is None or (now - self._last < _INTERVAL and done < self._total):
            return
        self._last = now
        left = (now - self._begin) / done * (self._total - done) if done else None
        self._emit(self._what, done, self._total, left)


class _Check:
    def __init__(self, seed: int, media: int | None, on_progress: Progress | None) -> None:
        self.seed, self._media, self._on_progress = seed, media, on_progress
        self.rows = self.media_checked = self.more = 0
        self.faults: list[Skip] = []
        #: Rows with media, those with the least hash first out: (-hash, set, row).
        self._drawn: list[tuple[int, int, int]] = []

    def read_rows(self, number: int, opened: OpenSet) -> None:
        """Converts all rows of a set, and draws those whose media will be opened."""
        key, indices = derive_key(self.seed, "media", number), opened.indices(self.seed, number)
        clock = _Clock("rows", len(indices), self._on_progress)
        for done, index in enumerate(indices, 1):
            try:
                sample = opened.sample(index)
            except BadRow as error:
                self.add(opened.rows.place(index), str(error))
            else:
                if self._media != 0 and sample.media:
                    self._draw((-scramble(key ^ index), number, index))
            self.rows += 1
            clock.report(done)

    def _draw(self, row: tuple[int, int, int]) -> None:
        if self._media is None or len(self._drawn) < self._media:
            heapq.heappush(self._drawn, row)
        else:
            heapq.heappushpop(self._drawn, row)

    def add(self, place: Place, reason: str) -> None:
        """Notes a fault."""
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(Skip(place, reason))
        else:
            self.more += 1

    def open_media(self, sets: Sequence[OpenSet]) -> None:
        """Opens the media of the drawn rows, each medium once."""
        rows = sorted((number, index) for _, number, index in self._drawn)
        clock = _Clock("media", len(rows), self._on_progress)
        done = 0
        with ThreadPoolExecutor(2) as pool:
            for batch in (rows[begin : begin + _TOGETHER] for begin in range(0, len(rows), _TOGETHER)):
                samples = [sample for sample in (self._read(sets[number], index) for number, index in batch) if sample]
                images = [job for sample in samples for job in _images(sample)]
                videos = [job for sample in samples for job in _videos(sample)]
                self.media_checked += len(images) + len(videos)
                for place, fault in _open_images(images):
                    self.add(place, fault)
                for (sample, _), fault_or_none in zip(videos, pool.map(_open_video, videos), strict=True):
                    if fault_or_none is not None:
                        self.add(sample.place, fault_or_none)
                done += len(batch)
                clock.report(done)

    def _read(self, opened: OpenSet, index: int) -> Sample | None:
        """The sample of a row, its pictures opened where their sizes are needed."""
        try:
            return opened.opening().sample(index)
        except BadRow as error:
            self.add(opened.rows.place(index), str(error))
            return None


def _images(sample: Sample) -> Iterator[tuple[Sample, object]]:
    """The pictures of a sample, those in lists of pictures too."""
    for medium in sample.media:
        sources = medium.source if isinstance(medium.source, list | tuple) else [medium.source]
        if medium.kind == "image" or isinstance(medium.source, list | tuple):
            yield from ((sample, source) for source in sources)


def _videos(sample: Sample) -> Iterator[tuple[Sample, Medium]]:
    for medium in sample.media:
        if medium.kind == "video" and not isinstance(medium.source, list | tuple):
            yield sample, medium


def _open_images(jobs: Sequence[tuple[Sample, object]]) -> Iterator[tuple[Place, str]]:
    """The faults of pictures, decoded in as few workers as possible: one that ends takes its picture with it."""
    ready: list[tuple[Place, Source]] = []
    for sample, value in jobs:
        try:
            source = value if isinstance(value, Source) else fetch_source(value, max_bytes=MAX_IMAGE_BYTES)  # type: ignore[arg-type]
            ready.append((sample.place, untrusted(source)))
        except KeyeError as error:
            yield sample.place, str(error)
    while ready:
        with ImageReader([source for _, source in ready]) as reader:
            for index, (place, _) in enumerate(ready):
                try:
                    reader.picture(index)
                except MediaError as error:
                    yield place, str(error)
                    if reader.worker.process.poll() is not None:
                        ready = ready[index + 1 :]
                        break
            else:
                return


def _open_video(job: tuple[Sample, Medium]) -> str | None:
    """Why a video cannot be used as its row says; None where it can."""
    sample, medium = job
    try:
        options = media_options("video", medium.options)
        with VideoReader(untrusted(as_source(medium.source)), track=options.track) as reader:
            reader.plan(ProcessorConfig(), options)
            duration = reader.info.duration
    except KeyeError as error:
        return str(error)
    if sample.task == "ground":
        answer = "".join(part for part in sample.messages[-1].parts if isinstance(part, str))
        ends = [end for _, end in parse_intervals(answer) or ()]
        if ends and max(ends) > duration + _SLACK:
            return f"the answer names {max(ends):g} s, and the video ends at {duration:.1f} s"
    return None
