"""The prefix cache: prompts that were computed before, from which prompts with the same beginning continue.

An entry is a prefix under the hash of its tokens, media, attention mode and owner; its blocks are shared with the
requests that use it. Entries end after a medium or at a block boundary outside any medium, never inside one. The least
recently used are evicted first, also when a reservation needs their bytes.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from torch import Tensor

from keye.cache.ledger import OutOfMemory
from keye.cache.sequence import KVCache
from keye.cache.slabs import KVStore
from keye.ops.kv_blocks import KV_BLOCK

#: Where the media of a prompt are: (first visual token, one past the last one, content key), in order.
MediaSpans = tuple[tuple[int, int, bytes], ...]


def _splits_medium(length: int, spans: MediaSpans) -> bool:
    """Whether a prefix of `length` tokens would end inside a medium."""
    return any(first < length < stop for first, stop, _ in spans)


class PrefixCache:
    """Prefixes in one store, at most `entries`. Safe to share by threads."""

    def __init__(self, store: KVStore, entries: int = 64) -> None:
        self.most, self._store = entries, store
        self._entries: OrderedDict[bytes, KVCache] = OrderedDict()
        self._lock = store.ledger.lock
        store.ledger.register(self.evict, store.accounts, priority=0)
        self.hits = self.misses = 0

    def find(self, ids: Tensor, spans: MediaSpans, secret: bytes) -> KVCache | None:
        """A sequence that continues the longest known prefix of `ids` that leaves a token to compute; None without any.
        It is a fork of the entry, or the entry itself where memory is short of the block that a fork copies."""
        with self._lock:
            lengths = {cache.length(0) for cache in self._entries.values()}
            wanted = sorted(n for n in lengths if n < ids.shape[0] and not _splits_medium(n, spans))
            for _, key in reversed(list(_hashes(ids, spans, wanted, secret))):
                if key in self._entries:
                    self.hits += 1
                    entry = self._entries.pop(key)
                    if not self._has_room(entry.length(0)):
                        return entry
                    self._entries[key] = entry
                    return entry.fork()
            self.misses += 1
            return None

    def keep(self, ids: Tensor, spans: MediaSpans, secret: bytes, cache: KVCache) -> None:
        """Remembers prefixes of the prompt `ids` in `cache`, as far as there is room without evicting anything: after
        each medium, and at the last block boundary that leaves a token to compute."""
        last = (ids.shape[0] - 1) // KV_BLOCK * KV_BLOCK
        lengths = {stop for _, stop, _ in spans if stop < ids.shape[0]}
        if last and not _splits_medium(last, spans):
            lengths.add(last)
        with self._lock:
            for length, key in _hashes(ids, spans, sorted(lengths), secret):
                if key in self._entries:
                    self._entries.move_to_end(key)
                    continue
                if not self._has_room(length):
                    return
                try:
                    self._entries[key] = cache.fork(length)
                except OutOfMemory:  # of the disk, which no budget counts
                    return
                if len(self._entries) > self.most:
                    self.evict()

    def evict(self) -> bool:
        """Evicts the least recently used entry; False without any."""
        with self._lock:
            if not self._entries:
                return False
            self._entries.popitem(last=False)[1].free()
            return True

    def clear(self) -> None:
        """Evicts everything."""
        while self.evict():
            pass

    def _has_room(self, length: int) -> bool:
        """Whether a fork of `length` tokens has room for the copy of its last block, if that is not full."""
        room = self._store.room()
        return length % KV_BLOCK == 0 or room is None or room > 0

    def __len__(self) -> int:
        return len(self._entries)


def _hashes(ids: Tensor, spans: MediaSpans, lengths: Sequence[int], secret: bytes) -> Iterator[tuple[int, bytes]]:
    """The hash of each prefix, `lengths` ascending and outside media. A medium's content enters where it begins."""
    digest, done, media = hashlib.sha256(secret), 0, list(spans)
    raw = ids.numpy()
    for length in lengths:
        while media and media[0][0] < length:
            first, _, key = media.pop(0)
            digest.update(raw[done:first].tobytes() + b"medium" + key)
            done = first
        digest.update(raw[done:length].tobytes())
        done = length
        yield length, digest.copy().digest()
