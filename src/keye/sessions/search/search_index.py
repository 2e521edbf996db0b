"""What is stored of a video for searching it: its windows, computed, in a file that grows while the video is read.

`SearchIndex` is that file open for reading. Its segments (`keye.cache.segments`) are of these kinds:

    head      once, first: the model, the source, how windows were planned, the null question
    windows   cached rows of some windows, with their frames, and what the null question scored on each
    scenes    hard cuts and change scores of a part of the video
    level     a spacing that is complete

Everything in a header is checked before it is used: anyone may have written the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from keye.cache.checksums import damage_error
from keye.cache.fingerprint import Fingerprint
from keye.cache.segments import Segment, map_segment, read_segments
from keye.cache.sequence import KVCache
from keye.cache.slabs import KVStore
from keye.engine.continuations import StoredSequence
from keye.engine.media import VideoIndex
from keye.engine.runtime import Runtime
from keye.errors import KeyeError
from keye.media.processor import Piece, VisualSpan, expand_frames
from keye.media.sampling import SAME_TIME
from keye.media.scenes import Scenes
from keye.models.attention import AttentionMode
from keye.models.keye import visual_mask
from keye.moments import SeenSpan
from keye.ops.kv_blocks import KV_BLOCK
from keye.sessions.search.windows import SearchWindow
from keye.sessions.video_index import check_layout, check_same_model

#: More of anything than this is damage: windows, frames of a window, positions.
_MOST: Final = 1 << 24


@dataclass(frozen=True)
class StoredWindow(SearchWindow):
    """A window in an index. `level` counts from 0, the widest spacing. Its tokens are `tokens` from block `block` on of
    segment `segment`, counted among those with rows; each frame has `frame_tokens` visual tokens. `prior` is the
    log-odds of "yes" under the null question and `null_shares` float32 [frames] the share of its selections on each
    frame; None where nothing was selected."""

    level: int
    segment: int
    block: int
    tokens: int
    frame_tokens: int
    next_position: int
    prior: float | None
    null_shares: NDArray[np.float32] | None = field(repr=False)


@dataclass(frozen=True)
class IndexHead:
    """The first segment, checked. `source` has `name`, `identity`, `size`, `duration`; `plan` says how windows were
    planned: `spacings` by level, `frames` of a window, `overlap`, `height` and `width` of a frame, `options`."""

    model: Fingerprint
    attention: AttentionMode
    source: Mapping[str, Any]
    plan: Mapping[str, Any]
    null_question: str
    keye: str

    @classmethod
    def read(cls, path: Path, about: Mapping[str, Any]) -> IndexHead:
        """The head of a file; `KeyeError` where it is none that keye writes."""
        names = dict.fromkeys(Fingerprint.__dataclass_fields__, str)
        model = _fields(path, about.get("model"), names)
        _fields(path, about, {"attention": str, "null_question": str, "keye": str})
        source = _fields(path, about.get("source"), {"name": str, "identity": str, "size": int, "duration": float})
        plan = _fields(
            path, about.get("plan"),
            {"spacings": list, "frames": int, "overlap": int, "height": int, "width": int, "options": dict},
        )  # fmt: skip
        sound = (
            about["attention"] in get_args(AttentionMode)
            and 0 < source["duration"] < _MOST
            and 0 < len(plan["spacings"]) <= 8
            and all(type(spacing) is float and 0 < spacing < _MOST for spacing in plan["spacings"])
            and 0 <= plan["overlap"] < plan["frames"] < _MOST
        )
        if not sound:
            raise damage_error(path, "its head holds values that keye does not write")
        return cls(
            Fingerprint(**{name: model[name] for name in names}), about["attention"], source, plan,
            about["null_question"], about["keye"],
        )  # fmt: skip


class SearchIndex:
    """A search index open for reading, of the model that made it. `windows` are those of the finest spacing wherever
    they are complete, in the order of time, else those of the wider one; `number` of a window is its place in `all`.

    `extend` reads what was appended since. Damage part while rows are read is an error of what reads them.
    """

    def __init__(self, runtime: Runtime, path: Path, segments: Sequence[Segment]) -> None:
        if not segments or segments[0].kind != "head":
            raise damage_error(path, "it has no head")
        self.runtime, self.path = runtime, path
        self.head = IndexHead.read(path, segments[0].about)
        check_same_model(path, self.head.model, runtime.fingerprint)
        self._version = runtime.model.weights_version
        #: Segments with rows, and the number of the first window of each.
        self._segments: list[Segment] = []
        self._firsts: list[int] = []
        self._sequences: dict[int, list[KVCache]] = {}
        self._store: KVStore | None = None
        self.all: list[StoredWindow] = []
        #: Cuts and change scores of parts of the video, in the order of time.
        self.scenes: list[Scenes] = []
        self.levels_done: set[int] = set()
        self._stop = segments[0].stop
        self.extend(segments[1:])

    @property
    def duration(self) -> float:
        """Seconds of the video."""
        return float(self.head.source["duration"])

    @property
    def source_name(self) -> str:
        return str(self.head.source["name"])

    @property
    def cuts(self) -> list[float]:
        """Seconds at which a new shot begins."""
        return [cut for part in self.scenes for cut in part.cuts]

    @property
    def changes(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Seconds, and how much the picture has changed shortly before each, 0 to 1."""
        if not self.scenes:
            return np.empty(0), np.empty(0)
        times = [part.start + part.step * (1 + np.arange(len(part.scores))) for part in self.scenes]
        return np.concatenate(times), np.concatenate([part.scores.astype(np.float64) for part in self.scenes])

    @property
    def scenes_end(self) -> float:
        """Up to which second cuts and changes are known."""
        return self.scenes[-1].end if self.scenes else 0.0

    @property
    def is_complete(self) -> bool:
        """Whether the finest spacing is complete."""
        return len(self.head.plan["spacings"]) - 1 in self.levels_done

    @property
    def windows(self) -> list[StoredWindow]:
        """The windows that cover the video best, in the order of time."""
        finest, best = -1, list[StoredWindow]()
        for level in sorted({window.level for window in self.all}, reverse=True):
            mine = sorted((window for window in self.all if window.level == level), key=lambda window: window.start)
            if finest < 0:
                best, finest = mine, level
                continue
            covered = _merge([(window.start, window.end) for window in best])
            best += [window for window in mine if not _is_inside(window.start, window.end, covered)]
        return sorted(best, key=lambda window: window.start)

    @property
    def tokens(self) -> int:
        """Tokens stored, all windows together."""
        return sum(window.tokens for window in self.all)

    @property
    def frames(self) -> int:
        """Frames of `windows`; those in two of them count once."""
        return len({time for window in self.windows for time in window.times})

    @property
    def seen(self) -> list[SeenSpan]:
        """The parts of the video that windows cover, with their spacing."""
        spans: list[SeenSpan] = []
        for window in self.windows:
            if spans and spans[-1].spacing == window.spacing and window.start <= spans[-1].end + 1e-6:
                spans[-1] = SeenSpan(spans[-1].start, max(spans[-1].end, window.end), window.spacing)
            else:
                spans.append(SeenSpan(window.start, window.end, window.spacing))
        return spans

    @property
    def unseen(self) -> list[tuple[float, float]]:
        """The parts that no window covers."""
        covered = _merge([(window.start, window.end) for window in self.windows])
        edges = [0.0, *(second for span in covered for second in span), self.duration]
        pairs = [(edges[i], edges[i + 1]) for i in range(0, len(edges), 2)]
        # Nothing is shown before the first frame.
        first = covered[0][0] if covered else 0.0
        return [(a, b) for a, b in pairs if b - a > 1e-3 and not (covered and a == 0.0 and b == first)]

    def extend(self, segments: Sequence[Segment] | None = None) -> list[int]:
        """Takes segments that were appended since; returns the numbers of their windows."""
        new = read_segments(self.path, self._stop) if segments is None else segments
        numbers = []
        for segment in new:
            if segment.kind == "windows":
                windows = list(_read_windows(self, segment, len(self._segments), len(self.all)))
                self._segments.append(segment)
                self._firsts.append(len(self.all))
                self.all += windows
                numbers += [window.number for window in windows]
            elif segment.kind == "scenes":
                self._read_scenes(segment.about)
            elif segment.kind == "level":
                self.levels_done.add(_natural(self.path, segment.about, "level"))
            else:
                raise damage_error(self.path, f"it has a segment of an unknown kind, {segment.kind[:40]!r}")
            self._stop = segment.stop
        return numbers

    def sequence(self, number: int) -> StoredSequence:
        """What is stored of a window."""
        self._check_weights()
        window = self.all[number]
        if window.segment not in self._sequences:
            self._sequences[window.segment] = self._open(window.segment)
        return StoredSequence(self._sequences[window.segment][number - self._firsts[window.segment]],
                              window.next_position)  # fmt: skip

    def past(self, number: int) -> VideoIndex:
        """A window as the beginning of prompts, as an index of a video is one; times in replies are those of its own
        clock."""
        window, tokens = self.all[number], self.tokens_of(number)
        pieces = window_pieces(self.runtime, window)
        plan = {"name": self.source_name, "frames": len(window.times), "timestamps": list(window.labels),
                "duration": self.duration, "visual_tokens": len(window.times) * window.frame_tokens}  # fmt: skip
        length = sum(len(self.runtime.prompts.piece_ids([piece])) for piece in pieces)
        return VideoIndex(
            f"{self.source_name}, {window.start:.1f} s", tokens[0], tokens[1:], window.next_position,
            window.tokens - length, tuple(pieces), window.labels, plan, self.head.attention,
            self.sequence(number).cache,
        )  # fmt: skip

    def tokens_of(self, number: int) -> Tensor:
        """Token ids and positions of a window, int64 [4, T]."""
        window = self.all[number]
        image = self._segments[window.segment].image
        assert image is not None
        first = window.block * KV_BLOCK
        return image.tokens[:, first : first + window.tokens]

    def frame_spans(self, number: int) -> NDArray[np.int64]:
        """First and one past the last position of the visual tokens of each frame of a window, int64 [frames, 2]."""
        window, ids = self.all[number], self.tokens_of(number)[0]
        places = visual_mask(self.runtime.config, ids).nonzero().squeeze(1).numpy()[:: window.frame_tokens]
        return np.stack((places, places + window.frame_tokens), axis=1)

    def release(self) -> None:
        """Unmaps what was opened; it is opened again when it is needed."""
        for caches in self._sequences.values():
            for cache in caches:
                cache.free()
        self._sequences.clear()

    def _check_weights(self) -> None:
        if self._version != self.runtime.model.weights_version:
            raise KeyeError(f"the weights were replaced since {self.path} was opened; index the video again")

    def _open(self, number: int) -> list[KVCache]:
        """The sequences of a segment. Scanned rows of a model on another device are copied there."""
        image, device = self._segments[number].image, self.runtime.model.device
        assert image is not None
        mapped, check = map_segment(self.path, self._segments[number])
        if self._store is None:
            self._store = self.runtime.kv.store(image.layout, device, self.runtime.ledger)
        rows, near = dict(image.rows(mapped)), 0
        for name in image.layout.scanned if device.type != "cpu" else ():
            for layer in range(image.layout.layers):
                check.compare(name, layer)
            if check.damage is not None:
                raise check.damage
            near, rows[name] = near + rows[name].nbytes, rows[name].to(device)
        blocks = self._store.adopt(rows, image.blocks, near)
        caches = []
        for window in self.all:
            if window.segment == number:
                count = -(-window.tokens // KV_BLOCK)
                part = check.part(window.block, count)
                caches.append(
                    KVCache.of_blocks(self._store, blocks[window.block : window.block + count], window.tokens, part)
                )
        return caches

    def _read_scenes(self, about: Mapping[str, Any]) -> None:
        try:
            part = Scenes.from_dict(about)
        except (ValueError, TypeError, LookupError, OverflowError):
            raise damage_error(self.path, "its scenes are none that keye writes") from None
        if not -_MOST < part.start <= part.end < _MOST or part.start < self.scenes_end - SAME_TIME:
            raise damage_error(self.path, "its scenes are not in the order of time")
        self.scenes.append(part)


def open_search_index(runtime: Runtime, path: str | Path) -> SearchIndex:
    """A search index for the model that made it. `KeyeError` where the file is damaged, is none, or is another
    model's."""
    return SearchIndex(runtime, Path(path), read_segments(Path(path)))


def window_pieces(runtime: Runtime, window: StoredWindow) -> list[Piece]:
    """What stands for the frames of a window in its prompt."""
    if runtime.processor.config.release.whole_video:
        return [VisualSpan("video", window.frame_tokens * len(window.times))]
    return expand_frames([window.frame_tokens] * len(window.times), runtime.processor.config, window.labels)


def _read_windows(index: SearchIndex, segment: Segment, number: int, first: int) -> Iterator[StoredWindow]:
    """The windows of a segment, checked against its rows and its tokens."""
    path, image, entries = index.path, segment.image, segment.about.get("windows")
    if image is None or not isinstance(entries, list) or not 0 < len(entries) <= image.blocks:
        raise damage_error(path, "a segment of windows has no windows")
    check_layout(path, image.layout, index.runtime.config)
    levels, block = len(index.head.plan["spacings"]), 0
    for i, entry in enumerate(entries):
        _fields(path, entry, {"times": list, "end": float, "level": int, "tokens": int, "frame_tokens": int,
                              "next_position": int, "labels": list})  # fmt: skip
        times, labels = _numbers(path, entry["times"]), _numbers(path, entry["labels"])
        prior, shares = entry.get("prior"), entry.get("null_shares")
        blocks = -(-entry["tokens"] // KV_BLOCK)
        sound = (
            0 < len(times) == len(labels) and all(a < b for t in (times, labels) for a, b in pairwise(t))
            and -1 <= times[0] and times[-1] <= entry["end"] < _MOST
            and 0 <= entry["level"] < levels
            and 0 < entry["tokens"] and block + blocks <= image.blocks
            and 0 < entry["frame_tokens"] and 0 < entry["next_position"] < 1 << 31
            and isinstance(prior, int | float | None) and (shares is None or len(_numbers(path, shares)) == len(times))
        )  # fmt: skip
        if not sound:
            raise damage_error(path, "a window holds values that keye does not write")
        window = StoredWindow(
            first + i, tuple(times), tuple(labels), entry["end"], float(index.head.plan["spacings"][entry["level"]]),
            entry["level"], number, block, entry["tokens"], entry["frame_tokens"], entry["next_position"],
            None if prior is None else float(prior), None if shares is None else np.array(shares, dtype=np.float32),
        )  # fmt: skip
        ids = image.tokens[:, block * KV_BLOCK : block * KV_BLOCK + window.tokens]
        visual = int(visual_mask(index.runtime.config, ids[0]).sum())
        good = 0 <= int(ids.min()) and int(ids[0].max()) < index.runtime.config.text.vocab_size
        if not good or int(ids.max()) >= 1 << 31 or visual != window.frame_tokens * len(times):
            raise damage_error(path, "the tokens of a window are none of its model")
        block += blocks
        yield window


def _merge(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans that touch become one."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1] + 1e-6:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def _is_inside(start: float, end: float, spans: Sequence[tuple[float, float]]) -> bool:
    return any(a - 1e-6 <= start and end <= b + 1e-6 for a, b in spans)


def _fields(path: Path, value: Any, wanted: Mapping[str, type]) -> Mapping[str, Any]:
    """A part of a header that has these fields; whole numbers count as floats."""
    if not isinstance(value, dict):
        raise damage_error(path, f"its header lacks {', '.join(wanted)}")
    for name, kind in wanted.items():
        if kind is float and type(value.get(name)) is int:
            value[name] = float(value[name])
        if type(value.get(name)) is not kind:
            raise damage_error(path, f"its header lacks {name}")
    return value


def _numbers(path: Path, value: Any) -> list[float]:
    if not isinstance(value, list) or not all(type(number) in (int, float) for number in value):
        raise damage_error(path, "its header has something else where numbers belong")
    if any(not math.isfinite(number) or abs(number) > 1e12 for number in value):
        raise damage_error(path, "its header has numbers beyond all bounds")
    return [float(number) for number in value]


def _natural(path: Path, value: Mapping[str, Any], name: str) -> int:
    number = value.get(name)
    if type(number) is not int or not 0 <= number < _MOST:
        raise damage_error(path, f"{name} in its header is {str(number)[:40]}")
    return number
