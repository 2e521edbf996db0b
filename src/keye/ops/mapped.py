"""Files as tensors: mapped into memory, so that the system reads pages when they are touched and keeps those that are
used again. Knows bytes, not what they mean."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor


class _Memory:
    """Bytes of a map as numpy takes them. Also those of a read-only map, which torch would warn of: nothing writes to
    them, `Slab.writable` is false."""

    def __init__(self, mapped: mmap.mmap, offset: int, nbytes: int) -> None:
        self._mapped = mapped
        base = np.frombuffer(mapped, dtype=np.uint8).ctypes.data
        self.__array_interface__: dict[str, Any] = {
            "data": (base + offset, False), "shape": (nbytes,), "typestr": "|u1", "version": 3,
        }  # fmt: skip


def map_tensor(mapped: mmap.mmap, offset: int, shape: Sequence[int]) -> Tensor:
    """A uint8 tensor of the bytes of a map from `offset` on. It must not be written to if the map is read only, and
    keeps the file mapped, also when that is removed."""
    nbytes = torch.Size(shape).numel()
    assert 0 <= offset <= len(mapped) - nbytes
    with torch.inference_mode(False):
        return torch.from_numpy(np.asarray(_Memory(mapped, offset, nbytes))).view(tuple(shape))


def advise(mapped: mmap.mmap, advice: str, start: int, nbytes: int) -> None:
    """Says how bytes of a map will be read: `MADV_RANDOM` for single rows, around which nothing is read ahead, or
    `MADV_WILLNEED` for all of it, soon."""
    value = getattr(mmap, advice, None)  # not on every system
    if value is not None and nbytes:
        mapped.madvise(value, start, nbytes)


def fetch_rows(rows: Tensor, chosen: Tensor) -> None:
    """Asks the system for some rows (int64 [n]) of a mapped tensor [N, row_bytes] all at once: read one by one as they
    are touched, they take several times as long. What is in memory already costs about a microsecond a row."""
    if _MADVISE is None:
        return
    first = rows.data_ptr() + chosen * rows.shape[1]
    pages = torch.cat((first, first + rows.shape[1] - 1)).div(mmap.PAGESIZE, rounding_mode="floor").unique()
    breaks = (pages.diff() != 1).nonzero().flatten() + 1
    for run in pages.tensor_split(breaks):
        if len(run):
            _MADVISE(int(run[0]) * mmap.PAGESIZE, len(run) * mmap.PAGESIZE, mmap.MADV_WILLNEED)


#: The system's function, which takes addresses; that of `mmap` takes single maps only.
_MADVISE: Final = ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_WILLNEED") else None
if _MADVISE is not None:
    _MADVISE.argtypes, _MADVISE.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
