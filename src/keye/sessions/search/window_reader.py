"""The windows of a video as media: frames decoded once in order, hard cuts found in the same pass.

Patches of frames that two windows share are held until the second has come, and their visual tokens have a key by which
the vision cache knows them, so that they are encoded once. Scenes are found in parts of a few minutes, each complete
before the first frame after it comes, so that a run which is interrupted loses little.
"""

from __future__ import annotations

import hashlib
import os
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from keye.config.media import MediaOptions
from keye.media.frame_stream import FileReader, FrameShape
from keye.media.info import VideoInfo
from keye.media.pixels.patches import Pixels, VisionInput, frames_to_patches, resize_bilinear
from keye.media.plan import VideoPlan
from keye.media.processor import MediaItem, Processor
from keye.media.scenes import Scenes, SceneScan
from keye.media.source.fetch import Source
from keye.media.video import VideoReader
from keye.sessions.search.windows import SearchWindow

#: Seconds of a part in which scenes are found, and of what is looked at beyond each of its ends.
_PART: Final = 300.0
_MARGIN: Final = 1.0

#: Is called with frames uint8 [n, H, W, 3] as they are decoded, and their seconds.
OnFrames = Callable[[NDArray[np.uint8], Sequence[float]], None]


class WindowReader:
    """Reads `windows` from number `first` on, all frames at the size of `shape`. Scenes are looked for from second
    `scenes_from` on, or not at all. Owns a decode worker until `close`."""

    def __init__(
        self, source: Source, info: VideoInfo, processor: Processor, options: MediaOptions, shape: FrameShape,
        windows: Sequence[SearchWindow], first: int, *, scenes_from: float | None, on_frames: OnFrames | None,
    ) -> None:  # fmt: skip
        self._processor, self._windows, self._on_frames = processor, windows, on_frames
        (self._size,) = shape.sizes
        self._times = sorted({time for window in windows[first:] for time in window.times})
        self._next, self._salt = 0, os.urandom(16)
        self._patches: dict[float, VisionInput] = {}
        number_of = {time: i for i, time in enumerate(info.timestamps)}
        indices = [number_of[time] for time in self._times]
        self._parts = _Parts(info, indices, processor, options, self._size, scenes_from)
        shape = replace(shape, sizes=[self._size] * len(indices))
        self._reader = FileReader(source, processor.limits, self._parts.read, shape, track=info.track)

    def read(self, window: SearchWindow, check: Callable[[], None] | None = None) -> list[MediaItem]:
        """The next window: frames that it shares with the one before, its own, and those that it shares with the
        next. `check` is called while this waits."""
        self._take([time for time in window.times if time not in self._patches], check)
        alone, number = self._processor.config.release.reads_frames_alone, window.number
        before = set(self._windows[number - 1].times) if number else set()
        after = set(self._windows[number + 1].times) if number + 1 < len(self._windows) else set()
        shared = [(time in before, time in after) if alone else None for time in window.times]
        borders = [0, *(i for i in range(1, len(shared)) if shared[i] != shared[i - 1]), len(shared)]
        items = []
        for start, stop in pairwise(borders):
            times, is_shared = window.times[start:stop], shared[start] not in (None, (False, False))
            key = hashlib.sha256(self._salt + repr(times).encode()).digest() if is_shared else None
            vision = VisionInput.concatenate([self._patches[time] for time in times])
            items.append(self._processor.build_item(vision, window.labels[start:stop], key))
        self._patches = {time: patches for time, patches in self._patches.items() if time in after}
        return items

    def take_scenes(self, *, is_last: bool) -> list[Scenes]:
        """Scenes of the parts that all frames read so far are behind, and of all others after the last window."""
        if is_last:
            self._reader.finish()
        last = self._times[self._next - 1] if self._next else 0.0
        complete = list[Scenes]()
        while self._parts.scenes and (is_last or self._parts.scenes[0].end <= last):
            complete.append(self._parts.scenes.popleft())
        return complete

    def close(self) -> None:
        """Ends decoding."""
        self._reader.close()

    def _take(self, times: Sequence[float], check: Callable[[], None] | None) -> None:
        if not times:
            return
        assert self._times[self._next : self._next + len(times)] == list(times)
        while check is not None and not self._reader.has(len(times)):
            check()
            time.sleep(0.003)
        frames = self._reader.take_frames(len(times))
        self._next += len(times)
        for moment, frame in zip(times, frames, strict=True):
            self._patches[moment] = frames_to_patches([frame], [self._size], self._processor.config)
        if self._on_frames is not None:
            self._on_frames(np.stack(frames), times)


class _Parts:
    """The frames of a video part by part, and `scenes` of the parts that have been read."""

    def __init__(
        self, info: VideoInfo, indices: Sequence[int], processor: Processor, options: MediaOptions,
        size: tuple[int, int], scenes_from: float | None,
    ) -> None:  # fmt: skip
        self._info, self._indices, self._options, self._size = info, indices, options, size
        self._config, self._scenes_from = processor.config, scenes_from
        self.scenes = deque[Scenes]()

    def read(self, video: VideoReader) -> Iterator[Pixels]:
        """All frames in order; runs in the thread that decodes."""
        times, done = self._info.timestamps, 0
        for start, stop in self._split():
            last = bisect_left(self._indices, stop)
            chosen, done = self._indices[done:last], last
            scan = self._open_scan(start, stop)
            if chosen:
                yield from self._read_frames(video, chosen, scan)
            elif scan is not None:
                video.scan(scan)
            if scan is not None:
                end = times[stop] if stop < len(times) else self._info.duration
                self.scenes.append(_cut_to(scan.finish(), times[start], end))

    def _split(self) -> Iterator[tuple[int, int]]:
        """First and one past the last frame of each part."""
        times = self._info.timestamps
        if self._scenes_from is None:
            yield 0, len(times)
            return
        start = 0
        while start < len(times):
            stop = bisect_left(times, times[start] + _PART)
            yield start, stop
            start = stop

    def _open_scan(self, start: int, stop: int) -> SceneScan | None:
        times = self._info.timestamps
        if self._scenes_from is None or times[start] < self._scenes_from - 1e-6:
            return None
        first = bisect_left(times, times[start] - _MARGIN)
        return SceneScan(self._info, range(first, bisect_left(times, times[stop - 1] + _MARGIN)))

    def _read_frames(self, video: VideoReader, indices: Sequence[int], scan: SceneScan | None) -> Iterator[Pixels]:
        native = self._config.release.frame_resize != "decoder"
        plan = VideoPlan.of(
            self._info, indices, self._size, tokens_per_frame=self._config.count_tokens(self._size), rate=1.0,
            options=self._options,
        )  # fmt: skip
        for frame in video.frames(plan, native=native, scan=scan):
            yield resize_bilinear(frame, self._size) if native else frame


def _cut_to(scenes: Scenes, start: float, end: float) -> Scenes:
    """The scenes between two times, of those that were looked for beyond them too."""
    first = max(round((start - scenes.start) / scenes.step), 0)
    count = max(round((end - start) / scenes.step), 1)
    cuts = tuple(cut for cut in scenes.cuts if start <= cut < end)
    return Scenes(start, end, cuts, scenes.step, scenes.scores[first : first + count])
