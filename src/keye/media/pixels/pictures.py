"""Pictures in memory: PIL images, numpy arrays and torch tensors, single or as the frames of a video, to RGB uint8.

torch is not imported: a tensor is recognised by its methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from keye.errors import MediaError

Pixels = NDArray[np.uint8]


def is_array(value: object) -> bool:
    """Whether `value` is a numpy array or a torch tensor."""
    return isinstance(value, np.ndarray) or _is_tensor(value)


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
    array = _channels_last(array, tensor=_is_tensor(value), axes=3)
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
        array = _channels_last(_levels(value), tensor=_is_tensor(value), axes=4)
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
    array = np.asarray(_plain(value) if _is_tensor(value) else value)
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


def _is_tensor(value: object) -> bool:
    return hasattr(value, "detach") and hasattr(value, "permute")


def _plain(tensor: Any) -> Any:
    """A tensor in main memory that numpy can read: it knows no bfloat16."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
