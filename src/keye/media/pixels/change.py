"""How much of a picture changes from one frame to another: in all, or beyond what motion explains.

Motion moves blocks of a picture, light scales its levels; after a hard cut its blocks are nowhere in the frame before.
Thumbnails are uint8 RGB [36, 64, 3] (`keye.media.decode.thumbnails`). Numpy.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from keye.media.pixels.patches import Pixels

#: Height and width of a block, and how far it may have moved between two frames, in pixels of a thumbnail.
BLOCK: Final = (9, 8)
_REACH: Final = (6, 12)
#: Levels (sum of luma and two colour differences) that count as contrast of a block without any: noise of coding.
_NOISE: Final = 3.0
#: A block is new when its best match is as far from it as `_NEW` times its own contrast.
_NEW: Final = 2.0
#: Light explains a change where levels are this well correlated.
_SAME_PICTURE: Final = 0.85
#: A mean share of new blocks below which the search for motion ends: what is left is motion.
_EXPLAINED: Final = 0.25
_TO_YCC: Final = np.array([[0.299, -0.169, 0.5], [0.587, -0.331, -0.419], [0.114, 0.5, -0.081]], dtype=np.float32)

Planes = NDArray[np.float32]


def mean_changes(thumbnails: Pixels) -> NDArray[np.float32]:
    """Mean absolute difference of each of [n, H, W, 3] thumbnails from the one before it, float32 [n - 1] in 0..1."""
    # Unsigned differences in 8 bits: a copy in 16 would cost more than the rest.
    after, before = thumbnails[1:], thumbnails[:-1]
    gaps = np.maximum(after, before) - np.minimum(after, before)
    return (gaps.reshape(len(gaps), -1).mean(1, dtype=np.float32) / 255).astype(np.float32)


def unexplained_change(before: Pixels, after: Pixels) -> float:
    """The share of a thumbnail, 0 to 1, that neither motion nor light explains from the one before: 0 the same picture,
    from 0.5 on another one."""
    old, new = _planes(before), _planes(after)
    old = _relight(old, new)
    padded = np.full((3, new.shape[1] + 2 * _REACH[0], new.shape[2] + 2 * _REACH[1]), 1e4, dtype=np.float32)
    padded[:, _REACH[0] : -_REACH[0], _REACH[1] : -_REACH[1]] = old
    contrast = _contrast(new) + _NOISE
    best = np.full(contrast.shape, np.inf, dtype=np.float32)
    share, ring = 1.0, 0
    for distance, dy, dx in _shifts():
        if distance > ring and (ring := distance) % 3 == 0 and (share := _new_share(best, contrast)) < _EXPLAINED:
            return share
        window = padded[:, dy : dy + new.shape[1], dx : dx + new.shape[2]]
        np.minimum(best, _block_means(np.abs(window - new).sum(0)), out=best)
    return _new_share(best, contrast)


def _new_share(best: Planes, contrast: Planes) -> float:
    return float(np.minimum(best / contrast, _NEW).mean() / _NEW)


@cache
def _shifts() -> tuple[tuple[int, int, int], ...]:
    """(distance, y, x) of shifts into a padded picture, the nearest first."""
    rows, columns = _REACH
    return tuple(sorted(
        (max(abs(dy - rows) * 2, abs(dx - columns)), dy, dx)
        for dy in range(2 * rows + 1) for dx in range(2 * columns + 1)
    ))  # fmt: skip


def _planes(thumbnail: Pixels) -> Planes:
    """Luma and colour differences, float32 [3, H, W], blurred by half a pixel, so that motion by parts of one counts as
    motion."""
    planes = (thumbnail.astype(np.float32) @ _TO_YCC).transpose(2, 0, 1)
    padded = np.pad(planes, ((0, 0), (1, 0), (1, 0)), mode="edge")
    blurred = padded[:, 1:, 1:] + padded[:, :-1, 1:] + padded[:, 1:, :-1] + padded[:, :-1, :-1]
    return np.ascontiguousarray(blurred / 4)


def _relight(old: Planes, new: Planes) -> Planes:
    """The old picture in the light of the new one, where it is the same picture."""
    flat_old, flat_new = old[0] - old[0].mean(), new[0] - new[0].mean()
    power, product = float((flat_old**2).mean()), float((flat_old * flat_new).mean())
    if product <= 0 or product < _SAME_PICTURE * (power * float((flat_new**2).mean())) ** 0.5:
        return old
    gain = product / power
    relit = gain * old
    relit[0] += new[0].mean() - relit[0].mean()
    return relit


def _block_means(values: Planes) -> Planes:
    rows, columns = values.shape[0] // BLOCK[0], values.shape[1] // BLOCK[1]
    return values.reshape(rows, BLOCK[0], columns, BLOCK[1]).mean((1, 3))


def _contrast(planes: Planes) -> Planes:
    """Mean distance of a block's values from their mean."""
    _, height, width = planes.shape
    blocks = planes.reshape(3, height // BLOCK[0], BLOCK[0], width // BLOCK[1], BLOCK[1])
    return np.abs(blocks - blocks.mean((2, 4), keepdims=True)).sum(0).mean((1, 3))
