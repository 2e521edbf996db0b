"""Everything that can be known of sets of data before a run: rows that cannot be learnt from, and media that cannot be
opened, each with its file and line.

All rows are read and converted, and every path is looked up once; media of some rows, or of all, are opened in confined
workers.
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect_right
from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Final, TypeAlias, TypeVar

from keye.chat.messages import Medium
from keye.chat.times import parse_intervals
from keye.config import ProcessorConfig
from keye.config.media import media_options
from keye.data.formats.context import GroundQuestion, Notes, Paths, default_question
from keye.data.mixing import Permutation, derive_key
from keye.data.samples import BadRow, Sample, Skip
from keye.data.sources import DataSet, OpenSet, open_set
from keye.errors import KeyeError, MediaError
from keye.media.decode.image_reader import ImageReader
from keye.media.source.fetch import MAX_IMAGE_BYTES, Source, as_source, fetch_source, untrusted
from keye.media.video import VideoReader

#: Faults that are kept with their reasons; the rest is counted.
MAX_FAULTS: Final = 10_000
#: Images that one worker opens.
_TOGETHER: Final = 64
#: Samples that are in memory at once.
_MOST_SAMPLES: Final = 1024
_INTERVAL: Final = 0.2
#: Rows that are looked at for each that is to have media.
_TRIES: Final = 50
#: Rows with the longest texts, and rows with the most media, that are named.
_MOST_LARGEST: Final = 16
#: Seconds by which an answer may name a time after the end of its video: annotations are rounded.
_SLACK: Final = 1.0

T = TypeVar("T")
#: Of a medium: why it cannot be used; else the seconds of a video, None for a picture.
Outcome: TypeAlias = str | float | None
#: What is checked ("rows", "media"), how many are done, of how many, and the seconds left where they are known.
Progress: TypeAlias = Callable[[str, int, int, float | None], None]


@dataclass(frozen=True)
class DataCheck:
    """What a check has found: `rows` read, of which `left_out` cannot be learnt from, `media_checked` media opened,
    `faults` of both with their places, `more` beyond those that are listed. `notes` are sentences on what was
    tolerated, with the number of rows; `formats` has for each set its kind of file and the rows that are used;
    `largest` are the samples with the longest texts and those with the most media, largest first."""

    rows: int
    left_out: int
    media_checked: int
    faults: tuple[Skip, ...]
    more: int = 0
    notes: Mapping[str, int] = field(default_factory=dict)
    formats: tuple[tuple[str, str, int], ...] = ()
    largest: tuple[Sample, ...] = ()

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
    check = _Check(opened, seed, on_progress)
    if media is None:
        check.read_rows()
        check.open_media(check.used())
    elif not media or any(each.rows.blocks is not None for each in opened):
        check.read_rows()
        check.open_media(check.draw(media))
    else:  # the workers that open media have a core of their own while rows are read
        drawn = check.draw(media)
        with ThreadPoolExecutor(1) as pool:
            opening = pool.submit(check.open_media, drawn)
            check.read_rows()
            opening.result()
    faults = sorted(set(check.faults), key=lambda skip: (skip.place.file, skip.place.line))
    notes = sum((each.context.notes.counts for each in opened), start=Counter[str]())
    formats = tuple((str(each.dataset.path), each.rows.kind, each.count) for each in opened)
    more = max(0, len(faults) - MAX_FAULTS)
    return DataCheck(
        check.rows, check.left_out, check.media_checked, tuple(faults[:MAX_FAULTS]), more, dict(notes), formats,
        check.read_largest(),
    )  # fmt: skip


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
    """Rows are named by the number of their set and their own."""

    def __init__(self, sets: Sequence[OpenSet], seed: int, on_progress: Progress | None) -> None:
        self.sets, self.seed, self._on_progress = sets, seed, on_progress
        self.indices = [opened.indices(seed, number) for number, opened in enumerate(sets)]
        self.rows = self.left_out = self.media_checked = 0
        self.faults: list[Skip] = []
        #: (characters, set, row) and (media, set, row), each a heap.
        self._longest: list[tuple[int, int, int]] = []
        self._fullest: list[tuple[int, int, int]] = []
        self._reading = True

    def used(self) -> list[tuple[int, int]]:
        """All rows of all sets."""
        return [(number, index) for number, indices in enumerate(self.indices) for index in indices]

    def draw(self, count: int) -> list[tuple[int, int]]:
        """At most `count` rows with media, drawn by the seed from all that are used, in the order of their files."""
        starts = [0, *accumulate(map(len, self.indices))]
        order, sets = Permutation(starts[-1], derive_key(self.seed, "media")), self._copies(opens=False)
        drawn: list[tuple[int, int]] = []
        begin, end = 0, count
        while len(drawn) < count and begin < min(_TRIES * count, order.count):
            for place in sorted(order[place] for place in range(begin, min(end, order.count))):
                number = bisect_right(starts, place) - 1
                index = self.indices[number][place - starts[number]]
                with suppress(BadRow):
                    if sets[number].sample(index).media:
                        drawn.append((number, index))
            begin, end = end, end * 2
        return sorted(drawn[:count])

    def read_rows(self) -> None:
        """Converts all rows."""
        clock = _Clock("rows", sum(map(len, self.indices)), self._on_progress)
        for number, (opened, indices) in enumerate(zip(self.sets, self.indices, strict=True)):
            for index in indices:
                try:
                    sample = opened.sample(index)
                except BadRow as error:
                    self.faults.append(Skip(opened.rows.place(index), str(error)))
                    self.left_out += 1
                else:
                    _keep_largest(self._longest, (_count_characters(sample), number, index))
                    _keep_largest(self._fullest, (len(sample.media), number, index))
                self.rows += 1
                clock.report(self.rows)
        self._reading = False

    def read_largest(self) -> tuple[Sample, ...]:
        """The samples with the longest texts and with the most media, once all rows are read."""
        sets = self._copies(opens=False)
        both = zip(*(sorted(heap, reverse=True) for heap in (self._longest, self._fullest)), strict=True)
        places = dict.fromkeys((number, index) for pair in both for _, number, index in pair)
        return tuple(sets[number].sample(index) for number, index in places)

    def open_media(self, rows: Sequence[tuple[int, int]]) -> None:
        """Opens the media of some rows, each medium with the same options once."""
        clock = _Clock("media", len(rows), lambda *report: self._emit(*report))
        known, done = dict[object, Outcome](), 0
        with ThreadPoolExecutor(2) as pool:
            for count, samples in self._read_batches(rows, known):
                images = {_key(image): image for sample in samples for image in _images(sample)}
                videos = {_key(video): video for sample in samples for video in _videos(sample)}
                images, videos = _without(images, known), _without(videos, known)
                pictures = pool.submit(_open_images, images)
                outcomes = dict(zip(videos, pool.map(_open_video, videos.values()), strict=True)) | pictures.result()
                # Media in memory are named by no later row.
                known.update((key, outcome) for key, outcome in outcomes.items() if isinstance(key, str))
                self.media_checked += len(outcomes)
                for sample in samples:
                    reasons = _find_faults(sample, ChainMap(outcomes, known))
                    self.faults += [Skip(sample.place, reason) for reason in reasons]
                done += count
                clock.report(done)

    def _read_batches(
        self, rows: Sequence[tuple[int, int]], known: Mapping[object, Outcome]
    ) -> Iterator[tuple[int, list[Sample]]]:
        """Numbers of rows and their samples with media, so many as have a batch of media that are not known. Pictures
        are opened where their sizes are needed."""
        sets = self._copies(opens=True)
        samples, count, unknown = list[Sample](), 0, set[object]()
        for number, index in rows:
            count += 1
            try:
                sample = sets[number].sample(index)
            except BadRow as error:
                self.faults.append(Skip(sets[number].rows.place(index), str(error)))
                continue
            samples.append(sample)
            unknown.update(key for key in map(_key, (*_images(sample), *_videos(sample))) if key not in known)
            if len(unknown) >= _TOGETHER or len(samples) >= _MOST_SAMPLES:
                yield count, samples
                samples, count, unknown = [], 0, set()
        if count:
            yield count, samples

    def _copies(self, *, opens: bool) -> list[OpenSet]:
        """The sets with notes of their own: those of rows that are read again are not counted."""
        return [
            OpenSet(opened.dataset, opened.rows, replace(opened.context, opens=opens, notes=Notes()))
            for opened in self.sets
        ]

    def _emit(self, what: str, done: int, total: int, left: float | None) -> None:
        """Progress of media, once all rows are read."""
        if self._on_progress is not None and not self._reading:
            self._on_progress(what, done, total, left)


def _keep_largest(heap: list[tuple[int, int, int]], entry: tuple[int, int, int]) -> None:
    if len(heap) < _MOST_LARGEST:
        heapq.heappush(heap, entry)
    elif entry > heap[0]:
        heapq.heapreplace(heap, entry)


def _count_characters(sample: Sample) -> int:
    messages = (*sample.messages, *sample.rejected)
    return sum(len(part) for message in messages for part in message.parts if isinstance(part, str))


def _key(medium: object) -> object:
    """What tells a medium and its options from others: a text for a file, else a number."""
    source = medium.source if isinstance(medium, Medium) else medium
    if not isinstance(source, str):
        return id(source)
    return repr((source, medium.options)) if isinstance(medium, Medium) else source


def _without(media: Mapping[object, T], outcomes: Mapping[object, Outcome]) -> dict[object, T]:
    return {key: medium for key, medium in media.items() if key not in outcomes}


def _images(sample: Sample) -> Iterator[object]:
    """The pictures of a sample, those in lists of pictures too."""
    for medium in sample.media:
        if isinstance(medium.source, list | tuple):
            yield from medium.source
        elif medium.kind == "image":
            yield medium.source


def _videos(sample: Sample) -> Iterator[Medium]:
    for medium in sample.media:
        if medium.kind == "video" and not isinstance(medium.source, list | tuple):
            yield medium


def _find_faults(sample: Sample, outcomes: Mapping[object, Outcome]) -> Iterator[str]:
    """What is wrong with the media of a sample, and with an answer that names times of one."""
    for medium in (*_images(sample), *_videos(sample)):
        outcome = outcomes[_key(medium)]
        if isinstance(outcome, str):
            yield outcome
        elif outcome is not None and sample.task == "ground":
            answer = "".join(part for part in sample.messages[-1].parts if isinstance(part, str))
            end = max((end for _, end in parse_intervals(answer) or ()), default=0.0)
            if end > outcome + _SLACK:
                yield f"the answer names {end:g} s, and the video ends at {outcome:.1f} s"


def _open_images(images: Mapping[object, object]) -> dict[object, Outcome]:
    """Decodes pictures in as few workers as possible: a worker that ends takes its picture with it."""
    outcomes: dict[object, Outcome] = {}
    ready: list[tuple[object, Source]] = []
    for key, value in images.items():
        try:
            source = value if isinstance(value, Source) else fetch_source(str(value), max_bytes=MAX_IMAGE_BYTES)
            ready.append((key, untrusted(source)))
        except KeyeError as error:
            outcomes[key] = str(error)
    while ready:
        with ImageReader([source for _, source in ready]) as reader:
            for index, (key, _) in enumerate(ready):
                try:
                    reader.picture(index)
                    outcomes[key] = None
                except MediaError as error:
                    outcomes[key] = str(error)
                    break  # what is wrong with one picture ends the worker
            ready = ready[index + 1 :]
    return outcomes


def _open_video(medium: Medium) -> Outcome:
    """Why a video cannot be used with its options, else its seconds."""
    try:
        options = media_options("video", medium.options)
        with VideoReader(untrusted(as_source(medium.source)), track=options.track) as reader:
            reader.plan(ProcessorConfig(), options)
            return reader.info.duration
    except KeyeError as error:
        return str(error)
