"""Visual tokens of media that were seen before; the least recently used are evicted first. Knows keys and bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from keye.cache.ledger import Ledger
from keye.errors import KeyeError, KeyeWarning

#: The ledger's account.
ACCOUNT = "vision-cache"
#: Bytes that are kept unless something else is said.
DEFAULT_BUDGET = 512 << 20
#: Media of which it is kept what was tolerated.
_MOST_NOTED = 4096


@dataclass
class _Entry:
    tokens: Tensor
    users: int = 0


class VisionCache:
    """Visual tokens [n, d] of one model under the content keys of their media; safe to share by threads.

    `budget` bytes at most are kept, 0 for none; each is reserved in `ledger`. Tokens in use are not evicted.
    """

    def __init__(self, budget: int = DEFAULT_BUDGET, ledger: Ledger | None = None) -> None:
        if budget < 0:
            raise KeyeError(f"the budget of the vision cache is {budget} bytes; give 0 or more")
        self.budget, self.ledger = budget, ledger or Ledger()
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        #: What was tolerated of media when they were read, by their keys, with the name that each had then.
        self._noted: OrderedDict[bytes, tuple[str, tuple[KeyeWarning, ...]]] = OrderedDict()
        self._lock = self.ledger.lock
        self._nbytes = 0
        self.ledger.register(self.evict, {ACCOUNT}, priority=1)

    def accepts(self, nbytes: int) -> bool:
        """Whether tokens of this size can be kept at all."""
        return nbytes <= self.budget

    def note(self, key: bytes, name: str, warnings: Sequence[KeyeWarning]) -> None:
        """Keeps what was tolerated of a medium when it was read under a name, also where its tokens are not kept."""
        with self._lock:
            self._noted[key] = name, tuple(warnings)
            while len(self._noted) > _MOST_NOTED:
                self._noted.popitem(last=False)

    def notes(self, key: bytes, name: str) -> list[KeyeWarning]:
        """What was tolerated of a medium, which is called `name` now."""
        with self._lock:
            known, warnings = self._noted.get(key, (name, ()))
        named = ([name if part == known else part for part in warning.args[1:]] for warning in warnings)
        return [KeyeWarning(warning.args[0], *parts) for warning, parts in zip(warnings, named, strict=True)]

    def acquire(self, key: bytes) -> Tensor | None:
        """The tokens under `key`, which stay until `release`; None when they are not here."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            entry.users += 1
            return entry.tokens

    def release(self, key: bytes) -> None:
        """One user less of what `acquire` or `put` gave."""
        with self._lock:
            entry = self._entries[key]
            assert entry.users > 0, "tokens are released once too often"
            entry.users -= 1

    def put(self, key: bytes, tokens: Tensor) -> Tensor | None:
        """Keeps `tokens` and acquires them, evicting others; the tokens that are kept, None when there is no room."""
        nbytes = tokens.numel() * tokens.element_size()
        with self._lock:
            if key in self._entries:  # another request encoded the same medium meanwhile
                return self.acquire(key)
            if not self.accepts(nbytes):
                return None
            while self._nbytes + nbytes > self.budget or not self.ledger.try_reserve(ACCOUNT, nbytes, evict=False):
                if not self.evict():
                    return None
            self._entries[key] = _Entry(tokens, users=1)
            self._nbytes += nbytes
            return tokens

    def evict(self) -> bool:
        """Evicts the least recently used tokens that are not in use; False without any."""
        with self._lock:
            key = next((key for key, entry in self._entries.items() if not entry.users), None)
            if key is None:
                return False
            tokens = self._entries.pop(key).tokens
            nbytes = tokens.numel() * tokens.element_size()
            self._nbytes -= nbytes
            self.ledger.release(ACCOUNT, nbytes)
            return True

    def clear(self) -> None:
        """Evicts all tokens that are not in use."""
        while self.evict():
            pass

    def nbytes(self) -> int:
        """Bytes kept."""
        with self._lock:
            return self._nbytes
