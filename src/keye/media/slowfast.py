"""Slow and fast frames of Keye-VL 1.5: a frame that resembles the latest slow frame is fast and gets fewer tokens.

Frames come one at a time and none is kept but the latest slow one, so memory does not grow with the video. Patches are
compared in the 8-bit HSV colours of OpenCV, which are computed here to the last bit. Source: `get_frame_sim` and
`extract_slow_fast_frames` of keye-vl-utils 1.5.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from keye.config import ProcessorConfig
from keye.media.resample import Pixels, bilinear
from keye.media.sizes import Size, smart_resize

#: A patch is similar to the one before when the cosine between them is above this.
PATCH_SIMILARITY = 0.7
#: Most tokens of a frame while it is compared.
COMPARED_TOKENS = 256
#: Kinds of frames.
SLOW, FAST = 0, 1
# Numbers of the fixed-point arithmetic of OpenCV's 8-bit conversion.
_SHIFT = 12
_HUES = 180


def to_hsv(rgb: Pixels) -> Pixels:
    """8-bit HSV of uint8 RGB [..., 3]: hue 0..179 (two degrees each), saturation and value 0..255.

    OpenCV's integer arithmetic (`COLOR_RGB2HSV`): both divisions are multiplications by rounded reciprocals with 12
    fractional bits. Every quotient is looked up in a table of what that arithmetic gives.
    """
    red, green, blue = (np.ascontiguousarray(rgb[..., channel]) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    saturation_of, hue_of = _tables()
    # The sector of the hue circle, and the offset in it from -chroma to chroma, which lies in int16.
    is_red, is_green = value == red, value == green
    offset = np.where(is_red, green, np.where(is_green, blue, red)).astype(np.int16)
    offset -= np.where(is_red, blue, np.where(is_green, red, green))
    sector = np.where(is_red, np.uint8(0), np.where(is_green, np.uint8(1), np.uint8(2)))
    hsv = np.empty(rgb.shape, dtype=np.uint8)
    hsv[..., 0] = hue_of[(sector.astype(np.int32) << 17) + (chroma.astype(np.int32) << 9) + (offset + 256)]
    hsv[..., 1] = saturation_of[(value.astype(np.int32) << 8) + chroma]
    hsv[..., 2] = value
    return hsv


@lru_cache(maxsize=1)
def _tables() -> tuple[Pixels, Pixels]:
    """Saturation by (value, chroma) and hue by (sector, chroma, offset + 256), both flat."""
    reciprocal = np.zeros(256)
    reciprocal[1:] = 1 / np.arange(1, 256)
    half = 1 << (_SHIFT - 1)
    level = np.arange(256)
    by_value = np.rint((255 << _SHIFT) * reciprocal).astype(np.int64)
    saturation = (level[None, :] * by_value[:, None] + half) >> _SHIFT
    by_chroma = np.rint((_HUES << _SHIFT) / 6 * reciprocal).astype(np.int64)
    sector, chroma, offset = np.ogrid[:3, :256, -256:256]
    hue = ((offset + 2 * sector * chroma) * by_chroma[chroma] + half) >> _SHIFT
    hue += np.where(hue < 0, _HUES, 0)
    return np.clip(saturation, 0, 255).astype(np.uint8).ravel(), np.clip(hue, 0, 255).astype(np.uint8).ravel()


@dataclass(frozen=True)
class _Patches:
    """HSV patches of a frame: float32 [n, values], and their norms float32 [n]."""

    values: NDArray[np.float32]
    norms: NDArray[np.float32]


def _patches(rgb: Pixels, side: int) -> _Patches:
    height, width, _ = rgb.shape
    blocks = to_hsv(rgb).reshape(height // side, side, width // side, side, 3).transpose(0, 2, 1, 3, 4)
    values = blocks.reshape(-1, side * side * 3).astype(np.float32)
    return _Patches(values, np.sqrt(np.einsum("nv,nv->n", values, values)))


def similarity(before: Pixels, now: Pixels, side: int = 28) -> float:
    """Share of patches of `now` that resemble those of `before`, uint8 RGB [H, W, 3] with sides of whole patches.

    Patches that are black in both frames do not count; NaN when all are.
    """
    return _share(_patches(before, side), _patches(now, side))


def _share(before: _Patches, now: _Patches) -> float:
    # Norms of 8-bit patches are 0 or at least 1.
    seen = (before.norms > 0) | (now.norms > 0)
    count = int(seen.sum())
    if count == 0:
        return float("nan")
    dots = np.einsum("nv,nv->n", before.values, now.values)
    # A patch that is black in one frame only has the cosine 0, not 0 / 0.
    similar = dots > np.float32(PATCH_SIMILARITY) * before.norms * now.norms
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
        patches = _patches(bilinear(frame, self._size), self.config.factor)
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
