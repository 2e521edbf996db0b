"""Keye-VL-671B: media follow the rules of 1.5; the language model is DeepSeek-V3."""

from __future__ import annotations

from typing import Final

from keye.releases.base import register
from keye.releases.v1_5 import Keye1_5


class Keye671B(Keye1_5):
    """Its config.json, tokenizer and chat template were never seen: prompts follow the checkpoint's own template."""

    name = "671B"
    architectures = {"KeyeVLMoeForConditionalGeneration": ("latent",)}
    hub_name = "Kwai-Keye/Keye-VL-671B-A37B"
    needs_template = True
    thinking = "prefill"
    official_token_ids = {}


V671B: Final = register(Keye671B())
