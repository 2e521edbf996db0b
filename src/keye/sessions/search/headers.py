"""The headers of a search index as they are in its file, checked before anything is made of them.

Segments (`keye.cache.segments`) are of these kinds:

    head      once, first: the model, the source, how windows were planned, the null question
    windows   cached rows of some windows, with their frames, and what the null question scored on each
    scenes    hard cuts and change scores of a part of the video
    level     a spacing that is complete

A file is data that anyone may have written: no number is used that is not possible. Knows no model.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
from numpy.typing import NDArray

from keye.cache.checksums import damage_error
from keye.cache.fingerprint import Fingerprint
from keye.cache.segments import Segment, read_segments
from keye.config.media import media_options
from keye.errors import KeyeError
from keye.media.sampling import SAME_TIME
from keye.media.scenes import Scenes
from keye.models.attention import AttentionMode
from keye.ops.kv_blocks import KV_BLOCK
from keye.sessions.search.plans import MOST_WINDOW_FRAMES
from keye.sessions.search.windows import SearchWindow, label_frames

#: More of anything than this is damage: windows, frames of a window, positions.
_MOST: Final = 1 << 24
#: Most seconds between frames, those of the widest spacing, and most pixels of a side of a frame.
_MOST_SPACING: Final = 4 * 3600
_MOST_SIDE: Final = 1 << 14


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
    """The first segment, checked. `source` has `name`, `identity`, `size`, `duration`, and `start`, when the first
    frame of the video is shown, also where only a later part was chosen; `plan` says how windows were planned:
    `spacings` by level, `frames` of a window, `overlap`, `height` and `width` of a frame, `options`."""

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
        source = _fields(
            path, about.get("source"), {"name": str, "identity": str, "size": int, "duration": float, "start": float}
        )
        plan = _fields(
            path, about.get("plan"),
            {"spacings": list, "frames": int, "overlap": int, "height": int, "width": int, "options": dict},
        )  # fmt: skip
        sound = (
            about["attention"] in get_args(AttentionMode)
            and 0 < source["duration"] < _MOST
            and 0 <= source["start"] < source["duration"]
            and 0 < len(plan["spacings"]) <= 8
            and all(type(spacing) is float and 0.01 <= spacing <= _MOST_SPACING for spacing in plan["spacings"])
            and 0 <= plan["overlap"] < plan["frames"] <= MOST_WINDOW_FRAMES
            and 0 < plan["height"] <= _MOST_SIDE and 0 < plan["width"] <= _MOST_SIDE
            and _is_accepted(plan["options"])
        )  # fmt: skip
        if not sound:
            raise damage_error(path, "its head holds values that keye does not write")
        return cls(
            Fingerprint(**{name: model[name] for name in names}), about["attention"], source, plan,
            about["null_question"], about["keye"],
        )  # fmt: skip


@dataclass
class IndexContents:
    """What the headers of a file hold, in order: `windows`, `scenes`, the numbers of `levels_done`, and the `images`,
    segments with rows."""

    path: Path
    head: IndexHead
    windows: list[StoredWindow] = field(default_factory=list)
    scenes: list[Scenes] = field(default_factory=list)
    levels_done: set[int] = field(default_factory=set)
    images: list[Segment] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, segments: Sequence[Segment]) -> IndexContents:
        """The contents of complete segments, the head first. `KeyeError` where they are none that keye writes."""
        if not segments or segments[0].kind != "head":
            raise damage_error(path, "it has no head")
        contents = cls(path, IndexHead.read(path, segments[0].about))
        for segment in segments[1:]:
            contents.add(segment)
        return contents

    def add(self, segment: Segment) -> list[StoredWindow]:
        """Takes the next segment; returns its windows."""
        if segment.kind == "windows":
            new = list(_read_windows(self, segment))
            self.images.append(segment)
            self.windows += new
            return new
        if segment.kind == "scenes":
            self._add_scenes(segment.about)
        elif segment.kind == "level":
            level = segment.about.get("level")
            if type(level) is not int or not 0 <= level < len(self.head.plan["spacings"]):
                raise damage_error(self.path, f"level in its header is {str(level)[:40]}")
            self.levels_done.add(level)
        else:
            raise damage_error(self.path, f"it has a segment of an unknown kind, {segment.kind[:40]!r}")
        return []

    @property
    def scenes_end(self) -> float:
        """Up to which second cuts and changes are known."""
        return self.scenes[-1].end if self.scenes else 0.0

    @property
    def is_complete(self) -> bool:
        """Whether the finest spacing is complete."""
        return len(self.head.plan["spacings"]) - 1 in self.levels_done

    def _add_scenes(self, about: Mapping[str, Any]) -> None:
        try:
            part = Scenes.from_dict(about)
        except (ValueError, TypeError, LookupError, OverflowError):
            raise damage_error(self.path, "its scenes are none that keye writes") from None
        if not -_MOST < part.start <= part.end < _MOST or part.start < self.scenes_end - SAME_TIME:
            raise damage_error(self.path, "its scenes are not in the order of time")
        self.scenes.append(part)


def describe_search_index(path: Path) -> dict[str, Any]:
    """What a search index holds, from its headers, as plain data for `keye inspect`."""
    segments = read_segments(path)
    contents, size = IndexContents.read(path, segments), path.stat().st_size
    head, image = contents.head, contents.images[0].image if contents.images else None
    levels = [
        {
            "spacing": spacing, "complete": level in contents.levels_done,
            "windows": sum(window.level == level for window in contents.windows),
        }
        for level, spacing in enumerate(head.plan["spacings"])
    ]  # fmt: skip
    return {
        "search_index": str(path), "bytes": size, "unused_bytes": size - segments[-1].start - segments[-1].size,
        "keye": head.keye, "model": asdict(head.model), "attention": head.attention, "source": dict(head.source),
        "plan": dict(head.plan), "null_question": head.null_question, "complete": contents.is_complete,
        "levels": levels, "windows": len(contents.windows), "segments": len(segments),
        "tokens": sum(window.tokens for window in contents.windows),
        "frames": len({time for window in contents.windows for time in window.times}),
        "formats": {} if image is None else {name: rows.kind for name, rows in image.layout.rows.items()},
        "bytes_per_token": None if image is None else image.layout.token_bytes,
        "cuts": sum(len(part.cuts) for part in contents.scenes), "scenes_until": contents.scenes_end,
    }  # fmt: skip


def encode_shares(shares: NDArray[np.float32]) -> str:
    """The shares of the frames of a window as they are in headers: base64 of little-endian float16."""
    return base64.b64encode(shares.astype("<f2").tobytes()).decode()


def _is_accepted(options: Mapping[str, Any]) -> bool:
    """Whether options are those of a video."""
    try:
        media_options("video", options)
    except KeyeError:
        return False
    return True


def _read_windows(contents: IndexContents, segment: Segment) -> Iterator[StoredWindow]:
    """The windows of a segment, checked against its rows."""
    path, image, entries = contents.path, segment.image, segment.about.get("windows")
    if image is None or not isinstance(entries, list) or not 0 < len(entries) <= image.blocks:
        raise damage_error(path, "a segment of windows has no windows")
    spacings, block = contents.head.plan["spacings"], 0
    for i, entry in enumerate(entries):
        fields = {"times": list, "end": float, "level": int, "tokens": int, "frame_tokens": int, "next_position": int}
        _fields(path, entry, fields)
        times, step, prior = _read_times(path, entry), entry.get("step"), entry.get("prior")
        blocks = -(-entry["tokens"] // KV_BLOCK)
        sound = (
            -1 <= times[0] and times[-1] <= entry["end"] < _MOST
            and (step is None or (type(step) is float and 0 < step < _MOST))
            and 0 <= entry["level"] < len(spacings)
            and 0 < entry["tokens"] and block + blocks <= image.blocks
            and 0 < entry["frame_tokens"] and 0 < entry["next_position"] < 1 << 31
            and (prior is None or (type(prior) in (int, float) and abs(prior) < _MOST))
        )  # fmt: skip
        if not sound:
            raise damage_error(path, "a window holds values that keye does not write")
        yield StoredWindow(
            len(contents.windows) + i, times, label_frames(times, step), entry["end"], spacings[entry["level"]],
            entry["level"], len(contents.images), block, entry["tokens"], entry["frame_tokens"],
            entry["next_position"], None if prior is None else float(prior),
            _read_shares(path, entry.get("null_shares"), len(times)),
        )  # fmt: skip
        block += blocks


def _read_times(path: Path, entry: Mapping[str, Any]) -> tuple[float, ...]:
    """The seconds of the frames of a window, at least one, ascending."""
    values = entry["times"]
    if not values or len(values) > MOST_WINDOW_FRAMES or not all(type(time) in (int, float) for time in values):
        raise damage_error(path, "the times of a window are none that keye writes")
    times = np.array(values, dtype=np.float64)
    if not (abs(times) < _MOST).all() or (np.diff(times) <= 0).any():
        raise damage_error(path, "the times of a window do not ascend")
    return tuple(times.tolist())


def _read_shares(path: Path, value: Any, frames: int) -> NDArray[np.float32] | None:
    """What `encode_shares` gave; None where there are none."""
    if value is None:
        return None
    try:
        shares = np.frombuffer(base64.b64decode(value, validate=True), "<f2").astype(np.float32)
    except (ValueError, TypeError):
        shares = np.empty(0, dtype=np.float32)
    if len(shares) != frames or not ((shares >= 0) & (shares <= 1)).all():
        raise damage_error(path, "the shares of a window are none that keye writes")
    return shares


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
