"""Keye-VL-671B: media follow the rules of 1.5; the language model is DeepSeek-V3."""

from __future__ import annotations

from typing import Final

from keye.releases.base import register
from keye.releases.v1_5 import Keye1_5


class Keye671B(Keye1_5):
    """Described by `keye inspect`; only the vision tower and the projector run."""

    name = "671B"
    architectures = {"KeyeVLMoeForConditionalGeneration": ("moe",)}
    hub_name = "Kwai-Keye/Keye-VL-671B-A37B"
    decoder = "DeepSeek-V3"
    runs = False
    official_token_ids = {}


V671B: Final = register(Keye671B())
