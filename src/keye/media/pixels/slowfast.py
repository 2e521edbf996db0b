"""Slow and fast frames of Keye-VL 1.5: a frame that resembles the latest slow frame is fast and gets fewer tokens.

Only the latest slow frame is kept. Patches are compared in the 8-bit HSV colours of OpenCV, computed here to the last
bit. Source: `get_frame_sim` and `extract_slow_fast_frames` of keye-vl-utils 1.5.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from keye.config import ProcessorConfig
from keye.media.pixels.patches import Pixels, as_planes, resize_planes
from keye.media.sizes import Size, smart_resize

if TYPE_CHECKING:
    from torch import Tensor

#: A patch is similar to the one before when the cosine between them is above this.
PATCH_SIMILARITY = 0.7
#: Most tokens of a frame while it is compared.
COMPARED_TOKENS = 256
#: Kinds of frames.
SLOW, FAST = 0, 1
# Numbers of the fixed-point arithmetic of OpenCV's 8-bit conversion.
_SHIFT = 12
_HALF = 1 << (_SHIFT - 1)
_HUES = 180
# A colour's place in the circle, before it is divided by the chroma: from red to blue, g - b, to red, r - g + 4 chroma.
_LEAST_PLACE, _MOST_PLACE = -255, 5 * 255


def to_hsv(planes: Tensor) -> Tensor:
    """8-bit HSV, uint8 [3, H, W], of uint8 RGB planes: hue 0..179 (two degrees each), saturation and value 0..255.

    OpenCV's integer arithmetic (`COLOR_RGB2HSV`) with 12 fractional bits, looked up: saturation by value and chroma,
    hue by chroma and the place in the colour circle. Masks are factors, which costs less than choosing.
    """
    import torch

    red, green, blue = planes.unbind(0)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    saturations, hues = _tables()
    hsv = torch.empty_like(planes, memory_format=torch.contiguous_format)
    hsv[2] = value
    chroma_index = chroma.int()
    index = value.int().mul_(256).add_(chroma_index).flatten()
    torch.index_select(saturations, 0, index, out=hsv[1].view(-1))
    r, g, b, c = red.short(), green.short(), blue.short(), chroma.short()
    place = (r - g).add_(c, alpha=4)
    place += (b - r).add_(c, alpha=2).sub_(place).mul_(value == green)
    place += (g - b).sub_(place).mul_(value == red)
    index = place.int().sub_(_LEAST_PLACE).mul_(256).add_(chroma_index).flatten()
    torch.index_select(hues, 0, index, out=hsv[0].view(-1))
    return hsv


@lru_cache(maxsize=1)
def _tables() -> tuple[Tensor, Tensor]:
    """uint8: the saturation at value * 256 + chroma, and the hue at (place - `_LEAST_PLACE`) * 256 + chroma."""
    import torch

    level, place = np.arange(256), np.arange(_LEAST_PLACE, _MOST_PLACE + 1)
    divisor = np.maximum(level, 1)
    by_value, by_chroma = (
        np.where(level > 0, np.rint(scale), 0).astype(np.int64)
        for scale in ((255 << _SHIFT) / divisor, (_HUES << _SHIFT) / (6.0 * divisor))
    )
    saturation = (level * by_value[:, None] + _HALF) >> _SHIFT
    hue = (place[:, None] * by_chroma + _HALF) >> _SHIFT
    hue += (hue < 0) * _HUES
    # Entries of a chroma above the value, or of a place too far for the chroma, are never read.
    saturations, hues = (torch.from_numpy(table.astype(np.uint8).ravel()) for table in (saturation, hue))
    return saturations, hues


def _cut_patches(planes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """HSV of a frame, float32 [3, rows, side, columns, side], and the norms of its patches, float64 [rows, columns]."""
    _, height, width = planes.shape
    values = to_hsv(planes).float().view(3, height // side, side, width // side, side)
    return values, _multiply(values, values).sqrt_()


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of patches, float64 [rows, columns], exact: a row of a patch of 8-bit levels stays below 2^24."""
    import torch

    return (a * b).sum(4).sum((0, 2), dtype=torch.float64)


def similarity(before: Pixels, now: Pixels, side: int = 28) -> float:
    """Share of patches of `now` that resemble those of `before`, uint8 RGB [H, W, 3] with sides of whole patches.

    Patches that are black in both frames do not count; NaN when all are.
    """
    return _compare(_cut_patches(as_planes(before)[0], side), _cut_patches(as_planes(now)[0], side))


def _compare(before: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]) -> float:
    (values_before, norms_before), (values, norms) = before, now
    # Norms of 8-bit patches are 0 or at least 1.
    seen = (norms_before > 0) | (norms > 0)
    count = int(seen.sum())
    if count == 0:
        return float("nan")
    # A patch that is black in one frame only has the cosine 0, not 0 / 0.
    similar = _multiply(values_before, values) > PATCH_SIMILARITY * norms_before * norms
    return float(np.float32(int((similar & seen).sum())) / np.float32(count))


class SlowFastClassifier:
    """Tells the frames of one video apart as they come: `push` returns `SLOW` or `FAST`."""

    def __init__(self, config: ProcessorConfig, min_frame_similarity: float | None = None) -> None:
        self.config = config
        self.threshold = config.min_frame_similarity if min_frame_similarity is None else min_frame_similarity
        self._size: Size | None = None
        self._slow: tuple[Tensor, Tensor] | None = None

    def push(self, frame: Pixels) -> int:
        """The kind of the next frame, uint8 RGB [H, W, 3]; all frames of a video have one size."""
        if self._size is None:
            height, width, _ = frame.shape
            self._size = compared_size(height, width, self.config)
        patches = _cut_patches(resize_planes(frame, self._size), self.config.factor)
        # The first frame is slow. NaN, both frames being black, is below no threshold.
        if self._slow is None or _compare(self._slow, patches) < self.threshold:
            self._slow = patches
            return SLOW
        return FAST


def compared_size(height: int, width: int, config: ProcessorConfig) -> Size:
    """The size at which frames are compared."""
    token = config.token_pixels
    low, high = config.video_min_tokens * token, COMPARED_TOKENS * token
    return smart_resize(height, width, factor=config.factor, min_pixels=low, max_pixels=high)


def frame_types(
    frames: Iterable[Pixels], config: ProcessorConfig, min_frame_similarity: float | None = None
) -> list[int]:
    """The kind of every frame of a video, 0 slow and 1 fast."""
    classifier = SlowFastClassifier(config, min_frame_similarity)
    return [classifier.push(frame) for frame in frames]
