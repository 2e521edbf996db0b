"""Pixels of a medium that are not there yet: frames that are decoded while the first of them are being encoded.

A source can be opened again and again; a reader gives the rows in order, once. Waiting frames are kept as bytes, a
quarter of their size as patches, and under a limit, so memory does not grow with the video."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

from keye.config import ProcessorConfig
from keye.errors import KeyeWarning, collect_warnings
from keye.media.pixels.patches import PixelReader, Pixels, VisionInput, frame_grids, frames_to_patches
from keye.media.sizes import Size
from keye.media.source.fetch import Source
from keye.media.video import DecodeLimits, VideoReader

#: Decoded frames of one video that wait to be encoded.
BUFFER_BYTES: Final = 32 << 20


@dataclass(frozen=True)
class FrameShape:
    """How the frames of a video become rows: sizes (H, W) of all frames, and whether they are one row (Preview)."""

    sizes: Sequence[Size]
    config: ProcessorConfig
    one_row: bool = False

    @property
    def grid_thw(self) -> NDArray[np.int64]:
        """[rows, 3]."""
        grids = frame_grids(self.sizes, self.config)
        return np.array([[len(grids), *grids[0, 1:]]], dtype=np.int64) if self.one_row else grids

    def frames(self, rows: int) -> int:
        """Frames that `rows` rows hold."""
        return len(self.sizes) if self.one_row and rows else rows

    def patches(self, frames: Sequence[Pixels], first: int) -> VisionInput:
        """Patches of frames `first`, first + 1, ..."""
        vision = frames_to_patches(frames, self.sizes[first : first + len(frames)], self.config)
        return vision.as_one_video() if self.one_row else vision


@dataclass(frozen=True)
class PixelSource:
    """The rows of a medium, read as often as needed: `open` starts a reader at the first row; `grid_thw` [rows, 3] is
    known before any pixel is."""

    grid_thw: NDArray[np.int64]
    open: Callable[[], PixelReader]


class MemoryReader(PixelReader):
    """`PixelReader` of frames in memory, converted to patches when they are read."""

    def __init__(self, frames: Iterator[Pixels], shape: FrameShape) -> None:
        self._frames, self._shape, self._next_frame = frames, shape, 0

    def take(self, rows: int) -> VisionInput:
        frames = list(islice(self._frames, self._shape.frames(rows)))
        self._next_frame += len(frames)
        return self._shape.patches(frames, self._next_frame - len(frames))

    def close(self) -> None:
        self._frames = iter(())


class _Queue:
    """Frames between the thread that decodes and the one that encodes."""

    def __init__(self, buffer_bytes: int) -> None:
        self.buffer_bytes = buffer_bytes
        self.frames: deque[Pixels] = deque()
        self.queued_bytes, self.wanted = 0, 1
        self.error: Exception | None = None
        self.notes: Sequence[KeyeWarning] = ()
        self.ended, self.closed = False, False
        self.changed = threading.Condition()

    def put(self, frame: Pixels) -> bool:
        """Adds a frame when there is room: below the limit, or while fewer are here than are asked for. False when
        the reader is closed."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.closed or self.queued_bytes < self.buffer_bytes or len(self.frames) < self.wanted
            )
            if self.closed:
                return False
            self.frames.append(frame)
            self.queued_bytes += frame.nbytes
            self.changed.notify_all()
            return True

    def end(self, notes: Sequence[KeyeWarning], error: Exception | None = None) -> None:
        """No more frames will come."""
        with self.changed:
            self.ended, self.error, self.notes = True, error, notes
            self.changed.notify_all()

    def wait(self, frames: int, timeout: float | None) -> bool:
        """Waits for frames, the end, or the closing."""
        with self.changed:
            self.wanted = max(self.wanted, frames)
            self.changed.notify_all()
            return self.changed.wait_for(lambda: self.ended or self.closed or len(self.frames) >= frames, timeout)

    def take(self, frames: int) -> list[Pixels]:
        """The next frames, waited for; raises the error that came instead."""
        self.wait(frames, None)
        with self.changed:
            assert not self.closed, "a closed reader is read"
            if len(self.frames) < frames:
                assert self.error is not None, "a video gave fewer frames than its plan"
                raise self.error
            frames_out = [self.frames.popleft() for _ in range(frames)]
            self.queued_bytes -= sum(frame.nbytes for frame in frames_out)
            self.wanted = 1
            self.changed.notify_all()
            return frames_out

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.frames.clear()
            self.queued_bytes = 0
            self.changed.notify_all()


class FileReader(PixelReader):
    """`PixelReader` of track `track` of a video file: `frames` iterates over those of an open file, at the sizes of
    `shape`. Owns a decode worker and the thread that reads it. The thread knows the queue but not this object, so that
    a reader without references ends both."""

    def __init__(
        self,
        source: Source,
        limits: DecodeLimits | None,
        frames: Callable[[VideoReader], Iterator[Pixels]],
        shape: FrameShape,
        *,
        track: int | None = None,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        self._shape, self._next_frame = shape, 0
        self._queue = _Queue(buffer_bytes)
        self.video = VideoReader(source, limits, track=track, wait=False)
        arguments = self.video, frames, self._queue
        self.thread = threading.Thread(target=_fill, args=arguments, name="keye-frames", daemon=True)
        self.thread.start()

    def has(self, rows: int) -> bool:
        return self._queue.wait(self._shape.frames(rows), 0)

    def take(self, rows: int) -> VisionInput:
        frames = self.take_frames(self._shape.frames(rows))
        return self._shape.patches(frames, self._next_frame - len(frames))

    def take_frames(self, count: int) -> list[Pixels]:
        """The next frames as they are, uint8 RGB [H, W, 3]."""
        frames = self._queue.take(count)
        self._next_frame += count
        return frames

    def notes(self) -> Sequence[KeyeWarning]:
        with self._queue.changed:
            self._queue.changed.wait_for(lambda: self._queue.ended or self._queue.closed)
            return self._queue.notes

    def finish(self) -> None:
        """Waits for the end of the frames; raises the error that came instead."""
        self.notes()
        if self._queue.error is not None:
            raise self._queue.error

    def close(self) -> None:
        self._queue.close()
        self.video.stop()
        self.thread.join()

    def __del__(self) -> None:
        if hasattr(self, "thread"):  # not where starting the worker failed
            self._queue.close()
            self.video.stop()


def _fill(video: VideoReader, frames: Callable[[VideoReader], Iterator[Pixels]], queue: _Queue) -> None:
    """Puts frames into the queue until they end, fail, or the reader is closed."""
    with collect_warnings() as notes:
        try:
            with video:
                for frame in frames(video):
                    if not queue.put(frame):
                        break
            queue.end(notes)
        except Exception as error:  # noqa: BLE001 - raised again where the frames are taken
            queue.end(notes, error)
