"""Orders to decode workers and their results: plain data that travels, and how the work is done at the worker.

Work is done in two steps, so that a result has a place before it is made: `begin` finds out how many bytes it will
have, `write` makes it. Knows media, no processes and no machines.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from keye.config import ProcessorConfig
from keye.config.media import DEFAULTS, MediaOptions
from keye.errors import KeyeWarning, MediaError, warn
from keye.media.decode.workers import DecodeLimits
from keye.media.pixels.patches import Pixels
from keye.media.plan import VideoPlan
from keye.media.processor import Processor
from keye.media.source.fetch import Source, fetch_source

#: Takes the bytes of a result, piece by piece.
Sink = Callable[[Pixels], None]
#: Bytes at each end of a file that tell whether a file of the same path on another machine is the same.
_ENDS: Final = 1 << 16


class Absent(Exception):
    """The file of a piece of work is not on this node. No error of the user's yet: another node may have it."""


@dataclass(frozen=True)
class PlannedFrames:
    """Frames `first`, `first` + 1, ... of a complete plan: uint8 RGB [H, W, 3], at the sizes of the plan, read-only."""

    plan: VideoPlan
    frames: tuple[Pixels, ...]
    first: int = 0


@dataclass(frozen=True)
class VideoWork:
    """The planned frames of a video: a `Source`, or a path or address that the worker opens and this machine need not
    have. By `plan`, or by a new one; with a complete plan, frames first .. stop alone (not for Preview, where sizes
    depend on how many there are). `node` names where the file is known to be (Ray's node id)."""

    source: Source | str
    config: ProcessorConfig
    options: MediaOptions = DEFAULTS
    plan: VideoPlan | None = None
    limits: DecodeLimits | None = None
    first: int = 0
    stop: int | None = None
    node: str | None = None
    #: What tells the file from others of its path.
    ends: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        part = self.first or self.stop is not None
        assert not part or (self.plan is not None and not self.config.release.whole_video), "no part can be taken"
        if isinstance(self.source, Source) and self.source.part is not None:
            with self.source.open() as file:
                source = dataclasses.replace(self.source, part=None, data=file.read())
            object.__setattr__(self, "source", source)
        if isinstance(self.source, Source) and self.source.path is not None and self.ends is None:
            object.__setattr__(self, "ends", _ends(self.source))

    @property
    def name(self) -> str:
        return self.source.name if isinstance(self.source, Source) else self.source

    @property
    def key(self) -> str:
        if isinstance(self.source, str):
            return self.source
        if self.source.path is None:
            return hashlib.sha256(self.source.data or b"").hexdigest()
        return f"{self.source.path}\0{self.ends}"

    def __getstate__(self) -> dict[str, Any]:
        """Without the temporary file that a source may keep: it stays with the sender."""
        state = dict(self.__dict__)
        if isinstance(self.source, Source):
            state["source"] = dataclasses.replace(self.source, keep=None)
        return state

    def begin(self) -> BegunVideo:
        """At the worker. Raises `Absent`, or what is wrong with the work."""
        source = self._find_source()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", KeyeWarning)
            begun = BegunVideo(self, source)
        begun.notes = tuple(item.message.args for item in caught if isinstance(item.message, KeyeWarning))
        return begun

    def result(self, rest: Any, buffer: Pixels) -> PlannedFrames:
        """At home: the result, of what `write` returned and of what its sink got, uint8 [buffer_bytes]."""
        plan, notes = rest
        for note in notes:
            warn(KeyeWarning(*note), stacklevel=2)
        frames, place = [], 0
        for height, width in _sizes(plan, self.first, self.stop):
            end = place + height * width * 3
            frames.append(buffer[place:end].reshape(height, width, 3))
            place = end
        return PlannedFrames(plan, tuple(frames), self.first)

    def carried(self) -> VideoWork | None:
        """At home: the same work with its file in it, for nodes that lack it; None where it is not here either."""
        source = self.source
        if isinstance(source, str) or source.path is None:
            return None
        with source.open() as file:
            data = file.read()
        return dataclasses.replace(self, source=dataclasses.replace(source, path=None, data=data, keep=None))

    def _find_source(self) -> Source:
        """The file on this node."""
        if isinstance(self.source, str):
            if "://" not in self.source and not self.source.startswith("data:") and not os.path.exists(self.source):
                raise Absent
            return fetch_source(self.source)
        if self.source.path is not None:
            try:
                same = self.source.path.stat().st_size == self.source.size and _ends(self.source) == self.ends
            except (OSError, MediaError):
                same = False
            if not same:
                raise Absent
        return self.source


