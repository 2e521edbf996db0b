"""Bytes -> frames -> patches, grids and positions. Never imports the networks.

The names below load on first use, so that the decode worker, which lives in this package, starts without numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keye.media.image import ImagePlan, plan_image, read_image
    from keye.media.options import MediaOptions, media_options
    from keye.media.pixels.patches import VisionInput
    from keye.media.plan import FastFrames, VideoPlan
    from keye.media.positions import (
        PreviewLayout,
        build_position_ids,
        get_rope_index,
        merge_grid_rows,
        split_grid_rows,
    )
    from keye.media.processor import MediaItem, Processor, VisualSpan
    from keye.media.source.fetch import Source, fetch_source, media_kind
    from keye.media.video import (
        DecodeLimits,
        VideoInfo,
        VideoReader,
        iter_frames,
        open_video,
        plan_video,
        probe,
        read_frames,
    )

_HOME = {
    "source.fetch": ("Source", "fetch_source", "media_kind"),
    "image": ("ImagePlan", "plan_image", "read_image"),
    "options": ("MediaOptions", "media_options"),
    "plan": ("FastFrames", "VideoPlan"),
    "positions": ("PreviewLayout", "build_position_ids", "get_rope_index", "merge_grid_rows", "split_grid_rows"),
    "pixels.patches": ("VisionInput",),
    "processor": ("MediaItem", "Processor", "VisualSpan"),
    "video": (
        "DecodeLimits", "VideoInfo", "VideoReader",
        "iter_frames", "open_video", "plan_video", "probe", "read_frames",
    ),
}  # fmt: skip
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "DecodeLimits", "FastFrames", "ImagePlan", "MediaItem", "MediaOptions", "PreviewLayout", "Processor", "Source",
    "VideoInfo", "VideoPlan", "VideoReader", "VisionInput", "VisualSpan", "build_position_ids", "fetch_source",
    "get_rope_index", "iter_frames", "media_kind", "media_options", "merge_grid_rows", "open_video", "plan_image",
    "plan_video", "probe", "read_frames", "read_image", "split_grid_rows",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
