"""Everything of vLLM's registries that the plug-in writes to. Imports nothing that touches a device."""

from __future__ import annotations

from transformers import AutoConfig
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers.registry import TokenizerRegistry
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from keye_vllm import ARCHITECTURES
from keye_vllm.config import TOKENIZER_MODE, KeyeVL2Config, Settings
from keye_vllm.media import VIDEO_LOADER, WholeFile

#: What `transformers` would call the video processor of 2.0; by this name vLLM finds how to load a video.
_VIDEO_PROCESSOR = "KeyeVL2VideoProcessor"


def install() -> None:
    """Registers configuration, models, attention, media and prompts. Calling it again changes nothing."""
    AutoConfig.register(KeyeVL2Config.model_type, KeyeVL2Config, exist_ok=True)
    for name in ARCHITECTURES:
        MODELS_CONFIG_MAP[name] = Settings
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, f"keye_vllm.model:{name}")
    if "KEYE_DSA" not in AttentionBackendEnum.__members__:
        register_backend("KEYE_DSA", "keye_vllm.cache.KeyeBackend")
    if TOKENIZER_MODE not in RENDERER_REGISTRY.renderers:
        TokenizerRegistry.register(TOKENIZER_MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
        RENDERER_REGISTRY.register(TOKENIZER_MODE, "keye_vllm.prompts", "KeyeRenderer")
    VIDEO_PROCESSOR_MAPPING_NAMES[KeyeVL2Config.model_type] = _VIDEO_PROCESSOR
    VIDEO_LOADER_REGISTRY.register(VIDEO_LOADER, video_processor=_VIDEO_PROCESSOR)(WholeFile)
