"""Who may run the model next: the engine's steps and work beside them (an index being made, a live session) by turns.

Knows locks and nothing of models.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

#: Entered around each piece of work on the model; entering may raise, which ends the work.
Turn = Callable[[], AbstractContextManager[object]]


class FairLock:
    """A lock that goes to whoever has waited longest. A `threading.Lock` may go to the same thread again and again,
    and one that takes it for step after step would keep all others out."""

    def __init__(self) -> None:
        # Reentrant: garbage collection in here may let a request go, whose end tries this lock without waiting.
        self._mutex = threading.RLock()
        self._waiting: deque[threading.Lock] = deque()
        self._held = False

    def acquire(self, blocking: bool = True) -> bool:
        """Whether the lock is held now, which only fails where it may not wait."""
        with self._mutex:
            if not self._held:
                self._held = True
                return True
            if not blocking:
                return False
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        try:
            mine.acquire()  # released by whoever hands the lock over
        except BaseException:  # Ctrl-C while waiting
            with self._mutex:
                handed_over = mine not in self._waiting
                if not handed_over:
                    self._waiting.remove(mine)
            if handed_over:
                self.release()
            raise
        return True

    def release(self) -> None:
        """Hands the lock over."""
        with self._mutex:
            assert self._held, "a lock is released that nobody holds"
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False

    def __enter__(self) -> FairLock:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
