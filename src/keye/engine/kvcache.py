"""The in-memory KV store of one sequence: contiguous tensors that grow by doubling.

Implements `keye.models.attention.SequenceCache`. Knows nothing of models beyond shapes.
"""

from __future__ import annotations

from torch import Tensor


class KVCache:
    """Keys, values and indexer keys of every layer of one sequence."""

    def __init__(self, layers: int) -> None:
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers
        self._index: list[Tensor | None] = [None] * layers
        self._lengths = [0] * layers

    def length(self, layer: int) -> int:
        """Tokens stored for `layer`."""
        return self._lengths[layer]

    def append(self, layer: int, k: Tensor, v: Tensor, index_k: Tensor | None) -> None:
        """Adds n tokens: `k`, `v` [n, G, D]; `index_k` [n, I] or None."""
        start = self._lengths[layer]
        for store, new in ((self._keys, k), (self._values, v), (self._index, index_k)):
            if new is not None:
                store[layer] = _write(store[layer], start, new)
        self._lengths[layer] = start + k.shape[0]

    def index_keys(self, layer: int, start: int, stop: int) -> Tensor:
        """Indexer keys [stop - start, I] of these positions."""
        stored = self._index[layer]
        assert stored is not None and stop <= self._lengths[layer]
        return stored[start:stop]

    def rows(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [N, G, D] of `positions` (int64 [N])."""
        keys, values = self._keys[layer], self._values[layer]
        assert keys is not None and values is not None
        return keys[positions], values[positions]

    def pages(self, layer: int) -> None:
        """This store is not paged."""

    def fork(self) -> KVCache:
        """An independent copy: several questions may continue from one prompt."""
        copy = KVCache(len(self._lengths))
        copy._lengths = list(self._lengths)
        for source, target in (
            (self._keys, copy._keys),
            (self._values, copy._values),
            (self._index, copy._index),
        ):
            for layer, tensor in enumerate(source):
                target[layer] = None if tensor is None else tensor[: self._lengths[layer]].clone()
        return copy

    def truncate(self, length: int) -> None:
        """Forgets every token from `length` on, in all layers."""
        self._lengths = [min(length, n) for n in self._lengths]

    def nbytes(self) -> int:
        """Bytes held, capacity included."""
        stores = (*self._keys, *self._values, *self._index)
        return sum(t.numel() * t.element_size() for t in stores if t is not None)


def _write(stored: Tensor | None, start: int, new: Tensor) -> Tensor:
    """Puts `new` at rows start .. start + n, growing the storage to at least twice its size when it is full."""
    need = start + new.shape[0]
    if stored is None or stored.shape[0] < need:
        grown = new.new_empty(max(need + 64, 0 if stored is None else 2 * stored.shape[0]), *new.shape[1:])
        if stored is not None:
            grown[:start] = stored[:start]
        stored = grown
    stored[start:need] = new.detach()
    return stored