class BegunVideo:
    """A video whose plan is complete and whose decoder waits to be asked for frames. The result has `nbytes` bytes,
    `buffer_bytes` of which go to the sink of `write`, which returns the rest. Close it in any case."""

    def __init__(self, work: VideoWork, source: Source) -> None:
        self.notes: tuple[Any, ...] = ()
        self._open, plan = ExitStack(), work.plan
        is_part = plan is not None and (work.first or work.stop is not None)
        decoding = Processor(work.config, limits=work.limits).decode_video(
            source, work.options, plan=_part(plan, work.first, work.stop) if plan is not None and is_part else plan
        )
        decoded, self._frames = self._open.enter_context(decoding)
        #: The complete plan is returned, not that of a part.
        self.plan = plan if plan is not None and is_part else decoded
        self.buffer_bytes = sum(height * width * 3 for height, width in _sizes(decoded, 0, None))

    @property
    def nbytes(self) -> int:
        return self.buffer_bytes

    def write(self, sink: Sink) -> Any:
        for frame in self._frames:
            sink(frame)
        return self.plan, self.notes

    def close(self) -> None:
        self._open.close()


@dataclass(frozen=True)
class CallWork:
    """A call of a function that workers can import, such as one that makes a training batch; see `VideoWork` for its
    methods. Its result travels as it is; the arrays in it count."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    node: str | None = None

    @property
    def name(self) -> str:
        return f"{self.function.__name__}{self.arguments!r:.60}"

    @property
    def key(self) -> None:
        return None

    def begin(self) -> BegunCall:
        return BegunCall(self.function(*self.arguments))

    def result(self, rest: Any, buffer: Pixels) -> Any:
        return rest

    def carried(self) -> None:
        return None


@dataclass(frozen=True)
class BegunCall:
    """A call that is over, since the size of its result is not known before."""

    value: Any
    buffer_bytes: int = 0

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in _arrays(self.value))

    def write(self, sink: Sink) -> Any:
        return self.value

    def close(self) -> None:
        return None


#: A piece of work. `name` is for sentences; equal `key`s mean the same file; `node` is where it is known to be.
Work = VideoWork | CallWork


def _arrays(value: Any) -> Iterator[NDArray[Any]]:
    """The arrays in a value, in lists, tuples, mappings and dataclasses."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, dict):
        yield from (array for item in value.values() for array in _arrays(item))
    elif isinstance(value, list | tuple):
        yield from (array for item in value for array in _arrays(item))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (array for item in dataclasses.fields(value) for array in _arrays(getattr(value, item.name)))


def _part(plan: VideoPlan, first: int, stop: int | None) -> VideoPlan:
    """The plan of frames first .. stop of a plan, as it is needed to decode them."""
    fast = plan.fast
    return dataclasses.replace(
        plan, frame_indices=plan.frame_indices[first:stop], timestamps=plan.timestamps[first:stop],
        label_times=None if plan.label_times is None else plan.label_times[first:stop], pts=plan.pts[first:stop],
        fast=None if fast is None else dataclasses.replace(fast, types=fast.types[first:stop]),
    )  # fmt: skip


def _sizes(plan: VideoPlan, first: int, stop: int | None) -> Sequence[tuple[int, int]]:
    """(height, width) of frames first .. stop."""
    return [plan.frame_size(i) for i in range(plan.frames)[first:stop]]


def _ends(source: Source) -> str:
    """A short hash of both ends of a file."""
    with source.open() as file:
        digest = hashlib.sha256(file.read(_ENDS))
        file.seek(max(source.size - _ENDS, 0))
        digest.update(file.read(_ENDS))
    return digest.hexdigest()[:32]
