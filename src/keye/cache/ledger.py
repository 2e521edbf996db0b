"""Who holds how many bytes, and whether more may be taken. Knows numbers, not tensors."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from keye.errors import KeyeError

#: Accounts that do not count against the memory budget but each against one of its own, and what that one is about:
#: keys and values in a mapped file, those of preempted requests, and those in main memory beside a model on a GPU.
ASIDE: Final[Mapping[str, str]] = {"kv-file": "disk", "kv-saved": "disk", "kv-host": "host memory"}


class OutOfMemory(KeyeError):
    """A budget would be exceeded; nothing was taken."""


class Ledger:
    """Bytes by account (`kv`, `vision`, ...) under one budget, None for no limit. Safe to share by threads.

    `aside` are budgets of the accounts in `ASIDE`; one that is not named has no limit.
    """

    def __init__(self, budget: int | None = None, *, aside: Mapping[str, int] | None = None) -> None:
        assert set(aside or ()) <= set(ASIDE)
        self.budget = budget
        self._aside = dict(aside or {})
        self._held: Counter[str] = Counter()
        # Reentrant: collecting garbage in the middle of an entry may free a cache, which gives its bytes back.
        self._lock = threading.RLock()
        self.peak = 0

    def reserve(self, account: str, nbytes: int) -> None:
        """Takes `nbytes`; `OutOfMemory` says what is held by whom when they are not there."""
        assert nbytes >= 0
        with self._lock:
            used, budget = self._used_beside(account), self.limit(account)
            if budget is not None and used + nbytes > budget:
                raise OutOfMemory(self._refusal(account, nbytes, budget))
            self._held[account] += nbytes
            if account not in ASIDE:
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
        """Bytes held by one account, or by all, those aside included."""
        with self._lock:
            return self._held.total() if account is None else self._held[account]

    def free(self, account: str = "kv") -> int | None:
        """Bytes that an account can still take; None without a budget."""
        with self._lock:
            budget = self.limit(account)
            return None if budget is None else budget - self._used_beside(account)

    def accounts(self) -> Mapping[str, int]:
        """Bytes of every account that holds any."""
        with self._lock:
            return {name: n for name, n in sorted(self._held.items()) if n}

    def limit(self, account: str) -> int | None:
        """Bytes of the budget that an account counts against; None without one."""
        return self._aside.get(account) if account in ASIDE else self.budget

    def _used_beside(self, account: str) -> int:
        """Bytes that count against the same budget."""
        return sum(self._held[name] for name in self._sharing(account))

    def _sharing(self, account: str) -> list[str]:
        """Accounts under the same budget."""
        return [account] if account in ASIDE else sorted(name for name in self._held if name not in ASIDE)

    def _refusal(self, account: str, nbytes: int, budget: int) -> str:
        what = ASIDE.get(account, "memory")
        held = ", ".join(f"{name} {megabytes(self._held[name])}" for name in self._sharing(account) if self._held[name])
        return (
            f"{megabytes(nbytes)} more are needed for {account}, but the {what} budget is {megabytes(budget)} and "
            f"holds {held or 'nothing'}; raise the budget, store keys and values in fewer bits, or ask about fewer "
            "frames"
        )


def megabytes(nbytes: int) -> str:
    """A byte count as people read it: 0.1 MiB, 812 MiB, 25.8 GiB."""
    if nbytes < 10 * 2**20:
        return f"{math.ceil(nbytes / 2**20 * 10) / 10:g} MiB"
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 10 * 2**30 else f"{-(-nbytes // 2**20)} MiB"
