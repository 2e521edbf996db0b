"""Keye-VL in the `transformers` library, for code that is written against its Auto classes: `pip install keye[hf]`.

    import keye.hf
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)

After this import the Auto classes load Preview, 1.5 and 2.0 with keye's own networks and processor: no code from the
checkpoint is run (`trust_remote_code` has nothing to do) and torchvision is not needed. The classes are thin: what they
compute is what `keye.load` computes. They are for inference; training is `keye train`.
"""

from __future__ import annotations

from typing import Any

try:
    import transformers
except ImportError as error:
    raise ImportError("keye.hf needs the transformers library: pip install 'keye[hf]'") from error

from keye.hf.config import KeyeConfigHF, KeyeVL1_5ConfigHF, KeyeVL2ConfigHF
from keye.hf.model import (
    KeyeForConditionalGeneration,
    KeyeVL1_5ForConditionalGeneration,
    KeyeVL2MoeForConditionalGeneration,
)
from keye.hf.processor import KeyeProcessor, KeyeVL1_5Processor, KeyeVL2Processor

__all__ = [
    "KeyeConfigHF", "KeyeForConditionalGeneration", "KeyeProcessor", "KeyeVL1_5ConfigHF",
    "KeyeVL1_5ForConditionalGeneration", "KeyeVL1_5Processor", "KeyeVL2ConfigHF", "KeyeVL2MoeForConditionalGeneration",
    "KeyeVL2Processor", "register",
]  # fmt: skip


def register() -> None:
    """Makes the Auto classes of `transformers` know Keye; done once by importing this module."""
    releases: tuple[tuple[Any, Any, Any], ...] = (
        (KeyeConfigHF, KeyeForConditionalGeneration, KeyeProcessor),
        (KeyeVL1_5ConfigHF, KeyeVL1_5ForConditionalGeneration, KeyeVL1_5Processor),
        (KeyeVL2ConfigHF, KeyeVL2MoeForConditionalGeneration, KeyeVL2Processor),
    )
    for config, model, processor in releases:
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"):
            getattr(transformers, name).register(config, model, exist_ok=True)
        transformers.AutoProcessor.register(config, processor, exist_ok=True)


register()
