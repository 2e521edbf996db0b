"""Keye-VL-8B-Preview. Sources: keye-vl-utils 1.0.0 and the code of the checkpoint."""

from __future__ import annotations

import math
from typing import Final

from keye.errors import KeyeError, Option
from keye.releases.base import FrameBudget, FrameDemand, Release, register

#: By how much the limit of one frame is at least above the minimum.
_HEADROOM: Final = 1.05


class KeyePreview(Release):
    """A video is read as a whole: one grid row, an even number of frames, absolute time in the positions."""

    name = "preview"
    architectures = {"KeyeForConditionalGeneration": ()}
    hub_name = "Kwai-Keye/Keye-VL-8B-Preview"
    whole_video = True
    norm_before_merge = True
    tokens_per_second = 2.0
    default_system = "You are a helpful assistant."
    thinking = "suffix"
    processor_defaults = {
        "image_max_tokens": 16384, "video_min_tokens": 128, "video_max_tokens": 768, "video_total_tokens": 115200,
        "min_frames": 4, "max_frames": 768, "frame_factor": 2, "frame_text": "",
    }  # fmt: skip
    puts_alpha_on_white = True
    frame_resize = "twice"
    sizes_lists_as_images = True
    official_frame_size = True

    def count_frames(self, demand: FrameDemand) -> int:
        """`nframes` rounded to a multiple of `frame_factor`, or the rate's number within limits so rounded.

        Officially it is an error where the limits leave fewer than `frame_factor` frames.
        """
        factor, total = demand.frame_factor, demand.total
        if demand.nframes is not None:
            if demand.fps is not None:
                raise KeyeError("{} and {} exclude each other; give one of them", Option("fps"), Option("nframes"))
            count = round(demand.nframes / factor) * factor
        else:
            low = math.ceil((demand.min_frames or demand.default_min_frames) / factor) * factor
            most = demand.max_frames or min(demand.default_max_frames or total, total)
            high = most // factor * factor
            wanted = total / demand.native_fps * (demand.fps or demand.default_fps)
            count = math.floor(min(max(wanted, low), high, total) / factor) * factor
        if factor <= count <= total:
            return count
        if demand.strict:
            raise KeyeError(f"{count} frames cannot be taken from a video of {total}; at least {factor} are needed")
        return total if total < factor else min(max(count, factor), total // factor * factor)

    def frame_limits(self, budget: FrameBudget) -> tuple[float, float]:
        """A frame may take `frame_factor` times its share of the budget; the maximum stays above the minimum.

        Officially a request can only lower the limit of one frame.
        """
        low = budget.smallest if budget.min_pixels is None else budget.min_pixels
        share = budget.total / budget.slow * budget.frame_factor
        largest: float = budget.largest
        if budget.max_pixels is not None and not budget.strict:
            largest = budget.max_pixels
        high = max(min(largest, share), int(low * _HEADROOM))
        return low, high if budget.max_pixels is None else min(budget.max_pixels, high)

    def allowed_pixels(self, total: float, frames: int, token: int) -> float:
        """A frame may take twice its share."""
        return 2 * total


PREVIEW: Final = register(KeyePreview())
