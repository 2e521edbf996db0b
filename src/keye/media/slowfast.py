"""Slow and fast frames of Keye-VL 1.5: a frame that resembles the latest slow frame is fast and gets fewer tokens.

Frames come one at a time and none is kept but the latest slow one, so memory does not grow with the video. Patches are
compared in the 8-bit HSV colours of OpenCV, which are computed here to the last bit. Source: `get_frame_sim` and
`extract_slow_fast_frames` of keye-vl-utils 1.5.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from keye.config import ProcessorConfig
from keye.media.resample import Pixels, bilinear_planes, planes_of
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


def to_hsv(planes: Tensor) -> Tensor:
    """8-bit HSV, uint8 [3, H, W], of uint8 RGB planes: hue 0..179 (two degrees each), saturation and value 0..255.

    OpenCV's integer arithmetic (`COLOR_RGB2HSV`): both divisions are multiplications by rounded reciprocals with 12
    fractional bits, so that every colour comes out the same.
    """
    import torch

    red, green, blue = planes.unbind(0)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    by_value, by_chroma = _reciprocals()
    chroma_index = chroma.int().flatten()
    saturation = by_value.index_select(0, value.int().flatten()).mul_(chroma_index).add_(_HALF)
    r, g, b, c = red.short(), green.short(), blue.short(), chroma.short()
    sector = torch.where(value == green, b - r + 2 * c, r - g + 4 * c)
    hue = torch.where(value == red, g - b, sector).flatten().int()
    hue = hue.mul_(by_chroma.index_select(0, chroma_index)).add_(_HALF).bitwise_right_shift_(_SHIFT)
    hue += (hue < 0) * _HUES
    shape = value.shape
    return torch.stack([hue.byte().view(shape), (saturation >> _SHIFT).byte().view(shape), value])


@lru_cache(maxsize=1)
def _reciprocals() -> tuple[Tensor, Tensor]:
    """int32 [256] each: what a chroma is multiplied by for the saturation, by value, and for the hue, by chroma."""
    import torch

    level = np.maximum(np.arange(256), 1)
    scales = np.rint((255 << _SHIFT) / level), np.rint((_HUES << _SHIFT) / (6.0 * level))
    by_value, by_chroma = (torch.from_numpy(np.where(np.arange(256) > 0, s, 0).astype(np.int32)) for s in scales)
    return by_value, by_chroma


@dataclass(frozen=True)
class _Patches:
    """HSV of a frame as float32 [3, rows, side, columns, side], and the norms of its patches, float32 [rows, columns].

    Sums of squares of 8-bit levels are exact to within a part in a million in float32, far from what decides.
    """

    values: Tensor
    norms: Tensor


def _patches(planes: Tensor, side: int) -> _Patches:
    _, height, width = planes.shape
    values = to_hsv(planes).float().view(3, height // side, side, width // side, side)
    return _Patches(values, _dots(values, values).sqrt_())


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((0, 2, 4))


def similarity(before: Pixels, now: Pixels, side: int = 28) -> float:
    """Share of patches of `now` that resemble those of `before`, uint8 RGB [H, W, 3] with sides of whole patches.

    Patches that are black in both frames do not count; NaN when all are.
    """
    return _share(_patches(planes_of(before)[0], side), _patches(planes_of(now)[0], side))


def _share(before: _Patches, now: _Patches) -> float:
    # Norms of 8-bit patches are 0 or at least 1.
    seen = (before.norms > 0) | (now.norms > 0)
    count = int(seen.sum())
    if count == 0:
        return float("nan")
    # A patch that is black in one frame only has the cosine 0, not 0 / 0.
    similar = _dots(before.values, now.values) > PATCH_SIMILARITY * before.norms * now.norms
    return float(np.float32(int((similar & seen).sum())) / np.float32(count))


class SlowFastClassifier:
    """Tells the frames of one video apart as they come: `push` returns `SLOW` or `FAST`."""

    def __init__(self, config: ProcessorConfig, min_frame_similarity: float | None = None) -> None:
        self.config = config
        self.threshold = config.min_frame_similarity if min_frame_similarity is None else min_frame_similarity
        self._size: Size | None = None
        self._slow: _Patches | None = None

    def push(self, frame: Pixels) -> int:
        """The kind of the next frame, uint8 RGB [H, W, 3]; all frames of a video have one size."""
        if self._size is None:
            height, width, _ = frame.shape
            self._size = compared_size(height, width, self.config)
        patches = _patches(bilinear_planes(frame, self._size), self.config.factor)
        # The first frame is slow. NaN, both frames being black, is below no threshold.
        if self._slow is None or _share(self._slow, patches) < self.threshold:
            self._slow = patches
            return SLOW
        return FAST


def compared_size(height: int, width: int, config: ProcessorConfig) -> Size:
    """The size at which frames are compared."""
    token = config.token_pixels
    return smart_resize(
        height,
        width,
        factor=config.factor,
        min_pixels=config.video_min_tokens * token,
        max_pixels=COMPARED_TOKENS * token,
    )


def frame_types(
    frames: Iterable[Pixels], config: ProcessorConfig, min_frame_similarity: float | None = None
) -> list[int]:
    """The kind of every frame of a video, 0 slow and 1 fast."""
    classifier = SlowFastClassifier(config, min_frame_similarity)
    return [classifier.push(frame) for frame in frames]
