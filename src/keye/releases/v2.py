"""Keye-VL-2.0 and keye-nano. Source: `keye_adaptive_video.py` in Kwai-Keye/sglang; its processor is not published."""

from __future__ import annotations

from typing import Final

from keye.releases.base import Release, register


class Keye2(Release):
    """Mixture of experts with DeepSeek Sparse Attention; every frame is read by itself."""

    name = "2.0"
    architectures = {
        "KeyeVL2MoeForConditionalGeneration": ("sparse", "moe"),
        "KeyeVL2ForConditionalGeneration": ("sparse",),
    }
    hub_name = "Kwai-Keye/Keye-VL-2.0-30B-A3B"
    processor_is_published = False
    resizes_images_twice = False
    splits_budget = True
    adaptive_shares = ((259.0, 0.09), (518.0, 0.18), (1036.0, 0.36), (2016.0, 0.7))


V2: Final = register(Keye2())
