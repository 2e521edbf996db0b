"""Float8 weights with a scale for each block, as `quantization_config` of DeepSeek-V3's files declares them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keye.config.files import ConfigError
from keye.errors import is_whole


def float8_block(raw: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a weight that share a scale, of a parsed config.json; None where its weights are not
    float8 with a scale for each block. `ConfigError` for another float8 format. How the official code rounds
    activations is not followed: only weights are float8."""
    section = raw.get("quantization_config")
    if not isinstance(section, Mapping) or section.get("quant_method") != "fp8":
        return None
    if section.get("fmt") not in (None, "e4m3"):
        raise ConfigError(f"quantization_config.fmt is {section['fmt']!r}; of float8 weights keye reads e4m3")
    block = section.get("weight_block_size")
    if block is None:
        return None
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(is_whole(n) and n >= 1 for n in block):
        raise ConfigError(f"quantization_config.weight_block_size is {block!r}; float8 weights need two sizes, "
                          "as in [128, 128]")  # fmt: skip
    return block[0], block[1]
