"""Keye-VL-1.5. Sources: keye-vl-utils 1.5.2, `KeyeVL1_5Processor` and an official log of its tokens."""

from __future__ import annotations

import struct
from typing import Final, Literal

from keye.releases.base import FrameDemand, Release, register

#: Ids of the tokens after Preview's last, 151674. The first two, and the order of the last two, are inferred from the
#: ids around them; the others were seen in official logs.
_TOKEN_IDS: Final = {
    "<|polygon_start|>": 151675,
    "<|polygon_end|>": 151676,
    "<|frame|>": 151677,
    "<|fast_video_pad|>": 151678,
    "<|fast_start|>": 151679,
    "<|fast_end|>": 151680,
}


class Keye1_5(Release):
    """Slow and fast frames: a frame that resembles the last slow one gets fewer tokens."""

    name = "1.5"
    architectures = {"KeyeVL1_5ForConditionalGeneration": ()}
    hub_name = "Kwai-Keye/Keye-VL-1_5-8B"
    default_system = "You are a helpful assistant."
    thinking: Literal["prefill", "suffix"] = "suffix"
    official_token_ids = _TOKEN_IDS
    processor_defaults = {
        "video_min_tokens": 48, "video_max_tokens": 768, "video_total_tokens": 65536, "min_frames": 1,
    }  # fmt: skip
    frame_resize = "bilinear"
    fast_frame_marks = ("<|fast_start|>", "<|fast_end|>")
    official_parts = False

    def smallest_counted_frame(self, smallest: float, min_pixels: float | None) -> float:
        """The request's smallest frame counts."""
        return smallest if min_pixels is None else min_pixels

    def least_frames(self, demand: FrameDemand) -> int:
        """Officially `min_frames` is ignored, and a clip shorter than 1 / fps has no frame."""
        return 0 if demand.strict else super().least_frames(demand)

    def label_seconds(self, seconds: float) -> float:
        """The official code keeps times in float32, which decides some roundings to one decimal (1.55 -> "1.5")."""
        return struct.unpack("f", struct.pack("f", seconds))[0]


V1_5: Final = register(Keye1_5())
