"""Resizing of decoded frames as the official utilities of Preview and 1.5 do it: torch's antialiased filters.

Both work on uint8. torch is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from keye.media.sizes import Size

if TYPE_CHECKING:
    from torch import Tensor

Pixels = NDArray[np.uint8]


def bilinear(frame: Pixels, size: Size) -> Pixels:
    """uint8 [H, W, 3] to uint8 [*size, 3] in torch's integer arithmetic (1.5)."""
    return frame if frame.shape[:2] == size else _pixels(bilinear_planes(frame, size)[None])


def bilinear_planes(frame: Pixels, size: Size) -> Tensor:
    """`bilinear` to colour planes, uint8 [3, *size], as torch leaves them."""
    import torch.nn.functional as F

    return F.interpolate(planes_of(frame), list(size), mode="bilinear", antialias=True)[0]


def bicubic(frame: Pixels, size: Size) -> Pixels:
    """uint8 [H, W, 3] to uint8 [*size, 3] through float32, clamped and rounded (Preview)."""
    import torch.nn.functional as F

    if frame.shape[:2] == size:
        return frame
    resized = F.interpolate(planes_of(frame).float(), list(size), mode="bicubic", antialias=True)
    return _pixels(resized.clamp(0, 255).round().byte())


def planes_of(frame: Pixels) -> Tensor:
    """uint8 [1, 3, H, W] that shares the memory of the frame."""
    import torch

    return torch.from_numpy(frame if frame.flags.writeable else frame.copy()).permute(2, 0, 1)[None]


def _pixels(planes: Tensor) -> Pixels:
    """[H, W, 3] that shares the memory of the planes: cutting patches reads it in any order."""
    return planes[0].permute(1, 2, 0).numpy()
