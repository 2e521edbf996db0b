"""Visual tokens of a prompt, encoded piece by piece while frames are still being decoded (Chunk ViT).

Frames are encoded in groups that the media alone decide, so the tokens are the same to the last bit whatever the steps
are and whenever frames arrive. Knows patches and visual tokens; scheduling is the caller's.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keye.cache.vision import VisionCache
from keye.errors import KeyeWarning
from keye.media.pixels.patches import PixelReader
from keye.media.processor import MediaItem
from keye.models.adapters import Adapter
from keye.models.keye import KeyeModel
from keye.models.vision import PATCHES_PER_CHUNK

#: Patches that are encoded at once in main memory: more do not make a core faster, and would delay the replies that are
#: generated meanwhile. Other devices take full chunks.
GROUP_PATCHES = 256
#: The ledger's account.
ACCOUNT = "vision"


@dataclass(frozen=True)
class _Group:
    """Rows of one medium that are encoded together, in patches and in visual tokens."""

    rows: int
    patches: int
    tokens: int


@dataclass(frozen=True)
class _Part:
    """Visual tokens `start .. start + len(tokens)` of the prompt: `nbytes` reserved in the ledger, or those of `key` in
    the cache."""

    start: int
    tokens: Tensor
    nbytes: int = 0
    key: bytes | None = None

    @property
    def stop(self) -> int:
        return self.start + self.tokens.shape[0]


class VisionJob:
    """The visual tokens of `media`, in order. `ready` of `total` are there; each call of `step` encodes some more.

    With `first`, the media that end before visual token `first` are left out: their keys and values are stored already.
    A medium that `cache` knows is neither decoded nor encoded, others are added to it. Tokens held here count in the
    account `vision` of its ledger. An `adapter` may change what is encoded; the keys of the media tell. Close a job
    that is not needed any more: it may have a decode worker.
    """

    def __init__(
        self, model: KeyeModel, media: Sequence[MediaItem], *, first: int = 0, cache: VisionCache | None = None,
        adapter: Adapter | None = None,
    ) -> None:  # fmt: skip
        self._adapter = adapter
        self._model, self._cache = model, cache or VisionCache(0)
        self._ledger = self._cache.ledger
        self.total, self.ready = sum(item.visual_tokens for item in media), 0
        #: What was tolerated of the media that are complete, and of those that were read before.
        named = [(item.key, item.plan.name) for item in media if item.key is not None and item.plan is not None]
        self._notes = [note for key, name in named for note in self._cache.notes(key, name)]
        self._parts: list[_Part] = []
        self._forgotten = 0
        #: Whether memory was full once: then nothing is retained for the cache any more.
        self._is_scarce = False
        stops = list(accumulate(item.visual_tokens for item in media))
        #: The media that are still to be encoded, each with its first visual token.
        self._media = [(n - item.visual_tokens, item) for n, item in zip(stops, media, strict=True) if n > first]
        self._groups: list[_Group] = []
        self._reader: PixelReader | None = None
        self._item_start = 0
        if self._media:
            self.ready = self._media[0][0]
        self._next_medium()
        if not self._media:
            self.ready = self.total

    @property
    def done(self) -> bool:
        """Whether all visual tokens are ready."""
        return self.ready == self.total

    @property
    def waiting(self) -> bool:
        """Whether the next patches are still being decoded; `step` does nothing then."""
        return bool(self._groups) and self._reader is not None and not self._reader.has(self._groups[0].rows)

    def will_keep(self, key: bytes) -> bool:
        """Whether a medium of this key is still to be encoded and will go into the cache then."""
        return any(item.key == key and self._is_cacheable(item) for _, item in self._media)

    @torch.inference_mode()
    def step(self, patches: int, *, required: bool = True) -> int:
        """Encodes about `patches` patches, at least one group; returns how many it encoded, 0 when all are done or the
        next are not decoded yet. Where there is memory for none, `OutOfMemory`, or 0 if the step is not `required`, and
        nothing has changed. Raises what went wrong with a medium; after that only `close` makes sense."""
        count = 0
        while self._groups and self._reader is not None and not self.waiting:
            if count and count + self._groups[0].patches > patches:
                break
            nbytes = self._bytes_of(self._groups[0].tokens)
            if not self._ledger.try_reserve(ACCOUNT, nbytes):
                self._is_scarce = True
                self.forget(self._forgotten)  # what is retained for the cache
                if not self._ledger.try_reserve(ACCOUNT, nbytes):
                    if count or not required:
                        return count
                    self._ledger.reserve(ACCOUNT, nbytes)
            group = self._groups.pop(0)
            try:
                pixels, grids = self._reader.take(group.rows).tensors()
                with self._model.adapter_rows.use_for_all(self._adapter):
                    tokens = self._model.encode_vision(pixels.to(self._model.device), grids)
            except BaseException:
                self._ledger.release(ACCOUNT, nbytes)
                raise
            self._parts.append(_Part(self.ready, tokens, nbytes))
            self.ready = self._parts[-1].stop
            self.forget(self._forgotten)  # of a medium that was begun before, what was computed then
            count += group.patches
            if not self._groups:
                self._finish_medium()
        return count

    def tokens(self, start: int, stop: int) -> Tensor:
        """Visual tokens start .. stop, [stop - start, d]; they must be ready and not forgotten."""
        assert self._forgotten <= start <= stop <= self.ready
        if start == stop:
            return torch.empty(0, self._model.config.text.hidden_size, dtype=self._model.dtype)
        place = bisect_right(self._parts, start, key=lambda part: part.start) - 1
        pieces: list[Tensor] = []
        while start < stop:
            part = self._parts[place]
            pieces.append(part.tokens[start - part.start : stop - part.start])
            start, place = part.stop, place + 1
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def forget(self, before: int) -> None:
        """Frees visual tokens before this one; a medium on its way to the cache is retained until it is complete."""
        self._forgotten = max(self._forgotten, before)
        retained = self._item_start if self._caches_medium else self._forgotten
        count = bisect_right(self._parts, min(self._forgotten, retained), key=lambda part: part.stop)
        self._free(self._parts[:count])
        self._parts = self._parts[count:]

    def add_notes(self, notes: list[KeyeWarning]) -> None:
        """Adds to `notes` what was tolerated of media that were completed since the last call, once each."""
        known = set(map(str, notes))
        notes += [note for note in self._notes if str(note) not in known]
        self._notes = []

    def close(self) -> None:
        """Frees everything and ends the decode worker; may be called at any time, and twice."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self._media, self._groups = [], []
        self._free(self._parts)
        self._parts = []

    @property
    def _caches_medium(self) -> bool:
        """Whether the medium being encoded will go into the cache."""
        return bool(self._media) and self._is_cacheable(self._media[0][1])

    def _is_cacheable(self, item: MediaItem) -> bool:
        fits = self._cache.accepts(self._bytes_of(item.visual_tokens))
        return item.key is not None and fits and not self._is_scarce

    def _bytes_of(self, tokens: int) -> int:
        """Bytes of visual tokens."""
        return tokens * self._model.config.text.hidden_size * self._model.dtype.itemsize

    def _next_medium(self) -> None:
        """Starts the next medium that has to be encoded; takes those before it from the cache."""
        while self._media:
            self._item_start, item = self._media[0]
            cached = None if item.key is None else self._cache.acquire(item.key)
            if cached is None:
                self._reader = item.pixels.open()
                limit = GROUP_PATCHES if self._model.device.type == "cpu" else PATCHES_PER_CHUNK
                self._groups = list(_groups(item.grid_thw, limit, self._model.config.vision.spatial_merge_size))
                return
            self._parts.append(_Part(self._item_start, cached, key=item.key))
            self.ready = self._parts[-1].stop
            self._media.pop(0)

    def _finish_medium(self) -> None:
        """Moves a complete medium to the cache, and starts the next."""
        assert self._reader is not None
        notes = self._reader.notes()
        self._reader.close()
        self._reader = None
        start, item = self._media[0]
        self._notes += notes
        if notes and item.key is not None and item.plan is not None:
            self._cache.note(item.key, item.plan.name, notes)
        if self._caches_medium and item.key is not None:
            own = [part for part in self._parts if part.start >= start]
            joined = torch.cat([part.tokens for part in own])
            nbytes = joined.numel() * joined.element_size()
            with self._ledger.lock:  # between two accounts the bytes are free, and no other thread may take them
                self._free(own)
                del self._parts[len(self._parts) - len(own) :]
                if (shared := self._cache.put(item.key, joined)) is not None:
                    self._parts.append(_Part(start, shared, key=item.key))
                else:
                    self._ledger.reserve(ACCOUNT, nbytes)
                    self._parts.append(_Part(start, joined, nbytes))
        self._media.pop(0)
        self._next_medium()

    def _free(self, parts: Sequence[_Part]) -> None:
        for part in parts:
            self._ledger.release(ACCOUNT, part.nbytes)
            if part.key is not None:
                self._cache.release(part.key)


def _groups(grid_thw: NDArray[np.int64], limit: int, merge: int) -> Iterator[_Group]:
    """Consecutive rows of one size, as many as `limit` patches hold, at least one."""
    sizes = grid_thw.prod(axis=1).tolist()
    row = 0
    while row < len(sizes):
        most, count = max(1, limit // sizes[row]), 1
        while count < most and row + count < len(sizes) and (grid_thw[row + count] == grid_thw[row]).all():
            count += 1
        patches = count * sizes[row]
        yield _Group(count, patches, patches // merge**2)
        row += count
