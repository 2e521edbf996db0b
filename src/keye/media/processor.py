"""Frames -> what the model eats: patches, grids, and the text and visual spans that stand for a medium in the prompt.

The same code serves training and inference, decoded files and arrays in memory. Numpy; torch only where asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from keye.config import ProcessorConfig
from keye.errors import KeyeError
from keye.media import sampling
from keye.media.fetch import Source
from keye.media.image import ImagePlan, read_image, resize_exactly, resize_image
from keye.media.video import DecodeLimits, VideoPlan, open_video

if TYPE_CHECKING:
    import torch

Kind = Literal["image", "video"]


@dataclass(frozen=True)
class VisualSpan:
    """`tokens` placeholders of one image or one video frame, to be written as that kind's pad token."""

    kind: Kind
    tokens: int


#: What stands for a medium in the prompt, between the template's vision start and end: text and visual spans.
Piece = str | VisualSpan


@dataclass(frozen=True)
class VisionInput:
    """Patches of one or more media for the vision tower.

    pixel_values: float32 [patches, 3, patch_size, patch_size], normalised, in raster order (frame, row, column).
    grid_thw: int64 [rows, 3], one row (1, h, w) for each image and for each frame of a video, in patches.
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


@dataclass(frozen=True)
class MediaItem:
    """One medium, ready for the prompt: its patches, the pieces of its expansion, and its plan.

    `timestamps` are the seconds of a video's frames, empty for an image.
    `second_per_grid` is the time between two frames of a video for Preview, which has it in the positions instead of
    the text; None otherwise. `plan` is None for arrays in memory.
    """

    kind: Kind
    vision: VisionInput
    pieces: tuple[Piece, ...]
    timestamps: tuple[float, ...] = ()
    second_per_grid: float | None = None
    plan: VideoPlan | ImagePlan | None = None

    @property
    def visual_tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces if isinstance(piece, VisualSpan))


class Processor:
    """Turns media into `MediaItem`s under one configuration."""

    def __init__(self, config: ProcessorConfig, *, limits: DecodeLimits | None = None) -> None:
        self.config = config
        self.limits = limits or DecodeLimits()

    def image(self, source: Source | Image.Image, **options: Any) -> MediaItem:
        """An image file or PIL image. Options are those of `image.resize_image`."""
        image = source if isinstance(source, Image.Image) else read_image(source)
        pixels = resize_image(image, self.config, **options)
        height, width = pixels.shape[:2]
        tokens = self._tokens(height, width)
        name = source.name if isinstance(source, Source) else "<image>"
        plan = ImagePlan(name, image.width, image.height, width, height, tokens)
        return MediaItem(
            "image", images_to_patches(pixels[None], self.config), (VisualSpan("image", tokens),), plan=plan
        )

    def video(self, source: Source, plan: VideoPlan | None = None, **options: Any) -> MediaItem:
        """A video file, by a plan made before or by a new one with the options of `video.make_plan`."""
        with open_video(source, self.limits) as reader:
            plan = plan or reader.plan(self.config, **options)
            frames = reader.read(plan)
        return MediaItem(
            "video",
            images_to_patches(frames, self.config),
            tuple(self.expand_video(plan)),
            timestamps=plan.timestamps,
            plan=plan,
        )

    def frames(self, frames: NDArray[np.uint8], timestamps: Sequence[float], **options: Any) -> MediaItem:
        """Frames in memory, uint8 RGB [F, H, W, 3], all of which are used; `timestamps` in seconds, one for each.

        Options are those of `sampling.frame_size`.
        """
        if len(frames) != len(timestamps):
            raise KeyeError(f"{len(frames)} frames have {len(timestamps)} timestamps; give one for each frame")
        vision = frames_input(frames, self.config, **options)
        tokens = int(vision.grid_thw[0].prod()) // self.config.merge_size**2
        return MediaItem(
            "video",
            vision,
            tuple(expand_frames(timestamps, tokens, self.config)),
            timestamps=tuple(float(t) for t in timestamps),
        )

    def expand_video(self, plan: VideoPlan) -> list[Piece]:
        """For each frame its text (`frame_text` with its time) and its visual span."""
        return expand_frames(plan.timestamps, plan.tokens_per_frame, self.config)

    def _tokens(self, height: int, width: int) -> int:
        return (height // self.config.factor) * (width // self.config.factor)


def expand_frames(timestamps: Sequence[float], tokens: int, config: ProcessorConfig) -> list[Piece]:
    """Text and visual span of each frame, in turn; `tokens` visual tokens per frame."""
    pieces: list[Piece] = []
    for seconds in timestamps:
        pieces += [config.frame_text.format(seconds=seconds), VisualSpan("video", tokens)]
    return pieces


def frames_input(frames: ArrayLike, config: ProcessorConfig, **options: Any) -> VisionInput:
    """Patches of frames in memory, uint8 RGB [F, H, W, 3], at the size a video file of them would get.

    Frames that have that size already are taken as they are, others are resized (bicubic). Options are those of
    `sampling.frame_size`.
    """
    array = _rgb_frames(frames)
    height, width = sampling.frame_size(array.shape[1], array.shape[2], len(array), config, **options)
    if array.shape[1:3] != (height, width):
        array = np.stack([resize_exactly(Image.fromarray(frame), height, width) for frame in array])
    return images_to_patches(array, config)


def images_to_patches(images: NDArray[np.uint8], config: ProcessorConfig) -> VisionInput:
    """Cuts pictures of one size, uint8 RGB [n, H, W, 3], into normalised patches; one grid row (1, h, w) for each.

    H and W must be multiples of `config.factor`. Values are (x / 255 - mean) / std.
    """
    array = _rgb_frames(images)
    n, height, width, _ = array.shape
    side = config.patch_size
    if height % config.factor or width % config.factor:
        raise KeyeError(f"pictures of {width}x{height} pixels are no multiple of {config.factor}; resize them first")
    rows, columns = height // side, width // side
    patches = array.reshape(n, rows, side, columns, side, 3).transpose(0, 1, 3, 5, 2, 4)
    table = _normalised_levels(config.image_mean, config.image_std)
    values = np.empty(patches.shape, dtype=np.float32)
    for channel in range(3):
        values[:, :, :, channel] = table[channel][patches[:, :, :, channel]]
    grid = np.tile(np.array([1, rows, columns], dtype=np.int64), (n, 1))
    return VisionInput(values.reshape(n * rows * columns, 3, side, side), grid)


@lru_cache(maxsize=8)
def _normalised_levels(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """float32 [3, 256]: every pixel level after normalisation, so that no arithmetic is done per pixel."""
    levels = np.arange(256, dtype=np.float64) / 255
    return ((levels[None] - np.array(mean)[:, None]) / np.array(std)[:, None]).astype(np.float32)


def _rgb_frames(frames: ArrayLike) -> NDArray[np.uint8]:
    array = np.asarray(frames)
    if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or len(array) == 0:
        raise KeyeError(f"pictures must be uint8 [n, height, width, 3] with n >= 1, not {array.dtype} {array.shape}")
    return array
