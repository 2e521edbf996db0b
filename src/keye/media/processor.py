"""Media to model inputs: patches, grids, and the text and visual spans that stand for a medium in the prompt.

The same code serves training and inference, decoded files and pictures in memory. What differs between the releases is
in `keye.releases`; here is the order of the steps. Numpy; torch only where a release's resize needs it.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from keye.config import ProcessorConfig
from keye.config.media import DEFAULTS, MediaOptions, MediumKind
from keye.media import sampling, sizes
from keye.media.content import content_key, probe_cached
from keye.media.frame_stream import FileReader, FrameShape, MemoryReader, PixelSource
from keye.media.notes import warn_image_options, warn_video_options
from keye.media.pixels.patches import (
    PixelReader,
    Pixels,
    VisionInput,
    as_frames,
    as_picture,
    frames_to_patches,
    images_to_patches,
    is_array,
    resize_bicubic,
    resize_bilinear,
)
from keye.media.plan import VideoPlan, add_frame_types, make_plan
from keye.media.source.fetch import Reference, Source, as_source, fetch_source, parse_list
from keye.media.video import DecodeLimits, VideoReader

if TYPE_CHECKING:
    from keye.media.image import ImagePlan

# Code for images, lists of pictures and classified frames is imported where it is used: most videos need none of it.

#: Native frames of a video that stay in memory while they are classified; above, they are decoded a second time.
NATIVE_BYTES = 128 * 1024**2
#: Plans of videos with classified frames (1.5) that are remembered, so that a video is classified once.
REMEMBERED_PLANS = 64
#: How far from its even place a frame may lie, in steps: rounded times count as even.
_EVEN = 0.05


@dataclass(frozen=True)
class VisualSpan:
    """`tokens` placeholders of one image or one video frame, to be written as that kind's pad token."""

    kind: MediumKind
    tokens: int


#: What stands for a medium in the prompt, between the template's vision start and end: text and visual spans.
Piece = str | VisualSpan


def count_visual_tokens(pieces: Sequence[Piece]) -> int:
    """Visual tokens of the pieces of a medium."""
    return sum(piece.tokens for piece in pieces if isinstance(piece, VisualSpan))


@dataclass(frozen=True)
class PlannedMedium:
    """A medium before its pixels are decoded: its options are valid and its file, if it is one, has been probed.

    `source` is a `Source` for a file, pictures in memory, or a list of pictures that may be files; the engine adds
    indexes of videos. `plan` and `pieces` are what is known before decoding: nothing of pictures in memory or in a list
    in memory; of a video whose frames are not classified yet (1.5), the least that can stand for it; else exactly that.
    """

    kind: MediumKind
    source: Any
    options: MediaOptions = DEFAULTS
    plan: VideoPlan | ImagePlan | None = None
    pieces: tuple[Piece, ...] = ()

    @property
    def visual_tokens(self) -> int:
        return count_visual_tokens(self.pieces)


@dataclass(frozen=True)
class MediaItem:
    """One medium, ready for the prompt: its pixels, the pieces of its expansion, and its plan.

    `pixels` are the patches, or their source while they are decoded (`frame_stream`). `key`, if known, names the
    content: media of one model with equal keys have equal visual tokens.
    `timestamps` are the seconds of a video's frames, empty for an image and where they are not known.
    `second_per_grid` is the time between two frames of a video for Preview, which has it in the positions instead of
    the text; where they are unevenly spaced, the seconds of every frame from the first on; None otherwise. `plan` is
    None for pictures in memory that stand for a video.
    """

    kind: MediumKind
    pixels: VisionInput | PixelSource
    pieces: tuple[Piece, ...]
    timestamps: tuple[float, ...] = ()
    second_per_grid: float | tuple[float, ...] | None = None
    plan: VideoPlan | ImagePlan | None = None
    key: bytes | None = None

    @property
    def vision(self) -> VisionInput:
        """All patches at once; waits for those that are not decoded yet."""
        if isinstance(self.pixels, VisionInput):
            return self.pixels
        reader = self.pixels.open()
        try:
            return reader.take(len(self.grid_thw))
        finally:
            reader.close()

    @property
    def grid_thw(self) -> NDArray[np.int64]:
        """Grid rows, int64 [rows, 3]; known before any pixel is."""
        return self.pixels.grid_thw

    @property
    def visual_tokens(self) -> int:
        return count_visual_tokens(self.pieces)

    @property
    def frame_count(self) -> int:
        """Frames of a video, 1 for an image."""
        return int(self.grid_thw[:, 0].sum())


