"""How much of a picture changes from one frame to another: in all, or beyond what motion and light explain.

Motion moves blocks of a picture, light scales its levels; after a hard cut its blocks are nowhere in the frame before.
Thumbnails are uint8 RGB [18, 32, 3] (`keye.media.decode.thumbnails`). Numpy.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from keye.media.pixels.patches import Pixels

Planes = NDArray[np.float32]

#: Height and width of a block, and how far it may have moved between two frames, in pixels of a thumbnail.
_BLOCK, _REACH = (3, 8), (4, 6)
#: How far a picture may have moved that only its light changes.
_NEARBY: Final = (1, 1)
#: Levels (sum of luma and two colour differences) that count as contrast of a block without any: noise of coding.
_NOISE: Final = 3.0
#: A block is new when its best match is as far from it as `_NEW` times its own contrast.
_NEW: Final = 2.0
#: Light may explain a change where levels are this well correlated.
_SAME_PICTURE: Final = 0.85
#: A mean share of new blocks below which the search for motion ends: what is left is motion.
_EXPLAINED: Final = 0.2
_TO_YCC: Final = np.array([[0.299, -0.169, 0.5], [0.587, -0.331, -0.419], [0.114, 0.5, -0.081]], dtype=np.float32)


def mean_changes(thumbnails: Pixels) -> NDArray[np.float32]:
    """Mean absolute difference of each of [n, H, W, 3] thumbnails from the one before it, float32 [n - 1] in 0..1."""
    # Unsigned differences in 8 bits: a copy in 16 would cost more than the rest.
    after, before = thumbnails[1:], thumbnails[:-1]
    gaps = np.maximum(after, before) - np.minimum(after, before)
    return (gaps.reshape(len(gaps), -1).mean(1, dtype=np.float32) / 255).astype(np.float32)


def unexplained_change(before: Pixels, after: Pixels) -> float:
    """The share of a thumbnail, 0 to 1, that neither motion nor light explains from the one before: near 0 in the same
    shot, about 0.5 to 1 in another one."""
    old, new = _planes(before), _planes(after)
    share = _new_share(old, new, _REACH)
    flat_old, flat_new = old[0] - old[0].mean(), new[0] - new[0].mean()
    power, product = float((flat_old**2).mean()), float((flat_old * flat_new).mean())
    if share < _EXPLAINED or product <= 0 or product**2 < _SAME_PICTURE**2 * power * float((flat_new**2).mean()):
        return share
    relit = old * (product / power)
    relit[0] += new[0].mean() - relit[0].mean()
    return min(share, _new_share(relit, new, _NEARBY))


def contrast(thumbnail: Pixels) -> float:
    """Mean distance of a thumbnail's values from those of its blocks, in levels: near 0 of a plain one."""
    return float(_contrast(_planes(thumbnail)).mean())


def _new_share(old: Planes, new: Planes, reach: tuple[int, int]) -> float:
    """The share of new blocks, each compared with all places of the old picture within `reach`."""
    _, height, width = new.shape
    rows, columns, up, side = height // _BLOCK[0], width // _BLOCK[1], *reach
    padded = np.full((3, height + 2 * up, width + 2 * side), 1e4, dtype=np.float32)
    padded[:, up : up + height, side : side + width] = old
    windows = sliding_window_view(padded, width, axis=2)
    scale = _contrast(new) + _NOISE
    best, share = np.full(scale.shape, np.inf, dtype=np.float32), 1.0
    for dy in sorted(range(2 * up + 1), key=lambda place: abs(place - up)):
        gaps = np.abs(windows[:, dy : dy + height] - new[:, :, None, :]).sum(0)
        blocks = gaps.reshape(rows, _BLOCK[0], 2 * side + 1, columns, _BLOCK[1]).mean((1, 4)).min(1)
        np.minimum(best, blocks, out=best)
        share = float(np.minimum(best / scale, _NEW).mean() / _NEW)
        if share < _EXPLAINED:
            break
    return share


def _planes(thumbnail: Pixels) -> Planes:
    """Luma and colour differences, float32 [3, H, W], blurred by half a pixel, so that motion by parts of one counts as
    motion."""
    planes = (thumbnail.astype(np.float32) @ _TO_YCC).transpose(2, 0, 1)
    padded = np.pad(planes, ((0, 0), (1, 0), (1, 0)), mode="edge")
    return ((padded[:, 1:, 1:] + padded[:, :-1, 1:] + padded[:, 1:, :-1] + padded[:, :-1, :-1]) / 4).astype(np.float32)


def _contrast(planes: Planes) -> Planes:
    """Mean distance of each block's values from their mean, [rows, columns]."""
    _, height, width = planes.shape
    blocks = planes.reshape(3, height // _BLOCK[0], _BLOCK[0], width // _BLOCK[1], _BLOCK[1])
    return np.abs(blocks - blocks.mean((2, 4), keepdims=True)).sum(0).mean((1, 3))
