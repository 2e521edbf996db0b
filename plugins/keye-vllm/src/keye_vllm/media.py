"""Images and videos of a prompt: opened, sampled, resized and laid out by `keye.media`, so that they are the same
everywhere.

Inside, a medium is a `keye.chat.messages.Medium`: its kind, its source and its own options. vLLM decodes no video
before: `WholeFile` hands the bytes through. Of images the bytes are taken that vLLM has read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ModalityDataItems, MultiModalDataItems, MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)
from vllm.multimodal.video import VideoLoader

from keye import Frames, KeyeError
from keye.spi import (
    IMAGE_OPTIONS,
    VIDEO_OPTIONS,
    ContextBudget,
    MediaItem,
    Medium,
    MediumKind,
    Processor,
    PromptBuilder,
    Source,
    Tokenizer,
    check_medium,
    decode_list,
    fetch_source,
    is_array,
    load_processor_config,
    parse_list,
    resolve,
    untrusted,
)

#: The name of the way in which vLLM loads a video of 2.0.
VIDEO_LOADER = "keye"
_OPTIONS = {"image": IMAGE_OPTIONS, "video": VIDEO_OPTIONS}
_SCOPES = {"images_kwargs": "image", "videos_kwargs": "video"}
#: Set by the processor itself: the videos of a prompt share the budget of 2.0.
_VIDEOS = "videos_in_prompt"
#: Frames of the video that memory is measured with: the tower takes eight of them at once, whatever their number.
_DUMMY_FRAMES = 32


@dataclass(frozen=True)
class Fields:
    """Names of what a kind of medium gives the model: patches [P, 3, 14, 14], grids [rows, 3], the rows of each medium
    [media], the token ids of its expansion, and how many they are [media]."""

    pixels: str
    grid: str
    rows: str
    ids: str
    count: str


FIELDS = {
    "image": Fields("pixel_values", "image_grid_thw", "image_rows", "image_ids", "image_id_count"),
    "video": Fields("pixel_values_videos", "video_grid_thw", "video_rows", "video_ids", "video_id_count"),
}


class WholeFile(VideoLoader):
    """Loads a video without decoding it."""

    @classmethod
    def load_bytes(cls, data: bytes, num_frames: int = -1, **options: Any) -> tuple[Any, dict[str, Any]]:
        """Stands in for frames; vLLM keeps `data` beside it. `num_frames` is vLLM's default and means nothing here."""
        if options:
            raise KeyeError(f"media_io_kwargs has {min(options)}: give options of videos as mm_processor_kwargs or "
                            "preprocess_kwargs, by which keye samples them")  # fmt: skip
        return np.zeros((1, 1, 1, 3), dtype=np.uint8), {"video_backend": VIDEO_LOADER}


class MediaItems(ProcessorBatchItems[Medium]):
    """Media of one kind in a prompt."""

    def get_item_for_hash(self, index: int) -> object:
        medium = self.data[index]
        return [_hashable(medium.source), sorted(medium.options.items())]


def _hashable(source: object) -> object:
    """What decides the pixels of a source, in forms that vLLM takes into a hash."""
    if isinstance(source, Frames):
        return [_hashable(source.frames), source.timestamps]
    if isinstance(source, list | tuple):
        return [_hashable(part) for part in source]
    if isinstance(source, Source):
        if source.data is not None:
            return source.data
        assert source.path is not None
        status = source.path.stat()
        return [str(source.path), status.st_size, status.st_mtime_ns]
    return source


class MediaParser(MultiModalDataParser):
    """Media in every form that vLLM or a caller of `LLM.generate` gives them, to `keye.chat.messages.Medium`."""

    def _get_subparsers(self) -> Mapping[str, Any]:
        return {"image": self._images, "video": self._videos}

    def _images(self, value: Any) -> ModalityDataItems[Any, Any] | None:
        return self._items("image", value, single=is_array(value) and value.ndim == 3)

    def _videos(self, value: Any) -> ModalityDataItems[Any, Any] | None:
        frames = isinstance(value, list | tuple) and bool(value) and all(map(_is_picture, value))
        return self._items("video", value, single=frames or (is_array(value) and value.ndim == 4))

    def _items(self, kind: MediumKind, value: Any, *, single: bool) -> MediaItems | None:
        if value is None:
            return None
        listed = isinstance(value, list | tuple) or (is_array(value) and not single)
        # A pair of frames and what is known of them is one video.
        pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping)
        media = list(value) if listed and not single and not pair else [value]
        return MediaItems([as_medium(kind, medium) for medium in media], kind)


