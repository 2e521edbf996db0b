"""The owner of memory: every byte of keys and values, visual tokens and scratch is reserved here. Knows numbers, not
tensors.

Caches keep what later requests may use again. They register a function that evicts some of it; a reservation that does
not fit calls these functions before it fails. No other code evicts to make a reservation fit. One lock guards the
ledger and everything that reserves in it (`Ledger.lock`), so that eviction can enter a cache from any thread, also
while another cache is being changed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Final

from keye.errors import KeyeError
from keye.units import format_bytes

#: Accounts that do not count against the memory budget but each against one of its own, and what that one is about:
#: keys and values in a mapped file, those of preempted requests, and those in main memory beside a model on a GPU.
SEPARATE_BUDGETS: Final[Mapping[str, str]] = {"kv-file": "disk", "kv-saved": "disk", "kv-host": "host memory"}

#: Evicts the least useful entry of a cache; False where the cache has none that it may evict.
Evict = Callable[[], bool]


class OutOfMemory(KeyeError):
    """A budget would be exceeded; nothing was taken."""


class Ledger:
    """Bytes by account (`kv`, `vision`, ...) under one budget, None for no limit. Safe to share by threads.

    `separate` are budgets of the accounts in `SEPARATE_BUDGETS`; one that is not named has no limit.
    """

    def __init__(self, budget: int | None = None, *, separate: Mapping[str, int] | None = None) -> None:
        assert set(separate or ()) <= set(SEPARATE_BUDGETS)
        self.budget = budget
        self._separate = dict(separate or {})
        self._reserved: Counter[str] = Counter()
        #: Priority, accounts and function of each cache, the lowest priority first.
        self._reclaimers: list[tuple[int, Collection[str], Evict]] = []
        #: Guards the ledger, and the caches and stores that reserve in it. Reentrant: a reservation evicts entries of a
        #: cache, and garbage collection may free a sequence anywhere; both release bytes in the same thread.
        self.lock = threading.RLock()
        self.peak = 0

    def register(self, evict: Evict, accounts: Collection[str], *, priority: int) -> None:
        """Has `evict` called where bytes are missing in a budget that one of `accounts` counts against: the cache of
        the lowest `priority` first, as long as it returns True. It runs in the thread that reserves and under `lock`,
        and must neither reserve nor wait."""
        self._reclaimers = sorted([*self._reclaimers, (priority, accounts, evict)], key=lambda entry: entry[0])

    def reserve(self, account: str, nbytes: int) -> None:
        """Takes `nbytes`, evicting what caches keep where they are missing; `OutOfMemory` says what is held by whom."""
        if not self.try_reserve(account, nbytes):
            with self.lock:
                what, budget = SEPARATE_BUDGETS.get(account, "memory"), self.limit(account) or 0
                holders = [(name, n) for name, n in self.accounts().items() if _share_budget(account, name)]
            reserved = ", ".join(f"{name} {format_bytes(n)}" for name, n in holders)
            raise OutOfMemory(
                f"{format_bytes(nbytes)} more are needed for {account}, but the {what} budget is "
                f"{format_bytes(budget)} and holds {reserved or 'nothing'}; raise the budget, store keys and values in "
                "fewer bits, or ask about fewer frames"
            )

    def try_reserve(self, account: str, nbytes: int, *, evict: bool = True) -> bool:
        """As `reserve`, but False where the bytes are missing. Without `evict` only what is free now is taken: for what
        a cache keeps, which is not worth what another cache keeps."""
        assert nbytes >= 0
        with self.lock:
            while not self.has_room(account, nbytes):
                if not (evict and self.reclaim(account)):
                    return False
            self._reserved[account] += nbytes
            self.peak = max(self.peak, sum(n for name, n in self._reserved.items() if name not in SEPARATE_BUDGETS))
            return True

    def reclaim(self, account: str) -> bool:
        """Evicts an entry of a cache that shares the budget of `account`; False where there is none left. The bytes of
        the entry may be in use elsewhere, so that none are free afterwards."""
        with self.lock:
            sharing = [e for _, accounts, e in self._reclaimers if any(_share_budget(account, a) for a in accounts)]
            return any(evict() for evict in sharing)

    def release(self, account: str, nbytes: int) -> None:
        """Returns what `reserve` took."""
        with self.lock:
            assert 0 <= nbytes <= self._reserved[account], f"{account} releases more than it took"
            self._reserved[account] -= nbytes

    def has_room(self, account: str, nbytes: int) -> bool:
        """Whether so many bytes are free now."""
        free = self.free(account)
        return free is None or nbytes <= free

    def used(self, account: str | None = None) -> int:
        """Bytes held by one account, or by all, those of separate budgets included."""
        with self.lock:
            return self._reserved.total() if account is None else self._reserved[account]

    def free(self, account: str = "kv") -> int | None:
        """Bytes that an account can still take; None without a budget."""
        with self.lock:
            budget = self.limit(account)
            if budget is None:
                return None
            return budget - sum(n for name, n in self._reserved.items() if _share_budget(account, name))

    def accounts(self) -> Mapping[str, int]:
        """Bytes of every account that holds any."""
        with self.lock:
            return {name: n for name, n in sorted(self._reserved.items()) if n}

    def limit(self, account: str) -> int | None:
        """Bytes of the budget that an account counts against; None without one."""
        return self._separate.get(account) if account in SEPARATE_BUDGETS else self.budget


def _share_budget(account: str, other: str) -> bool:
    return account == other or not {account, other} & SEPARATE_BUDGETS.keys()
