"""`keye.ops.scales` by the compiled core, one group a lane; what it cannot take is computed by the definition.

The core takes float32 groups of 16, 32 .. 256 numbers in main memory.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from keye.config import kernel_config
from keye.ops import scales as definition
from keye.ops.cpu import build as cpu_build
from keye.ops.scales import Scales

_MULTIPLE, _MOST = 16, 256


def search_symmetric(x: Tensor, low: int, high: int) -> Scales:
    """As `keye.ops.scales.search_symmetric`."""
    core = _core(x)
    return definition.search_symmetric(x, low, high) if core is None else core.search(x, low, high, affine=False)


def search_affine(x: Tensor, levels: int) -> Scales:
    """As `keye.ops.scales.search_affine`."""
    core = _core(x)
    return definition.search_affine(x, levels) if core is None else core.search(x, 0, levels, affine=True)


def encode(x: Tensor, scale: Tensor, minimum: Tensor | None, low: int, high: int) -> Tensor:
    """As `keye.ops.scales.encode`."""
    core = _core(x)
    if core is None:
        return definition.encode(x, scale, minimum, low, high)
    return core.encode(x, scale, minimum, low, high)


class ScaleLibrary:
    """The functions of one library. Each call runs on the thread that makes it; several may run at once."""

    def __init__(self, library: Path) -> None:
        core = ctypes.CDLL(str(library))
        address, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        self._search, self._encode = core.keye_search_scales, core.keye_encode
        self._search.argtypes = (address, count, ctypes.c_int32, number, number, address, address)
        self._encode.argtypes = (address, count, ctypes.c_int32, number, number, address, address, address)
        self._search.restype = self._encode.restype = None

    def search(self, x: Tensor, low: int, high: int, *, affine: bool) -> Scales:
        """Scales of groups [G, n], with minima where they are affine."""
        x = x.contiguous()
        scale = x.new_empty(len(x))
        minimum = x.new_empty(len(x)) if affine else None
        self._search(x.data_ptr(), len(x), x.shape[1], low, high, scale.data_ptr(), _address(minimum))
        return Scales(scale, minimum)

    def encode(self, x: Tensor, scale: Tensor, minimum: Tensor | None, low: int, high: int) -> Tensor:
        """uint8 [G, n]: codes less `low`."""
        x, scale = x.contiguous(), scale.contiguous()
        minimum = None if minimum is None else minimum.contiguous()
        codes = torch.empty(x.shape, dtype=torch.uint8)
        self._encode(x.data_ptr(), len(x), x.shape[1], low, high, scale.data_ptr(), _address(minimum), codes.data_ptr())
        return codes


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _core(x: Tensor) -> ScaleLibrary | None:
    """The library for groups [G, n] that it can take."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.shape[1] % _MULTIPLE or x.shape[1] > _MOST or not len(x):
        return None
    return _load()


@cache
def _load() -> ScaleLibrary | None:
    """Built where it was not; None where the definition must do."""
    if kernel_config().kernels == "reference":
        return None
    library = cpu_build.ready().library
    return None if library is None else ScaleLibrary(library)
