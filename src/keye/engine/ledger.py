"""Who holds how many bytes, and whether more may be taken. Knows numbers, not tensors."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from keye.errors import KeyeError


class OutOfMemory(KeyeError):
    """A budget would be exceeded; nothing was taken."""


class Ledger:
    """Bytes by account (`kv`, `vision`, ...) under one budget, None for no limit. Safe to share by threads."""

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.peak = 0

    def reserve(self, account: str, nbytes: int) -> None:
        """Takes `nbytes`; `OutOfMemory` says what is held by whom when they are not there."""
        assert nbytes >= 0
        with self._lock:
            used = self._held.total()
            if self.budget is not None and used + nbytes > self.budget:
                held = ", ".join(f"{name} {megabytes(n)}" for name, n in sorted(self._held.items()) if n) or "nothing"
                raise OutOfMemory(
                    f"{megabytes(nbytes)} more are needed for {account}, but the memory budget is "
                    f"{megabytes(self.budget)} and holds {held}; raise the budget, store keys and values in "
                    "fewer bits, or ask about fewer frames"
                )
            self._held[account] += nbytes
            self.peak = max(self.peak, used + nbytes)

    def release(self, account: str, nbytes: int) -> None:
        """Gives back what `reserve` took."""
        with self._lock:
            assert 0 <= nbytes <= self._held[account], f"{account} gives back more than it took"
            self._held[account] -= nbytes

    @contextmanager
    def holding(self, account: str, nbytes: int) -> Iterator[None]:
        """`nbytes` for the length of a block."""
        self.reserve(account, nbytes)
        try:
            yield
        finally:
            self.release(account, nbytes)

    def used(self, account: str | None = None) -> int:
        """Bytes held by one account, or by all."""
        with self._lock:
            return self._held.total() if account is None else self._held[account]

    def free(self) -> int | None:
        """Bytes that can still be taken; None without a budget."""
        with self._lock:
            return None if self.budget is None else self.budget - self._held.total()

    def accounts(self) -> Mapping[str, int]:
        """Bytes of every account that holds any."""
        with self._lock:
            return {name: n for name, n in sorted(self._held.items()) if n}


def megabytes(nbytes: int) -> str:
    """A byte count as people read it: 812 MiB, 25.8 GiB."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 10 * 2**30 else f"{-(-nbytes // 2**20)} MiB"
