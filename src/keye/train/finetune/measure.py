"""What samples become: their tokens, the frames of their videos, the times in their prompts. Nothing is trained, and of
videos no more is decoded than laying them out takes."""

from __future__ import annotations

import re
import time
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any, Final

import numpy as np

from keye.chat.messages import Medium
from keye.chat.tokenizer import Tokenizer
from keye.data.samples import Sample, Skip
from keye.errors import KeyeError, MediaError
from keye.media.packet_times import PacketTimes, read_packet_times
from keye.media.processor import MediaItem
from keye.media.source.fetch import Source, as_source, parse_list
from keye.releases import Release
from keye.train.layout import LaidOut, Layout, LengthError
from keye.train.tree import IGNORE, Path

#: Samples whose text is shown, with what of it is learnt.
PRINTED: Final = 3
#: Samples that are laid out at most, and seconds after which no further one is begun.
MOST_SAMPLES: Final = 200
MOST_SECONDS: Final = 20.0
#: Faults of times that are reported one by one.
_MOST_FAULTS: Final = 20
#: Different notes that are reported.
_MOST_NOTES: Final = 20
#: Seconds by which a time of the container may be off its number in the prompt's plan.
_SAME: Final = 1e-3
#: Tokens before a frame in which its label is looked for.
_LABEL_TOKENS: Final = 24
_NUMBER: Final = re.compile(r"\d+(?:\.(\d+))?")


@dataclass(frozen=True)
class Spread:
    """How numbers are distributed."""

    least: float
    median: float
    p95: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Of at least one number; None without any."""
        if not values:
            return None
        median, p95 = np.percentile(values, (50, 95))
        return cls(float(min(values)), float(median), float(p95), float(max(values)), len(values))


@dataclass(frozen=True)
class Run:
    """A piece of a sample's text: `text` is decoded, `learnt` whether its tokens are."""

    text: str
    learnt: bool


@dataclass(frozen=True)
class SampleText:
    """What the model reads of a sample, and what of it it learns."""

    place: str
    runs: tuple[Run, ...]


@dataclass
class TimeCheck:
    """Times in prompts against those in the containers: `compared` labels of frames, `different` of them, some of them
    in words; `without` says of how many videos nothing could be compared."""

    compared: int = 0
    different: int = 0
    faults: list[str] = field(default_factory=list)
    without: int = 0

    def add_fault(self, words: str) -> None:
        self.different += 1
        if len(self.faults) < _MOST_FAULTS:
            self.faults.append(words)


@dataclass(frozen=True)
class Measured:
    """What was seen of the `samples` that were laid out. `too_long` are those beyond the longest pack, `skipped` those
    that cannot be laid out; `lengths` are tokens of the others, in the order of the stream. `notes` are sentences on
    options of media that were not honoured, with the number of samples."""

    samples: int
    lengths: tuple[int, ...]
    visual_total: int
    tokens: Spread | None
    learnt: Spread | None
    visual: Spread | None
    frames: Spread | None
    spacing: Spread | None
    too_long: tuple[str, ...]
    skipped: tuple[Skip, ...]
    texts: tuple[SampleText, ...]
    times: TimeCheck
    notes: dict[str, int]

    @property
    def visual_share(self) -> float:
        """Visual tokens among all."""
        return self.visual_total / max(1, sum(self.lengths))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = asdict(self)
        data["skipped"] = [str(skip) for skip in self.skipped]
        data.pop("lengths")
        return data


def measure(
    samples: Iterable[Sample], layout: Layout, *, most: int = MOST_SAMPLES, seconds: float = MOST_SECONDS,
    on_progress: Callable[[int, float], object] | None = None,
) -> Measured:  # fmt: skip
    """Lays out samples, at most `most` of them and for about so many `seconds`. `on_progress` gets how many are laid
    out, and the seconds that `most` of them take from now on."""
    begin = time.monotonic()
    sizes, examples, notes = list[tuple[int, int, int]](), _Examples(), Counter[str]()
    too_long, skipped, count = list[str](), list[Skip](), 0
    times, frames, spacing = TimeCheck(), array("d"), array("d")
    for sample in samples:
        count += 1
        try:
            laid = layout.lay_out(sample)
        except LengthError as error:
            too_long.append(str(error))
        except KeyeError as error:
            skipped.append(Skip(sample.place, str(error).removeprefix(f"{sample.place}: ")))
        else:
            sizes.append((laid.length, laid.learnt, laid.visual_tokens))
            notes.update(set(laid.notes))
            examples.add(laid)
            path = max(laid.paths, key=lambda path: len(path.media))
            check_times(path, sample, layout, times)
            videos = [item for item in path.media if item.kind == "video"]
            frames.extend(item.frame_count for item in videos)
            spacing.extend(b - a for item in videos for a, b in pairwise(item.timestamps))
        spent = time.monotonic() - begin
        if on_progress is not None:
            on_progress(count, spent / count * (most - count))
        if count >= most or spent > seconds:
            break
    lengths, learnt, visual = ([size[column] for size in sizes] for column in range(3))
    texts = tuple(show_sample(sample, layout.builder.tokenizer) for sample in examples.choose())
    return Measured(
        count, tuple(lengths), sum(visual), Spread.of(lengths), Spread.of(learnt), Spread.of(visual), Spread.of(frames),
        Spread.of(spacing), tuple(too_long), tuple(skipped), texts, times, dict(notes.most_common(_MOST_NOTES)),
    )  # fmt: skip


