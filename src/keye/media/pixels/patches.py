"""Pictures in memory to RGB uint8, and pixels to the inputs of the vision tower: normalised patches and their grid.

Pictures are PIL images, numpy arrays and torch tensors. torch is not imported: a tensor is recognised by its methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from keye.config import ProcessorConfig
from keye.errors import KeyeError, KeyeWarning, MediaError
from keye.media.sizes import Size

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Pixels = NDArray[np.uint8]


def is_array(value: object) -> bool:
    """Whether `value` is a numpy array or a torch tensor."""
    return isinstance(value, np.ndarray) or is_tensor(value)


def as_picture(value: Any, *, strict_official: bool = False) -> Image.Image:
    """A PIL image of an array or tensor with three axes (or two, grey); a PIL image stands for itself, in
    RGB or RGBA (`picture.in_color`) unless `strict_official`.

    Numpy arrays are read as [H, W, channels], tensors as [channels, H, W], the other way round where only that leaves
    1, 3 or 4 channels. Levels are uint8 or numbers from 0 to 255.
    """
    if isinstance(value, Image.Image):
        from keye.media.decode.picture import in_color  # a question about a video needs none of it

        return value if strict_official else in_bytes(in_color(value))
    array = _levels(value)
    if array.ndim == 2:
        return Image.fromarray(array)
    array = _channels_last(array, tensor=is_tensor(value), axes=3)
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def in_bytes(image: Image.Image) -> Image.Image:
    """RGB of an image of 32-bit levels (modes I and F), any other as it is. Levels from 0 to 255, and of floats from 0
    to 1, mean what they say; others are stretched from the lowest, black, to the highest, white. NaN is
    black."""
    if image.mode not in ("I", "F"):
        return image
    levels = np.array(image, dtype=np.float32)
    finite = np.isfinite(levels)
    low = float(levels.min(where=finite, initial=np.inf))
    high = float(levels.max(where=finite, initial=-np.inf))
    if high < low:  # none is a number
        return Image.new("RGB", image.size)
    levels = np.nan_to_num(levels, copy=False, nan=low, posinf=high, neginf=low)
    if low >= 0 and high <= 1 and image.mode == "F":
        levels *= 255
    elif low < 0 or high > 255:
        levels -= low
        levels *= 255 / max(high - low, 1e-30)
    return Image.fromarray(np.rint(levels, out=levels).astype(np.uint8)).convert("RGB")


def as_frames(value: Any) -> Pixels | list[Image.Image]:
    """The frames of a video in memory: uint8 RGB [F, H, W, 3] of an array or tensor with four axes, or PIL images of
    a list of pictures, whose sizes may differ."""
    if is_array(value):
        array = _channels_last(_levels(value), tensor=is_tensor(value), axes=4)
        if array.shape[-1] != 3:
            raise MediaError(f"the frames have {array.shape[-1]} channels; give RGB, 3 channels")
        if len(array) == 0:
            raise MediaError("the video has no frames; give at least one")
        return np.ascontiguousarray(array)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise MediaError("frames must be an array or tensor with four axes, or a list of pictures that is not empty")
    return [as_picture(picture) for picture in value]


def _channels_last(array: Pixels, *, tensor: bool, axes: int) -> Pixels:
    if array.ndim != axes:
        what = "a picture needs [H, W, 3] or [3, H, W]" if axes == 3 else "frames need [F, H, W, 3] or [F, 3, H, W]"
        raise MediaError(f"an array of shape {tuple(array.shape)} is not a picture: {what}")
    known = (1, 3, 4)
    first, last = array.shape[-3] in known, array.shape[-1] in known
    if not first and not last:
        raise MediaError(f"an array of shape {tuple(array.shape)} has no axis of 1, 3 or 4 channels; give RGB")
    return np.moveaxis(array, -3, -1) if first and (tensor or not last) else array


def _levels(value: Any) -> Pixels:
    """uint8 of an array or tensor that holds uint8 or numbers from 0 to 255."""
    array = np.asarray(to_numpy(value) if is_tensor(value) else value)
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "fiu" or array.size == 0:
        raise MediaError(
            f"an array of {array.dtype} {tuple(array.shape)} is not a picture; give uint8, or numbers up to 255"
        )
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 255):
        raise MediaError(f"the picture's values reach from {low:g} to {high:g}; they must lie between 0 and 255")
    if array.dtype.kind == "f" and 0 < high <= 1:
        raise MediaError("the picture's values reach from 0 to 1; multiply them by 255")
    return np.rint(array).astype(np.uint8)


def is_tensor(value: object) -> bool:
    return hasattr(value, "detach") and hasattr(value, "permute")


def to_numpy(tensor: Any) -> Any:
    """A tensor in main memory that numpy can read: it knows no bfloat16."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


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
        values, grids = zip(*((i.pixel_values, i.grid_thw) for i in inputs), strict=True)
        return VisionInput(np.concatenate(values), np.concatenate(grids))

    def open(self) -> HeldPatches:
        """The rows one after another, as a video that is still being decoded gives them (`frame_stream`)."""
        return HeldPatches(self)

    def as_one_video(self) -> VisionInput:
        """The same patches, frames of one size, under a single grid row (t, h, w)."""
        t, h, w = len(self.grid_thw), *self.grid_thw[0, 1:]
        return VisionInput(self.pixel_values, np.array([[t, h, w]], dtype=np.int64))


