"""Every configuration of keye: model, processor, sampling, environment. Reads and validates the official files.

All classes are frozen: a configuration is read once and passed around.
"""

from keye.config.environment import HubConfig, KernelConfig, hub_config, kernel_config, preview_video_max_pixels
from keye.config.files import ConfigError, read_json, read_special_tokens
from keye.config.model import (
    GenerationConfig,
    KeyeConfig,
    VisionConfig,
    architecture_name,
    load_generation_config,
    load_model_config,
    model_config_from_dict,
    vision_config_from_dict,
)
from keye.config.processor import (
    PROCESSOR_FILE,
    ProcessorConfig,
    find_frame_text,
    has_keye_fields,
    load_processor_config,
)
from keye.config.text import GroupRouting, LatentConfig, SparseConfig, TextConfig, YarnConfig

__all__ = [
    "PROCESSOR_FILE", "ConfigError", "GenerationConfig", "GroupRouting", "HubConfig", "KernelConfig", "KeyeConfig",
    "LatentConfig", "ProcessorConfig", "SparseConfig", "TextConfig", "VisionConfig", "YarnConfig", "architecture_name",
    "find_frame_text", "has_keye_fields", "hub_config", "kernel_config", "load_generation_config", "load_model_config",
    "load_processor_config", "model_config_from_dict", "preview_video_max_pixels", "read_json", "read_special_tokens",
    "vision_config_from_dict",
]  # fmt: skip