class Decoder(Protocol):
    """Decodes videos somewhere else, such as on other machines (`keye.cluster`), to the same frames."""

    def decode(
        self, source: Source, options: MediaOptions, plan: VideoPlan | None, processor: Processor
    ) -> tuple[VideoPlan, Sequence[Pixels]]:
        """What `Processor.decoding` gives, all frames at once; waits for them."""

    def open(
        self, source: Source, options: MediaOptions, plan: VideoPlan, processor: Processor, shape: FrameShape
    ) -> PixelReader:
        """The frames of a plan that is complete, as they come."""


class Processor:
    """Converts media to `MediaItem`s under one configuration. With a `decoder`, it and not a process of our own decodes
    video files."""

    def __init__(
        self,
        config: ProcessorConfig,
        *,
        limits: DecodeLimits | None = None,
        decoder: Decoder | None = None,
        native_bytes: int = NATIVE_BYTES,
    ) -> None:
        self.config, self.limits, self.decoder, self.native_bytes = config, limits, decoder, native_bytes
        self._classified: OrderedDict[bytes, VideoPlan] = OrderedDict()

    def plan(self, kind: MediumKind, source: Any, options: MediaOptions, salt: bytes = b"") -> PlannedMedium:
        """Probes a medium; of a video that was not probed before under `salt`, one frame is decoded."""
        if isinstance(source, Image.Image) or is_array(source):
            return PlannedMedium(kind, source, options)
        if kind == "image":
            from keye.media.image import plan_image

            file = as_source(source)
            image = plan_image(file, self.config, options)
            return PlannedMedium(kind, file, options, image, (VisualSpan(kind, image.visual_tokens),))
        if isinstance(source, list | tuple) or parse_list(source) is not None:
            from keye.media.image import count_least_list_tokens

            pieces: tuple[Piece, ...] = ()
            if source and isinstance(source, list | tuple) and all(isinstance(picture, Source) for picture in source):
                pieces = (VisualSpan(kind, count_least_list_tokens(source, self.config, options)),)
            return PlannedMedium(kind, source, options, None, pieces)
        file = as_source(source)
        plan = make_plan(probe_cached(file, self.limits, salt, track=options.track), self.config, options)
        return PlannedMedium(kind, file, options, plan, tuple(self._least_pieces(plan, options)))

    def load(self, medium: PlannedMedium) -> MediaItem:
        """The medium with all its pixels."""
        if medium.kind == "image":
            assert not isinstance(medium.plan, VideoPlan)
            return self.image(medium.source, medium.options, plan=medium.plan)
        if isinstance(medium.source, Source):
            assert isinstance(medium.plan, VideoPlan)
            return self.video(medium.source, medium.options, plan=medium.plan)
        from keye.media.image import open_frames

        return self.frames(open_frames(medium.source), medium.options)

    def stream(self, medium: PlannedMedium, salt: bytes) -> MediaItem:
        """The medium with the key of its content under `salt`. A video file is not decoded yet, unless its frames have
        to be classified first."""
        key = content_key(medium.kind, medium.source, medium.options, medium.plan, self.config, salt)
        if medium.kind == "image" or not isinstance(medium.source, Source):
            return replace(self.load(medium), key=key)
        assert isinstance(medium.plan, VideoPlan)
        item = self.video_stream(medium.source, medium.options, plan=self._classified.get(key, medium.plan))
        if isinstance(item.plan, VideoPlan) and item.plan.fast is not None:
            self._classified[key] = item.plan
            while len(self._classified) > REMEMBERED_PLANS:
                self._classified.popitem(last=False)
        return replace(item, key=key)

    def image(self, source: Any, options: MediaOptions = DEFAULTS, *, plan: ImagePlan | None = None) -> MediaItem:
        """An image: a file (a `Source` or what names one), a PIL image, an array or a tensor (`as_picture`).
        With a plan made before, nothing is warned of again."""
        from keye.media.image import ImagePlan, read_image, resize_image

        if isinstance(source, Source | str | bytes | os.PathLike):
            file, strict = fetch_source(source), options.strict_official
            name, image = file.name, read_image(file, strict_official=strict, planned=plan is not None)
        else:
            name, image = "<image>", as_picture(source, strict_official=options.strict_official)
        sizes.check_sides(image.height, image.width, name, ratio=options.resized is None)
        pixels = resize_image(image, self.config, options)
        height, width = pixels.shape[:2]
        if plan is None:
            warn_image_options(name, (height, width), self.config, options)
        tokens = self.config.count_tokens((height, width))
        notes = () if plan is None else plan.notes
        plan = ImagePlan(name, image.width, image.height, width, height, tokens, notes)
        vision = images_to_patches(pixels[None], self.config)
        return MediaItem("image", vision, (VisualSpan("image", tokens),), plan=plan)

    def video(self, source: Reference, options: MediaOptions = DEFAULTS, *, plan: VideoPlan | None = None) -> MediaItem:
        """A video file, by a plan made before or by a new one; all its frames are decoded."""
        if self.decoder is not None:
            item = self.video_stream(source, options, plan=plan)
            return replace(item, pixels=item.vision)
        with self.decode_video(source, options, plan=plan) as (complete, frames):
            shape = self._find_shape(complete)
            vision = frames_to_patches(frames, shape.sizes, self.config)
        return self._build_item(vision.as_one_video() if shape.one_row else vision, complete, options)

    @contextmanager
    def decode_video(
        self, source: Reference, options: MediaOptions = DEFAULTS, *, plan: VideoPlan | None = None
    ) -> Iterator[tuple[VideoPlan, Iterator[Pixels]]]:
        """A video file that is being decoded in a process of this one's own: its plan, complete (1.5: with classified
        frames), and its frames at the sizes of the plan, uint8 RGB [H, W, 3], as they come."""
        with self._open_reader(source, options, plan) as reader:
            plan, frames = self._classify(reader, plan or reader.plan(self.config, options), options)
            planned = self._iter_planned_frames(reader, plan, options) if frames is None else _resize_all(frames, plan)
            yield plan, planned

    def video_stream(
        self, source: Reference, options: MediaOptions = DEFAULTS, *, plan: VideoPlan | None = None
    ) -> MediaItem:
        """The same medium before its frames are decoded: its `pixels` give them as they come, in bounded memory but for
        Preview, which attends over a whole video. Frames of 1.5 are classified first, which decodes them once."""
        source = fetch_source(source)
        frames: Callable[[], Iterator[Pixels]] | None = None
        if plan is None or (self.config.release.classifies_frames and plan.fast is None):
            plan, frames = self._complete_plan(source, options, plan)
        open_pixels: Callable[[], PixelReader]
        shape = self._find_shape(plan)
        if frames is not None:
            open_pixels = partial(lambda read: MemoryReader(read(), shape), frames)
        elif self.decoder is not None:
            open_pixels = partial(self.decoder.open, source, options, plan, self, shape)
        else:
            read = partial(self._iter_planned_frames, plan=plan, options=options)
            open_pixels = partial(FileReader, source, self.limits, read, shape, track=plan.track)
        return self._build_item(PixelSource(shape.grid_thw, open_pixels), plan, options)

    def build_item(self, vision: VisionInput, labels: Sequence[float], key: bytes | None = None) -> MediaItem:
        """Frames of one size that were read before, as patches with a row each, in the form of a video; `labels` are
        the seconds that the model reads. No frame counts as fast (1.5). `key` names their visual tokens."""
        release = self.config.release
        pixels = vision.as_one_video() if release.whole_video else vision
        item = self._build_video_item(pixels, labels, None, _subtract_first(labels), None)
        return replace(item, key=key)

    def frames(self, frames: Any, options: MediaOptions = DEFAULTS, *, size: sizes.Size | None = None) -> MediaItem:
        """A video in memory: an array or tensor with four axes, or a list of pictures (`as_frames`).

        With `timestamps` all frames are used and take the size that a file of them would get. Without, the official
        rule for lists holds: each is sized on its own, they are sampled like frames that were taken at `fps`
        (1.5, 2.0) or brought to an even number (Preview), and times are known if `fps` is given. Where times are known,
        `video_start` and `video_end` choose among the pictures. `size` (2.0) is that of more frames of the same video.
        """
        from keye.media.image import LISTED, resize_to_one_size, sample_list, select_range

        pictures = as_frames(frames)
        if self.config.release.sizes_lists_as_images:
            return self._load_image_list(pictures, options)
        times = options.timestamps
        if times is not None:
            first, last, _ = select_range(len(pictures), options)
            times = times[first : last + 1]
            pixels = resize_to_one_size(pictures[first : last + 1], self.config, options, listed=False)
        else:
            pixels, times = sample_list(pictures, self.config, options)
        height, width = pixels[0].shape[:2]
        types = None
        if self.config.release.classifies_frames:
            from keye.media.pixels.slowfast import frame_types

            types = frame_types(pixels, self.config, options.min_frame_similarity)
        fast = sum(types or ())
        if size is None:
            video_sizes = sizes.compute_frame_sizes(height, width, len(pixels) - fast, self.config, options, fast=fast)
        else:
            video_sizes = sizes.FrameSizes(size, size)
        warn_video_options(LISTED, len(pixels), video_sizes.slow, self.config, options)
        frame_sizes = [video_sizes.fast if types and types[i] else video_sizes.slow for i in range(len(pixels))]
        resize = resize_bilinear if self.config.release.frame_resize == "bilinear" else _resize_pil
        resized = (resize(frame, size) for frame, size in zip(pixels, frame_sizes, strict=True))
        return self._build_video_item(frames_to_patches(resized, frame_sizes, self.config), times, types, None, None)

    def _complete_plan(
        self, source: Source, options: MediaOptions, plan: VideoPlan | None
    ) -> tuple[VideoPlan, Callable[[], Iterator[Pixels]] | None]:
        """A complete plan, and the frames where finding it has decoded them and they are few."""
        if self.decoder is not None:
            complete, decoded = self.decoder.decode(source, options, plan, self)
            return complete, lambda: iter(decoded)
        with self._open_reader(source, options, plan) as reader:
            complete, frames = self._classify(reader, plan or reader.plan(self.config, options), options)
        return complete, None if frames is None else lambda: _resize_all(frames, complete)

    def _open_reader(self, source: Reference, options: MediaOptions, plan: VideoPlan | None) -> VideoReader:
        """The file, at the track of the plan, which may have been chosen."""
        return VideoReader(source, self.limits, track=options.track if plan is None else plan.track)

    def _find_shape(self, plan: VideoPlan) -> FrameShape:
        sizes_of = [plan.frame_size(i) for i in range(plan.frames)]
        return FrameShape(sizes_of, self.config, one_row=self.config.release.whole_video)

    def _iter_planned_frames(self, reader: VideoReader, plan: VideoPlan, options: MediaOptions) -> Iterator[Pixels]:
        """Frames of an open file at the sizes of a complete plan."""
        resize = self.config.release.frame_resize
        if resize == "decoder":
            return reader.frames(plan)
        if resize == "bilinear":
            return _resize_all(reader.frames(plan, native=True), plan)
        # By the video's budget, as the utilities do, then by the processor's own limits.
        first_size = sizes.compute_frame_sizes(
            plan.source_height, plan.source_width, plan.frames, self.config, options
        ).slow
        native = reader.frames(plan, native=True)
        return (_resize_pil(resize_bicubic(frame, first_size), (plan.height, plan.width)) for frame in native)

    def _build_item(self, pixels: VisionInput | PixelSource, plan: VideoPlan, options: MediaOptions) -> MediaItem:
        types = None if plan.fast is None else plan.fast.types
        # At a constant rate frames are off their even places by the rounding of indices only: the official rule fits.
        even = plan.constant_rate or options.strict_official or _is_evenly_spaced(plan.timestamps)
        seconds = 1 / plan.sample_fps if even else _subtract_first(plan.timestamps)
        return self._build_video_item(pixels, plan.timestamps, types, seconds, plan)

    def _classify(
        self, reader: VideoReader, plan: VideoPlan, options: MediaOptions
    ) -> tuple[VideoPlan, list[Pixels] | None]:
        """The plan with slow and fast frames (1.5), and the frames at the file's own size if they are few; many are
        decoded again, so that memory does not grow with the video."""
        if plan.fast is not None or not self.config.release.classifies_frames:
            return plan, None
        from keye.media.pixels.slowfast import SlowFastClassifier

        keep = plan.frames * plan.source_height * plan.source_width * 3 <= self.native_bytes
        classifier = SlowFastClassifier(self.config, options.min_frame_similarity)
        types, frames = [], []
        for frame in reader.frames(plan, native=True):
            types.append(classifier.push(frame))
            if keep:
                frames.append(frame)
        return add_frame_types(plan, types, self.config, options), frames if keep else None

    def _least_pieces(self, plan: VideoPlan, options: MediaOptions) -> list[Piece]:
        """What stands for a video at least: exactly that once its frames are classified."""
        if self.config.release.whole_video:
            return [VisualSpan("video", plan.visual_tokens)]
        tokens = plan.tokens_per_frame
        if self.config.release.classifies_frames:
            # As if all frames were fast: with slow ones among them both kinds get at least as many tokens.
            size = sizes.compute_frame_sizes(
                plan.source_height, plan.source_width, plan.frames, self.config, options
            ).fast
            tokens = self.config.count_tokens(size)
        return expand_frames([tokens] * plan.frames, self.config, plan.labels)

    def _load_image_list(self, pictures: Pixels | list[Image.Image], options: MediaOptions) -> MediaItem:
        """Every picture is sized as an image; all then get the processor's size of the first."""
        from keye.media.image import LISTED, open_frame, resize_first, select_listed

        indices, fps = select_listed(len(pictures), self.config, options)
        images = [resize_first(open_frame(pictures[i]), self.config, options) for i in indices]
        height, width, _ = images[0].shape
        size = sizes.compute_encoded_size(height, width, self.config, options)
        warn_video_options(LISTED, len(images), size, self.config, options)
        resized = (_resize_pil(frame, size) for frame in images)
        vision = frames_to_patches(resized, [size] * len(images), self.config).as_one_video()
        times = None if options.timestamps is None else [options.timestamps[i] for i in indices]
        # Without the last frame's repetition, which has no time of its own.
        even = times is None or options.strict_official or _is_evenly_spaced(times[: len(set(indices))])
        return self._build_video_item(vision, times, None, 1 / fps if even else _subtract_first(times or ()), None)

    def _build_video_item(
        self,
        pixels: VisionInput | PixelSource,
        timestamps: Sequence[float] | None,
        types: Sequence[int] | None,
        seconds: float | tuple[float, ...] | None,
        plan: VideoPlan | None,
    ) -> MediaItem:
        tokens = pixels.grid_thw.prod(axis=1) // self.config.merge_size**2
        times = tuple(float(t) for t in timestamps or ())
        if self.config.release.whole_video:
            span = VisualSpan("video", int(tokens.sum()))
            return MediaItem("video", pixels, (span,), times, seconds, plan)
        labels = timestamps if plan is None else plan.labels
        pieces = expand_frames(tokens.tolist(), self.config, labels, types)
        return MediaItem("video", pixels, tuple(pieces), times, None, plan)


