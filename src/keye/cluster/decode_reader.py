"""The decode service as the decoder of a `Processor`: frames of a video, part by part."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from dataclasses import replace
from typing import Final

from keye.cluster.decode_queue import Priority
from keye.cluster.decode_work import PlannedFrames, VideoWork
from keye.cluster.service import DecodeService, Result
from keye.config.media import MediaOptions
from keye.errors import KeyeError
from keye.media.frame_stream import FrameShape
from keye.media.pixels.patches import PixelReader, Pixels, VisionInput
from keye.media.plan import VideoPlan
from keye.media.processor import Processor
from keye.media.source.fetch import Source

#: Bytes of the first part of a video and of the largest. Each part is twice as large as the one before: the first
#: frames come soon, and a long video is not searched through once for every few of them.
FIRST_PART: Final = 16 << 20
LARGEST_PART: Final = 128 << 20
#: Parts that are asked for before they are needed.
_AHEAD: Final = 2


class ServiceDecoder:
    """`keye.media.processor.Decoder` on a decode service."""

    def __init__(self, service: DecodeService, priority: Priority = Priority.INTERACTIVE) -> None:
        self.service, self.priority = service, priority

    def decode(
        self, source: Source, options: MediaOptions, plan: VideoPlan | None, processor: Processor
    ) -> tuple[VideoPlan, Sequence[Pixels]]:
        work = VideoWork(source, processor.config, options, plan, processor.limits)
        planned: PlannedFrames = self.service.submit(work, self.priority, limited=False).result()
        return planned.plan, planned.frames

    def open(
        self, source: Source, options: MediaOptions, plan: VideoPlan, processor: Processor, shape: FrameShape
    ) -> PartReader:
        work = VideoWork(source, processor.config, options, plan, processor.limits)
        works = [replace(work, first=first, stop=stop) for first, stop in parts(plan, as_one=shape.one_row)]
        return PartReader(self.service, self.priority, works, shape)


def parts(plan: VideoPlan, *, as_one: bool = False) -> Iterator[tuple[int, int | None]]:
    """Which frames of a plan are decoded together, as (first, stop)."""
    if as_one:
        yield 0, None
        return
    most, first, total = FIRST_PART, 0, 0
    for i in range(plan.frames):
        height, width = plan.frame_size(i)
        size = height * width * 3
        if total and total + size > most:
            yield first, i
            first, total, most = i, 0, min(2 * most, LARGEST_PART)
        total += size
    yield first, plan.frames if first else None


class PartReader(PixelReader):
    """Frames that wait here have been taken from the service."""

    def __init__(
        self, service: DecodeService, priority: Priority, works: Sequence[VideoWork], shape: FrameShape
    ) -> None:
        self._service, self._priority, self._shape, self._works = service, priority, shape, deque(works)
        self._results: deque[Result] = deque()
        self._frames: deque[Pixels] = deque()
        self._delivered, self._closed = 0, False
        self._error: Exception | None = None
        self._lock = threading.Lock()
        self._request_parts()

    def has(self, rows: int) -> bool:
        return self._receive_rows(rows, 0)

    def take(self, rows: int) -> VisionInput:
        self._receive_rows(rows)
        needed = self._shape.frames(rows)
        with self._lock:
            assert not self._closed, "a closed reader is read"
            if len(self._frames) < needed:
                assert self._error is not None, "a video gave fewer frames than its plan"
                raise self._error
            frames = [self._frames.popleft() for _ in range(needed)]
        self._delivered += needed
        return self._shape.patches(frames, self._delivered - needed)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            results = list(self._results)
            self._results.clear()
            self._works.clear()
            self._frames.clear()
        for result in results:
            result.abandon()

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()

    def _receive_rows(self, rows: int, timeout: float | None = None) -> bool:
        """Receives parts until `has(rows)`, for at most `timeout` seconds; returns it."""
        needed = self._shape.frames(rows)
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                if self._closed or self._error is not None or len(self._frames) >= needed or not self._results:
                    return True
                first = self._results[0]
            left = None if end is None else max(0.0, end - time.monotonic())
            if not wait((first,), left).done:
                return False
            self._receive(first)

    def _receive(self, first: Result) -> None:
        """Takes a part that has come."""
        with self._lock:
            if self._closed or not self._results or self._results[0] is not first:
                return
            self._results.popleft()
            try:
                part: PlannedFrames = first.result()
            except Exception as error:  # noqa: BLE001 - raised again where the frames are taken
                self._error = error
                return
            self._frames.extend(part.frames)
        self._request_parts()

    def _request_parts(self) -> None:
        """Requests parts ahead of time. Never waits: this thread may be the one that has to make room."""
        with self._lock:
            while self._works and len(self._results) < _AHEAD:
                try:
                    work = self._works.popleft()
                    self._results.append(self._service.submit(work, self._priority, limited=False))
                except KeyeError as error:
                    self._error = error
                    return
