"""Settings that hold for every medium of a request, in keye's names and in those of other servers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from keye.chat.messages import VIDEO_OPTIONS
from keye.server.edge.errors import ApiError
from keye.server.openai.fields import note_ignored, read_fields
from keye.server.openai.schemas import MediaDefaults

#: Processors of transformers, whose arguments vLLM passes on, call some settings otherwise.
_PROCESSOR_NAMES: Final = {"num_frames": "nframes", "shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
_GROUPS: Final = ("size", "images_kwargs", "videos_kwargs")


def media_settings(body: MediaDefaults) -> dict[str, Any] | None:
    """The settings of a body; what it gives under two names counts as keye's own field has it."""
    found: dict[str, Any] = {}
    if body.media_io_kwargs is not None:
        found |= _of_loader(body.media_io_kwargs.video or {}, "media_io_kwargs.video.")
        if body.media_io_kwargs.image:
            note_ignored([f"media_io_kwargs.image.{name}" for name in body.media_io_kwargs.image])
    if body.mm_processor_kwargs is not None:
        found |= _of_processor(body.mm_processor_kwargs, "mm_processor_kwargs.")
    if body.preprocess_kwargs is not None:
        found |= read_fields(body.preprocess_kwargs, VIDEO_OPTIONS, where="preprocess_kwargs.")
    return {name: value for name, value in found.items() if value is not None} or None


def _of_loader(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """vLLM's loader of videos: so many frames, -1 for all, at most at a rate."""
    known = read_fields(given, {"num_frames", "fps", *VIDEO_OPTIONS}, where=where)
    frames = known.pop("num_frames", None)
    if frames is None or frames == -1:
        return known
    return {**known, "max_frames" if known.get("fps") is not None else "nframes": frames}


def _of_processor(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in given.items():
        if name in _GROUPS:
            if not isinstance(value, Mapping):
                raise ApiError(400, f"{where}{name} must be an object", param=f"{where}{name}")
            flat |= _of_processor(value, f"{where}{name}.") if name != "size" else value
        else:
            flat[name] = value
    return read_fields(
        {_PROCESSOR_NAMES.get(name, name): value for name, value in flat.items()}, VIDEO_OPTIONS, where=where
    )
