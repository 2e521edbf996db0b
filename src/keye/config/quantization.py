"""Which quantisers' files keye reads, by the section `quantization_config` of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from keye.config.files import ConfigError
from keye.config.float8 import float8_block

#: Values of quant_method that are read: keye's own, and float8 with a scale for each block.
READ: Final = ("keye", "fp8")


def check_quantization(raw: Mapping[str, Any]) -> None:
    """`ConfigError` for a config.json of a quantiser that keye does not read."""
    section = raw.get("quantization_config")
    if not section:
        return
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    float8_block(raw)
    if method not in READ:
        named = f" ({method})" if isinstance(method, str) else ""
        raise ConfigError(f"config.json has quantization_config{named}, a quantised checkpoint that keye does not "
                          "read: use the bfloat16 release of the model, and `keye quantize` or --quant")  # fmt: skip
