"""Where tensors of a checkpoint come from: the interface that every file format implements, and filling a model.

A source of weights is a mapping of official tensor names to `TensorSource`s. Knows shapes and bytes, not networks.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from keye.errors import KeyeError
from keye.ops.quantized import QuantFormat, QuantTensor

#: Pieces of work that are under way at once: while one waits for the disk another is copied, and a file is still read
#: nearly from front to back.
READERS = 4
_HUGE_PAGE = 2 * 2**20


class WeightsError(KeyeError):
    """A checkpoint's tensors cannot be read, or do not fit the model that its config describes."""


class TensorSource(Protocol):
    """A tensor that can be written into a place of the same shape, dequantised on the way where it is stored so."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """What it is stored as, in the words of its file format."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in its file, scales included."""

    @property
    def is_readable(self) -> bool:
        """Whether `pieces` can turn what is stored into floating-point numbers."""

    @property
    def format(self) -> QuantFormat | None:
        """The format that keeps what is stored bit for bit; None for tensors that are not quantised."""

    @property
    def place(self) -> tuple[str, int]:
        """Sorting by it puts tensors in the order in which they are read fastest."""

    def part(self, begin: int, end: int) -> TensorSource:
        """Rows `begin .. end` along the first dimension, which cost no more than they are."""

    def quantized(self) -> QuantTensor:
        """The whole in `format`, which is not None."""

    def pieces(self, target: Tensor) -> Iterator[Callable[[], object]]:
        """Work that together fills `target`, a tensor of this shape, converting to its dtype and device; in any order,
        on any thread. `WeightsError` where the file does not hold what it declared."""


@dataclass(frozen=True)
class MemoryTensor:
    """A tensor that is in memory already."""

    tensor: Tensor
    format: QuantFormat | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def is_readable(self) -> bool:
        return self.tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)

    @property
    def place(self) -> tuple[str, int]:
        return "", 0

    def part(self, begin: int, end: int) -> MemoryTensor:
        return MemoryTensor(self.tensor[begin:end])

    def quantized(self) -> QuantTensor:
        raise AssertionError("floating-point numbers are in no quantised format")

    def pieces(self, target: Tensor) -> Iterator[Callable[[], object]]:
        yield lambda: target.copy_(self.tensor)


@dataclass(frozen=True)
class _Numbers:
    """A tensor whose numbers alone count, in whatever format they are stored."""

    source: TensorSource
    format: QuantFormat | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    @property
    def is_readable(self) -> bool:
        return self.source.is_readable

    @property
    def place(self) -> tuple[str, int]:
        return self.source.place

    def part(self, begin: int, end: int) -> _Numbers:
        return _Numbers(self.source.part(begin, end))

    def quantized(self) -> QuantTensor:
        raise AssertionError("floating-point numbers are in no quantised format")

    def pieces(self, target: Tensor) -> Iterator[Callable[[], object]]:
        return self.source.pieces(target)


def dequantized(source: TensorSource) -> TensorSource:
    """The same tensor without a format to be kept in, where `pieces` can read it."""
    return _Numbers(source) if source.format is not None and source.is_readable else source


def ask_for_huge_pages(tensor: Tensor) -> bool:
    """Asks the kernel to back a large CPU tensor that was not written to yet with huge pages: filling it then takes
    hundreds of times fewer page faults, which cost more than a fast disk. False where they are not available."""
    if tensor.device.type != "cpu" or tensor.nbytes < 2 * _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    page = mmap.PAGESIZE
    begin = -(-tensor.data_ptr() // page) * page
    length = tensor.data_ptr() + tensor.nbytes - begin
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise(begin, length, mmap.MADV_HUGEPAGE) == 0


def copy_all(work: Iterable[Callable[[], object]]) -> None:
    """Does the pieces of work on `READERS` threads; the first error stops the rest. Torch works on one thread in each,
    since pieces are small."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(READERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for done in [pool.submit(piece) for piece in work]:
                    done.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)  # which threads that start later take over