def as_medium(kind: MediumKind, value: Any, options: Mapping[str, Any] | None = None) -> Medium:
    """One medium: a `Medium`, a path or bytes, pictures, frames with what vLLM knows of them, or what vLLM read from an
    address. `KeyeError` for options that its kind does not have."""
    if isinstance(value, Medium):
        return check_medium(value)
    if isinstance(value, MediaWithBytes):
        return check_medium(Medium(kind, _untrusted_source(value), dict(options or {})))
    if kind == "video" and isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping):
        value = Frames(value[0], _times(value[1]))
    elif isinstance(value, list | tuple):
        value = [_opened(picture) for picture in value]
    else:
        value = _opened(value)
    return check_medium(Medium(kind, value, dict(options or {})))


def _opened(value: Any) -> Any:
    """The file that a path names, so that one which was changed is another medium; anything else as it is."""
    return fetch_source(value) if isinstance(value, str | Path | bytes) and parse_list(value) is None else value


def _is_picture(value: object) -> bool:
    return isinstance(value, Image.Image) or (is_array(value) and getattr(value, "ndim", 0) == 3)


def _untrusted_source(value: MediaWithBytes[Any]) -> object:
    """The file that a request named, or the pictures in it."""
    content = value.media
    if isinstance(content, tuple) and content[1].get("video_backend") == "jpeg_sequence":
        pictures = decode_list(f"data:video/jpeg;base64,{value.original_bytes.decode()}")
        return [untrusted(fetch_source(picture)) for picture in pictures or ()]
    return untrusted(fetch_source(value.original_bytes))