class PixelReader:
    """The rows of one medium in order. Closing may happen at any time, from any thread, and twice. The methods here are
    those of rows that are in memory."""

    def has(self, rows: int) -> bool:
        """Whether `take(rows)` would answer at once, be it with an error."""
        return True

    def take(self, rows: int) -> VisionInput:
        """The next `rows` rows, waiting for them. Raises what went wrong with the medium."""
        raise NotImplementedError

    def notes(self) -> Sequence[KeyeWarning]:
        """What was tolerated of the medium; asked for when all rows are taken."""
        return ()

    def close(self) -> None:
        """Frees what the reader holds and ends what works for it."""


class HeldPatches(PixelReader):
    """A reader of patches that are in memory."""

    def __init__(self, vision: VisionInput) -> None:
        self._vision, self._row, self._patch = vision, 0, 0

    def take(self, rows: int) -> VisionInput:
        """The next `rows` rows; a view."""
        grid = self._vision.grid_thw[self._row : self._row + rows]
        start, stop = self._patch, self._patch + int(grid.prod(axis=1).sum())
        self._row, self._patch = self._row + rows, stop
        return VisionInput(self._vision.pixel_values[start:stop], grid)


def images_to_patches(images: NDArray[np.uint8], config: ProcessorConfig) -> VisionInput:
    """Cuts pictures of one size, uint8 RGB [n, H, W, 3], into normalised patches; one grid row (1, h, w) for each.

    H and W must be multiples of `config.factor`. Values are (x / 255 - mean) / std.
    """
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or len(array) == 0:
        raise KeyeError(f"pictures must be uint8 [n, height, width, 3] with n >= 1, not {array.dtype} {array.shape}")
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


def resize_bilinear(frame: Pixels, size: Size) -> Pixels:
    """uint8 [H, W, 3] to uint8 [*size, 3] in torch's integer arithmetic (1.5)."""
    return frame if frame.shape[:2] == size else _pixels(resize_planes(frame, size)[None])


def resize_planes(frame: Pixels, size: Size) -> Tensor:
    """`resize_bilinear` to colour planes, uint8 [3, *size], as torch leaves them."""
    import torch.nn.functional as F

    return F.interpolate(as_planes(frame), list(size), mode="bilinear", antialias=True)[0]


def resize_bicubic(frame: Pixels, size: Size) -> Pixels:
    """uint8 [H, W, 3] to uint8 [*size, 3] through float32, clamped and rounded (Preview)."""
    import torch.nn.functional as F

    if frame.shape[:2] == size:
        return frame
    resized = F.interpolate(as_planes(frame).float(), list(size), mode="bicubic", antialias=True)
    return _pixels(resized.clamp(0, 255).round().byte())


def as_planes(frame: Pixels) -> Tensor:
    """uint8 [1, 3, H, W] that shares the memory of the frame."""
    import torch

    return torch.from_numpy(frame if frame.flags.writeable else frame.copy()).permute(2, 0, 1)[None]


def _pixels(planes: Tensor) -> Pixels:
    """[H, W, 3] that shares the memory of the planes: cutting patches reads it in any order."""
    return planes[0].permute(1, 2, 0).numpy()