def expand_frames(
    tokens: Sequence[int],
    config: ProcessorConfig,
    timestamps: Sequence[float] | None = None,
    types: Sequence[int] | None = None,
) -> list[Piece]:
    """Text and visual span of each frame, in turn: its mark, its time if known, its `tokens` visual tokens.

    A fast frame (type 1) has marks around its tokens. Source: `KeyeVL1_5Processor`.
    """
    start, end = config.release.fast_frame_marks or ("", "")
    pieces: list[Piece] = []
    for i, count in enumerate(tokens):
        text = format_frame_label(config, None if timestamps is None else timestamps[i])
        span = VisualSpan("video", count)
        parts: list[Piece] = [text + start, span, end] if types is not None and types[i] else [text, span]
        for piece in parts:
            if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
                pieces[-1] += piece
            elif piece:
                pieces.append(piece)
    return pieces


def format_frame_label(config: ProcessorConfig, seconds: float | None) -> str:
    """The text before a frame; without a time, what comes before the time in it."""
    if seconds is None:
        return config.frame_text.partition("{")[0]
    return config.frame_text.format(seconds=config.release.label_seconds(seconds))


def _resize_all(frames: Iterable[Pixels], plan: VideoPlan) -> Iterator[Pixels]:
    """Frames at the file's own size (1.5), resized to those of the plan."""
    return (resize_bilinear(frame, plan.frame_size(i)) for i, frame in enumerate(frames))


def _resize_pil(frame: Pixels, size: sizes.Size) -> Pixels:
    """PIL's bicubic resize, as the image processor does it."""
    from keye.media.image import resize_exactly

    return frame if frame.shape[:2] == size else resize_exactly(Image.fromarray(frame), *size)


def _is_evenly_spaced(timestamps: Sequence[float]) -> bool:
    """Whether frames lie at equal distances, but for rounded times; also where all have one time."""
    rate = sampling.compute_average_rate(timestamps)
    return rate is None or all(abs((t - timestamps[0]) * rate - i) <= _EVEN for i, t in enumerate(timestamps))


def _subtract_first(timestamps: Sequence[float]) -> tuple[float, ...]:
    return tuple(t - timestamps[0] for t in timestamps)
