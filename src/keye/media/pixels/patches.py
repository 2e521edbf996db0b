"""Pixels to the inputs of the vision tower: normalised patches and their grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keye.config import ProcessorConfig
from keye.errors import KeyeError, KeyeWarning
from keye.media.sizes import Size

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class VisionInput:
    """Patches of one or more media for the vision tower.

    pixel_values: float32 [patches, 3, patch_size, patch_size], normalised, in raster order (frame, row, column).
    grid_thw: int64 [rows, 3] in patches. 1.5 and 2.0: one row (1, h, w) for each image and for each frame of a video;
    Preview, whose vision tower attends over a whole video: one row (t, h, w) for each video.
    """

    pixel_values: NDArray[np.float32]
    grid_thw: NDArray[np.int64]

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(pixel_values, grid_thw) as CPU tensors that share this memory."""
        import torch

        return torch.from_numpy(self.pixel_values), torch.from_numpy(self.grid_thw)

    @staticmethod
    def concatenate(inputs: Sequence[VisionInput]) -> VisionInput:
        """The media of a prompt in order; at least one."""
        return VisionInput(
            np.concatenate([i.pixel_values for i in inputs]), np.concatenate([i.grid_thw for i in inputs])
        )

    def open(self) -> HeldPatches:
        """The rows one after another, as a video that is still being decoded gives them (`frame_stream`)."""
        return HeldPatches(self)

    def as_one_video(self) -> VisionInput:
        """The same patches, frames of one size, under a single grid row (t, h, w)."""
        t, h, w = len(self.grid_thw), *self.grid_thw[0, 1:]
        return VisionInput(self.pixel_values, np.array([[t, h, w]], dtype=np.int64))


class HeldPatches:
    """A reader of patches that are all there."""

    def __init__(self, vision: VisionInput) -> None:
        self._vision, self._row, self._patch = vision, 0, 0

    def has(self, rows: int) -> bool:
        return True

    def wait(self, rows: int, timeout: float | None = None) -> bool:
        return True

    def take(self, rows: int) -> VisionInput:
        """The next `rows` rows; a view."""
        grid = self._vision.grid_thw[self._row : self._row + rows]
        start, stop = self._patch, self._patch + int(grid.prod(axis=1).sum())
        self._row, self._patch = self._row + rows, stop
        return VisionInput(self._vision.pixel_values[start:stop], grid)

    def notes(self) -> Sequence[KeyeWarning]:
        return ()

    def close(self) -> None:
        """Nothing is held beside what the prompt holds."""


def images_to_patches(images: NDArray[np.uint8], config: ProcessorConfig) -> VisionInput:
    """Cuts pictures of one size, uint8 RGB [n, H, W, 3], into normalised patches; one grid row (1, h, w) for each.

    H and W must be multiples of `config.factor`. Values are (x / 255 - mean) / std.
    """
    array = rgb_frames(images)
    return frames_to_patches(array, [array.shape[1:3]] * len(array), config)


def frames_to_patches(
    frames: Iterable[NDArray[np.uint8]], frame_sizes: Sequence[Size], config: ProcessorConfig
) -> VisionInput:
    """`images_to_patches` of frames that come one at a time and may differ in size, uint8 RGB [H, W, 3]; their sizes
    (H, W) are known before. Only one frame is held beside the result."""
    side, grid = config.patch_size, frame_grids(frame_sizes, config)
    counts = grid.prod(axis=1)
    values = np.empty((int(counts.sum()), 3, side, side), dtype=np.float32)
    table = _build_level_table(config.image_mean, config.image_std)
    done = 0
    for frame, (_, rows, columns) in zip(frames, grid, strict=True):
        patches = frame.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
        count = rows * columns
        target = values[done : done + count].reshape(rows, columns, 3, side, side)
        for channel in range(3):
            target[:, :, channel] = table[channel][patches[:, :, channel]]
        done += count
    return VisionInput(values, grid)


def frame_grids(frame_sizes: Sequence[Size], config: ProcessorConfig) -> NDArray[np.int64]:
    """The grid row (1, h, w) of each frame of these sizes (H, W), int64 [frames, 3]; `KeyeError` for sizes that are no
    multiple of `config.factor`."""
    side = config.patch_size
    for height, width in set(frame_sizes):
        if height % config.factor or width % config.factor:
            raise KeyeError(
                f"pictures of {width}x{height} pixels are no multiple of {config.factor}; resize them first"
            )
    return np.array([(1, height // side, width // side) for height, width in frame_sizes], dtype=np.int64)


@lru_cache(maxsize=8)
def _build_level_table(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """float32 [3, 256]: every pixel level after normalisation, so that no arithmetic is done per pixel."""
    levels = np.arange(256, dtype=np.float64) / 255
    return ((levels[None] - np.array(mean)[:, None]) / np.array(std)[:, None]).astype(np.float32)


def rgb_frames(frames: ArrayLike) -> NDArray[np.uint8]:
    """`frames` as uint8 [n, H, W, 3] with n >= 1; `KeyeError` for anything else."""
    array = np.asarray(frames)
    if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or len(array) == 0:
        raise KeyeError(f"pictures must be uint8 [n, height, width, 3] with n >= 1, not {array.dtype} {array.shape}")
    return array
