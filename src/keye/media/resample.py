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
    import torch.nn.functional as F

    if frame.shape[:2] == size:
        return frame
    return _pixels(F.interpolate(_planes(frame), list(size), mode="bilinear", antialias=True))


def bicubic(frame: Pixels, size: Size) -> Pixels:
    """uint8 [H, W, 3] to uint8 [*size, 3] through float32, clamped and rounded (Preview)."""
    import torch.nn.functional as F

    if frame.shape[:2] == size:
        return frame
    resized = F.interpolate(_planes(frame).float(), list(size), mode="bicubic", antialias=True)
    return _pixels(resized.clamp(0, 255).round().byte())


def _planes(frame: Pixels) -> Tensor:
    """[1, 3, H, W] that shares the memory of the frame."""
    import torch

    return torch.from_numpy(frame if frame.flags.writeable else frame.copy()).permute(2, 0, 1)[None]


def _pixels(planes: Tensor) -> Pixels:
    return np.ascontiguousarray(planes[0].permute(1, 2, 0).numpy())
