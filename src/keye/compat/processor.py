"""What a checkpoint's own processor does with the results of the utilities, short of the tokenizer.

Placeholders in the text grow to as many as a medium has visual tokens, pictures become patches. Sources:
`processing_keye.py` and `image_processing_keye.py` of Preview, `KeyeVL1_5Processor` of 1.5.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from keye.config import ProcessorConfig
from keye.errors import KeyeError
from keye.media.image import resize_exactly
from keye.media.pixels.patches import (
    Pixels,
    VisionInput,
    as_frames,
    as_picture,
    frames_to_patches,
    images_to_patches,
    resize_bilinear,
)
from keye.media.processor import Piece, VisualSpan, expand_frames
from keye.media.sizes import Size, resize_for_processor

IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
_PAD = {"image": IMAGE_PAD, "video": VIDEO_PAD}
#: Limits of the image processor where the configuration has none, in pixels.
_MIN_PIXELS, _MAX_PIXELS = 4 * 784, 1280 * 784


@dataclass(frozen=True)
class ProcessorOutput:
    """Texts with their placeholders grown, and the inputs of the model by their official names.

    pixel_values, pixel_values_videos: float32 [patches, 3, patch, patch]. image_grid_thw: int64 [images, 3].
    video_grid_thw: int64 [rows, 3]; Preview: a row (t, h, w) for each video; 1.5: neighbouring frames of one size of a
    video share a row. second_per_grid_ts (Preview): seconds between the frames of each video. num_frames (1.5): frames
    of each video. None for media that were not given.
    """

    text: list[str]
    pixel_values: NDArray[np.float32] | None = None
    image_grid_thw: NDArray[np.int64] | None = None
    pixel_values_videos: NDArray[np.float32] | None = None
    video_grid_thw: NDArray[np.int64] | None = None
    second_per_grid_ts: tuple[float, ...] | None = None
    num_frames: tuple[int, ...] | None = None


class OfficialProcessor:
    """The processor of Preview or 1.5 under its configuration (`load_processor_config`)."""

    def __init__(self, config: ProcessorConfig) -> None:
        if not config.release.processor_is_published:
            raise KeyeError(
                f"the official {config.release.name} processor is not published; use keye.media.processor.Processor"
            )
        self.config = config

    def __call__(
        self, text: str | Sequence[str], images: Sequence[Any] | None = None, videos: Sequence[Any] | None = None, *,
        fps: float | Sequence[float] = 2.0, **video_kwargs: Sequence[Any],
    ) -> ProcessorOutput:  # fmt: skip
        """`images` and `videos` in the order of their placeholders over all texts.

        `fps` (Preview) is the rate of the frames of all videos or of each. `video_kwargs` (1.5) are the lists that
        `process_vision_info` returns: height, width, fast_height, fast_width, frame_types, timestamps.
        Raises `KeyeError` when a text has more placeholders of a kind than media were given; as officially, media
        beyond the placeholders are kept, and placeholders without any media of their kind stay single.
        """
        texts = [text] if isinstance(text, str) else list(text)
        pictures = [self.image(image) for image in images or ()]
        expansions: dict[str, list[list[Piece]]] = {}
        if pictures:
            expansions["image"] = [[VisualSpan("image", self._tokens(p)[0])] for p in pictures]
        clips, seconds, grids = [], None, []
        if videos:
            if self.config.release.whole_video:
                rates = [fps] * len(videos) if isinstance(fps, int | float) else fps
                if len(rates) != len(videos):
                    raise KeyeError(f"{len(rates)} rates are given for {len(videos)} videos; give one number, or one "
                                    "for each video")  # fmt: skip
                seconds = tuple(1 / float(rate) for rate in rates)
                clips = [self.video(video).as_one_video() for video in videos]
                expansions["video"] = [[VisualSpan("video", self._tokens(clip)[0])] for clip in clips]
                grids = [clip.grid_thw for clip in clips]
            else:
                settings = [_pick_settings(video_kwargs, i, len(videos)) for i in range(len(videos))]
                clips = [self.slow_fast_video(v, s) for v, s in zip(videos, settings, strict=True)]
                expansions["video"] = [
                    expand_frames(self._tokens(clip), self.config, s.get("timestamps"), s.get("frame_types"))
                    for clip, s in zip(clips, settings, strict=True)
                ]
                grids = [_merge_rows(clip.grid_thw) for clip in clips]
        return ProcessorOutput(
            text=_expand_texts(texts, expansions),
            pixel_values=np.concatenate([p.pixel_values for p in pictures]) if pictures else None,
            image_grid_thw=np.concatenate([p.grid_thw for p in pictures]) if pictures else None,
            pixel_values_videos=np.concatenate([c.pixel_values for c in clips]) if clips else None,
            video_grid_thw=np.concatenate(grids) if grids else None,
            second_per_grid_ts=seconds,
            num_frames=tuple(len(c.grid_thw) for c in clips) if clips and seconds is None else None,
        )

    def image(self, image: Any) -> VisionInput:
        """The patches of one picture (PIL, array or tensor): RGB without its alpha channel, PIL bicubic."""
        picture = as_picture(image).convert("RGB")
        return images_to_patches(resize_exactly(picture, *self._size(picture))[None], self.config)

    def video(self, video: Any) -> VisionInput:
        """The patches of the frames of one video (Preview): all take the size that the first one gets."""
        frames = as_frames(video)
        pictures = [Image.fromarray(f) if isinstance(f, np.ndarray) else f.convert("RGB") for f in frames]
        size = self._size(pictures[0])
        resized = (resize_exactly(picture, *size) for picture in pictures)
        return frames_to_patches(resized, [size] * len(pictures), self.config)

    def slow_fast_video(self, video: Any, settings: dict[str, Any]) -> VisionInput:
        """The patches of the frames of one video (1.5), slow and fast ones in their order."""
        frames = as_frames(video)
        if not isinstance(frames, np.ndarray):
            frames = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
        slow, fast = ((settings[f"{kind}height"], settings[f"{kind}width"]) for kind in ("", "fast_"))
        types = settings.get("frame_types") or [0] * len(frames)
        frame_sizes = [fast if kind else slow for kind in types]
        resized: Iterator[Pixels] = (resize_bilinear(f, s) for f, s in zip(frames, frame_sizes, strict=True))
        return frames_to_patches(resized, frame_sizes, self.config)

    def _size(self, picture: Image.Image) -> Size:
        low, high = self.config.processor_min_pixels, self.config.processor_max_pixels
        low, high = _MIN_PIXELS if low is None else low, _MAX_PIXELS if high is None else high
        return resize_for_processor(picture.height, picture.width, factor=self.config.factor, min_pixels=low,
                                    max_pixels=high, strict_official=True)  # fmt: skip

    def _tokens(self, vision: VisionInput) -> list[int]:
        """Visual tokens of each grid row."""
        return [int(n) for n in vision.grid_thw.prod(axis=1) // self.config.merge_size**2]


def _pick_settings(video_kwargs: dict[str, Sequence[Any]], index: int, count: int) -> dict[str, Any]:
    """The settings of one video, sequences as plain lists."""
    known = ("height", "width", "fast_height", "fast_width", "frame_types", "timestamps")
    if unknown := sorted(video_kwargs.keys() - set(known)):
        raise KeyeError(f"{unknown[0]} is not a setting of a video; known are {', '.join(known)}")
    for name, values in video_kwargs.items():
        if len(values) != count:
            raise KeyeError(f"{name} has {len(values)} entries for {count} videos; give one for each video")
    chosen = {name: values[index] for name, values in video_kwargs.items() if values[index] is not None}
    if missing := [name for name in known[:4] if name not in chosen]:
        raise KeyeError(f"{missing[0]} is missing; pass the third result of process_vision_info")
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in chosen.items()}


def _merge_rows(grid: NDArray[np.int64]) -> NDArray[np.int64]:
    """Neighbouring rows (1, h, w) of one size as one row (t, h, w)."""
    starts = np.flatnonzero(np.r_[True, (grid[1:] != grid[:-1]).any(axis=1)])
    return np.column_stack([np.diff(np.r_[starts, len(grid)]), grid[starts, 1:]])


def _expand_texts(texts: Sequence[str], expansions: dict[str, list[list[Piece]]]) -> list[str]:
    """The texts with each placeholder replaced by the expansion of its medium."""
    waiting = {_PAD[kind]: iter(pieces) for kind, pieces in expansions.items()}

    def grow(match: re.Match[str]) -> str:
        if match[0] not in waiting:
            return match[0]
        if (pieces := next(waiting[match[0]], None)) is None:
            raise KeyeError(f"the text has more {match[0]} than media were given; give one for each")
        return "".join(p if isinstance(p, str) else _PAD[p.kind] * p.tokens for p in pieces)

    pads = re.compile("|".join(re.escape(pad) for pad in _PAD.values()))
    return [pads.sub(grow, text) for text in texts]