def _times(known: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Seconds of frames by what vLLM knows of a video."""
    if known.get("timestamps") is not None:
        return tuple(known["timestamps"])
    if known.get("fps") and known.get("frames_indices") is not None:
        return tuple(index / known["fps"] for index in known["frames_indices"])
    return None


class MediaInfo(BaseProcessingInfo):
    """The checkpoint's own rules for media, and how many tokens they can take."""

    @cached_property
    def builder(self) -> PromptBuilder:
        folder = resolve(self.model_id, revision=self.ctx.model_config.revision, weights=False)
        return PromptBuilder(self.ctx.model_config.hf_config.keye, Tokenizer.from_file(folder),
                             Processor(load_processor_config(folder)))  # fmt: skip

    def get_data_parser(self) -> MultiModalDataParser:
        return MediaParser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """By the limits of the checkpoint; an option of a request may ask for more, up to the length of the context."""
        config = self.builder.processor.config
        most = {"image": config.image_max_tokens, "video": config.video_total_tokens}
        return {kind: min(seq_len, most[kind]) for kind in most if mm_counts.get(kind, 0)}


class DummyMedia(BaseDummyInputsBuilder[MediaInfo]):
    """Media that memory is measured with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return "".join(f"<|{kind}_pad|>" * count for kind, count in mm_counts.items())

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        config = self.info.builder.processor.config
        side = isqrt(min(config.image_max_tokens, seq_len)) * config.factor
        image = Image.new("RGB", (side, side))
        side = isqrt(min(config.video_max_tokens, seq_len)) * config.factor
        count = max(1, min(_DUMMY_FRAMES, seq_len // config.video_max_tokens))
        video = Medium(
            "video", Frames(np.zeros((count, side, side, 3), dtype=np.uint8), [float(i) for i in range(count)])
        )
        return {"image": [image] * mm_counts.get("image", 0), "video": [video] * mm_counts.get("video", 0)}


class MediaProcessor(BaseMultiModalProcessor[MediaInfo]):
    """Media to patches, grids and token ids."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Also counts the videos of the prompt, which the sizes of their frames depend on."""
        if _VIDEOS in inputs.hf_processor_mm_kwargs:
            raise KeyeError(f"mm_processor_kwargs.{_VIDEOS} is counted by the plug-in; leave it out")
        videos = inputs.mm_data_items.get_count("video", strict=False)
        if videos > 1:
            options = {**inputs.hf_processor_mm_kwargs, _VIDEOS: videos}
            inputs = replace(inputs, hf_processor_mm_kwargs=options)
        return super().apply(inputs, timing_ctx)

    def _get_hf_mm_inputs(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> Any:
        media = {kind: items.get_all() for kind, items in mm_items.items() if items}
        return super()._get_hf_mm_inputs(MultiModalDataItems(), hf_kwargs)._replace(hf_data=media)

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """Opens the media that are not in vLLM's cache."""
        builder, budget = self.info.builder, ContextBudget(self.info.ctx.model_config.max_model_len, reply=1)
        settings = self.info.ctx.get_merged_mm_kwargs(hf_kwargs)
        videos = int(settings.pop(_VIDEOS, 1))
        defaults = defaults_of(settings)
        output: dict[str, Any] = {}
        for kind, media in hf_data.items():
            options = defaults[kind]
            items = [builder.open(_with_defaults(medium, options), videos=videos, budget=budget) for medium in media]
            output |= self._fields(FIELDS[kind], items)
        return BatchFeature(output)

    def _fields(self, names: Fields, items: Sequence[MediaItem]) -> dict[str, Any]:
        ids = [self.info.builder.piece_ids(item.pieces) for item in items]
        vision = [item.vision for item in items]
        pixels = torch.from_numpy(np.concatenate([part.pixel_values for part in vision]))
        return {
            names.pixels: pixels.to(self.info.ctx.model_config.dtype),
            names.grid: torch.from_numpy(np.concatenate([part.grid_thw for part in vision])),
            names.rows: torch.tensor([len(part.grid_thw) for part in vision]),
            names.ids: torch.tensor([token for part in ids for token in part]),
            names.count: torch.tensor([len(part) for part in ids]),
        }

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        config: dict[str, MultiModalFieldConfig] = {}
        for kind, names in FIELDS.items():
            if names.rows not in hf_inputs:
                continue
            rows, flat = hf_inputs[names.rows], MultiModalFieldConfig.flat_from_sizes
            patches = torch.stack([part.prod(-1).sum() for part in hf_inputs[names.grid].split(rows.tolist())])
            config |= {
                names.pixels: flat(kind, patches),
                names.grid: flat(kind, rows, keep_on_cpu=True),
                names.rows: MultiModalFieldConfig.batched(kind, keep_on_cpu=True),
                names.ids: flat(kind, hf_inputs[names.count], keep_on_cpu=True),
                names.count: MultiModalFieldConfig.batched(kind, keep_on_cpu=True),
            }
        return config

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        """A placeholder becomes what stands for its medium: visual tokens, and the marks and times of frames."""
        config = self.info.builder.config
        pads = {"image": config.image_token_id, "video": config.video_token_id}

        def expansion(kind: str, item: int) -> PromptUpdateDetails:
            ids = out_mm_kwargs[kind][item][FIELDS[kind].ids].data.tolist()
            return PromptUpdateDetails.select_token_id(ids, pads[kind])

        return [
            PromptReplacement(kind, [pads[kind]], lambda item, kind=kind: expansion(kind, item)) for kind in mm_items
        ]


def defaults_of(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Options for all media of a prompt, by kind: `mm_processor_kwargs`, flat or in `images_kwargs` and
    `videos_kwargs`. `KeyeError` for one that no medium has."""
    defaults: dict[str, dict[str, Any]] = {"image": {}, "video": {}}
    flat = {name: value for name, value in settings.items() if name not in _SCOPES}
    if unknown := sorted(flat.keys() - VIDEO_OPTIONS):
        raise KeyeError(f"mm_processor_kwargs.{unknown[0]} is not an option of media; known are "
                        f"{', '.join(sorted(VIDEO_OPTIONS))}")  # fmt: skip
    for kind, known in _OPTIONS.items():
        defaults[kind] |= {name: value for name, value in flat.items() if name in known}
    for scope, kind in _SCOPES.items():
        if unknown := sorted(settings.get(scope, {}).keys() - _OPTIONS[kind]):
            raise KeyeError(
                f"{scope}.{unknown[0]} is not an option of {kind}s; known are {', '.join(sorted(_OPTIONS[kind]))}"
            )
        defaults[kind] |= settings.get(scope, {})
    return defaults


def _with_defaults(medium: Medium, defaults: Mapping[str, Any]) -> Medium:
    own = {name: value for name, value in medium.options.items() if value is not None}
    return replace(medium, options={**defaults, **own}) if defaults else medium