class _Examples:
    """A few samples, of different kinds of media as far as there are any; no others are kept."""

    def __init__(self) -> None:
        self._first: dict[frozenset[str], tuple[int, LaidOut]] = {}
        self._others: list[tuple[int, LaidOut]] = []
        self._count = 0

    def add(self, sample: LaidOut) -> None:
        """Takes the next sample into account."""
        kinds = frozenset(medium.kind for medium in sample.sample.media)
        if kinds not in self._first:
            self._first[kinds] = (self._count, sample)
        elif len(self._others) < PRINTED:
            self._others.append((self._count, sample))
        self._count += 1

    def choose(self) -> list[LaidOut]:
        """At most `PRINTED`, in their order."""
        chosen = [*self._first.values(), *self._others][:PRINTED]
        return [sample for _, sample in sorted(chosen, key=lambda entry: entry[0])]


def show_sample(laid_out: LaidOut, tokenizer: Tokenizer) -> SampleText:
    """The text of a sample's longest path, decoded from its token ids; visual tokens are counted."""
    path = max(laid_out.paths, key=lambda path: len(path.token_ids))
    learnt = np.concatenate([[False], path.labels[:-1] != IGNORE])
    changes = np.flatnonzero(np.diff(path.is_visual) | np.diff(learnt)) + 1
    runs = list[Run]()
    for start, stop in pairwise([0, *changes.tolist(), len(learnt)]):
        ids = path.token_ids[start:stop].tolist()
        text = f"[{stop - start} visual tokens]" if path.is_visual[start] else tokenizer.decode(ids, skip_special=False)
        runs.append(Run(text, bool(learnt[start])))
    return SampleText(str(laid_out.sample.place), tuple(runs))


def check_times(path: Path, sample: Sample, layout: Layout, check: TimeCheck) -> None:
    """Compares the times in the tokens of a prompt with the times of the packets in the files, which are read
    independently of how keye samples."""
    release = layout.builder.config.release
    for medium, item, span in zip(sample.media, path.media, path.spans, strict=False):
        if item.kind != "video" or not item.timestamps:
            continue
        labels = list(_labels(path, span, layout.builder.tokenizer))
        times = _packet_times(medium) if len(labels) == len(item.timestamps) else None
        if times is None or not times.steady:
            check.without += 1
        else:
            _compare(labels, item, times, release, f"{sample.place}: {name_medium(medium)}", check)


def name_medium(medium: Medium) -> str:
    """What a medium is called in sentences: its path, or what it is."""
    source = medium.source
    return (
        source.name
        if isinstance(source, Source)
        else str(source)
        if isinstance(source, str | FilePath)
        else (f"{medium.kind} in memory")
    )


def _packet_times(medium: Medium) -> PacketTimes | None:
    """The times of a video file; None of frames in memory, lists of pictures and what is not a video container."""
    if not isinstance(medium.source, str | FilePath | Source) or parse_list(medium.source) is not None:
        return None
    try:
        return read_packet_times(as_source(medium.source), medium.options.get("track"))
    except MediaError:
        return None


def _labels(path: Path, span: tuple[int, int], tokenizer: Tokenizer) -> Iterator[str]:
    """The number in the text before each frame of a video whose visual tokens lie in `span`."""
    start, stop = span
    visual = path.is_visual[start:stop]
    edges = np.flatnonzero(np.diff(visual.astype(np.int8), prepend=0) == 1) + start
    for edge in edges.tolist():
        first = max(0, edge - _LABEL_TOKENS)
        before = np.flatnonzero(path.is_visual[first:edge])
        first += int(before[-1]) + 1 if len(before) else 0
        numbers = list(_NUMBER.finditer(tokenizer.decode(path.token_ids[first:edge].tolist(), skip_special=False)))
        if numbers:
            yield numbers[-1][0]


def _compare(
    labels: Sequence[str], item: MediaItem, times: PacketTimes, release: Release, name: str, check: TimeCheck
) -> None:
    """Each frame must be one of the container's, and its label that frame's time, rounded as the label is."""
    for label, planned in zip(labels, item.timestamps, strict=True):
        check.compared += 1
        place = bisect_left(times.seconds, planned)
        near = times.seconds[max(0, place - 1) : place + 1]
        actual = min(near, key=lambda second: abs(second - planned), default=None)
        if actual is None or abs(actual - planned) > _SAME:
            check.add_fault(f"{name} has no frame at {planned:.3f} s, which is sampled")
            continue
        digits = len(label.partition(".")[2])
        expected = {f"{release.label_seconds(second):.{digits}f}" for second in (actual, planned)}
        if label not in expected:
            check.add_fault(f"{name} shows at {actual:.3f} s what the prompt says is at {label} s")
