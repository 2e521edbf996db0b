"""Runs a watcher on a live source: a thread takes frames as they come, and opens the source again when it drops."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from keye.errors import KeyeError, MediaError
from keye.media.live import LiveFrame, LiveSource
from keye.sessions.watch import Watcher, WatchEvent

#: Frames that wait for the model, at most: of a live source the oldest are dropped, of a played file reading waits.
WAITING: Final = 256
#: Seconds before a source that dropped is opened again, at first and at most.
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0


@dataclass
class WatchCounts:
    """What happened meanwhile: `frames` that came, `unseen` ones that were dropped since the model is slower, and how
    often the source was opened again."""

    frames: int = 0
    unseen: int = 0
    reconnects: int = 0


class FrameQueue:
    """Frames of a source, taken in a thread. `on_note` is called with a sentence when the source drops and comes back;
    `wait` waits so many seconds, and says whether all is to end."""

    def __init__(
        self, source: LiveSource, *, lossless: bool = False, on_note: Callable[[str], None] = lambda sentence: None,
        wait: Callable[[float], bool] | None = None, first_must_open: bool = True,
    ) -> None:  # fmt: skip
        self.counts = WatchCounts()
        self._source, self._lossless, self._on_note = source, lossless, on_note
        self._frames: deque[LiveFrame] = deque()
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._wait = wait or self._stopping.wait
        self._must_open = first_must_open
        self._error: Exception | None = None
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="keye-watch", daemon=True)
        self._thread.start()

    def take(self) -> list[LiveFrame]:
        """The frames that have come, at least one; none when the source has ended. Raises what ended it."""
        with self._changed:
            # Woken now and then, so that Ctrl-C is noticed.
            while not self._frames and not self._has_ended:
                self._changed.wait(0.5)
            frames = list(self._frames)
            self._frames.clear()
            self._changed.notify_all()
            if not frames and self._error is not None:
                raise self._error
            return frames

    def close(self) -> None:
        """Ends the thread. May be called more than once."""
        self._stopping.set()
        self._source.close()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(10.0)

    def _run(self) -> None:
        try:
            self._read_again_and_again()
        except Exception as error:  # noqa: BLE001 - raised by `take`, in the thread that can report it
            self._error = error
        finally:
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()

    def _read_again_and_again(self) -> None:
        wait = FIRST_WAIT
        while not self._stopping.is_set():
            reason, count = "it ended", 0
            try:
                for frame in self._source.frames():
                    if not count and self.counts.reconnects:
                        self._on_note(f"{self._source.name} is back (reconnect {self.counts.reconnects})")
                    count += 1
                    self._put(frame)
                    if self._stopping.is_set():
                        return
            except (MediaError, OSError) as error:
                if self._stopping.is_set():
                    return
                if not self._source.is_endless or (self._must_open and not self.counts.frames):
                    raise
                reason = str(error)
            if not self._source.is_endless:
                return
            if not count and self._must_open and not self.counts.frames:
                raise MediaError(f"{self._source.name} gives no video; check the address and that it is on")
            wait = FIRST_WAIT if count else min(2 * wait, LONGEST_WAIT)
            self.counts.reconnects += 1
            self._on_note(f"{self._source.name} dropped ({reason}); opening it again in {wait:g} s")
            if self._wait(wait):
                return

    def _put(self, frame: LiveFrame) -> None:
        with self._changed:
            if self._lossless:
                self._changed.wait_for(lambda: len(self._frames) < WAITING or self._stopping.is_set())
            elif len(self._frames) >= WAITING:
                self._frames.popleft()
                self.counts.unseen += 1
            self._frames.append(frame)
            self.counts.frames += 1
            self._changed.notify_all()


def watch_source(frames: FrameQueue, watcher: Watcher, *, lossless: bool = False) -> Iterator[WatchEvent]:
    """The events of a source as they are found, until it ends. Where the model is slower than the source, it is asked
    about the newest frames; with `lossless` about all."""
    while batch := frames.take():
        for number, frame in enumerate(batch, 1):
            watcher.add(frame)
            if watcher.is_due and (lossless or number == len(batch)):
                yield from watcher.look()
    yield from watcher.finish()


def check_source(source: LiveSource, lossless: bool) -> None:
    """`KeyeError` where a source that never ends is to be read without loss."""
    if lossless and source.is_endless:
        raise KeyeError("a live source cannot wait for the model: only a file can be played as fast as it is read")
