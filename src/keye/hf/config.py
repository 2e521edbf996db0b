"""Configurations of the three releases for `transformers`, and how a name becomes a folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import transformers

from keye.config import KeyeConfig, model_config_from_dict
from keye.errors import KeyeError
from keye.hub import resolve

#: Arguments of `from_pretrained` that `transformers` adds or that change nothing here.
_WITHOUT_EFFECT = frozenset(
    "_from_auto _from_pipeline adapter_kwargs cache_dir code_revision force_download local_files_only "
    "low_cpu_mem_usage proxies subfolder token trust_remote_code use_fast use_safetensors".split()
)


def folder_of(name: Any, options: dict[str, Any], *, weights: bool = True) -> Path:
    """The folder of a checkpoint; `options` must hold nothing that counts and is not known."""
    revision = options.pop("revision", None)
    if unknown := sorted(name for name, value in options.items() if name not in _WITHOUT_EFFECT and value is not None):
        raise KeyeError(f"unknown option {', '.join(unknown)} of from_pretrained; keye.hf takes dtype and device_map.")
    if Path(str(name)).is_dir():
        return resolve(Path(str(name)), weights=weights)
    return resolve(str(name), revision=getattr(revision, "resolved", revision), weights=weights)


def read_official(config: Any, official: dict[str, Any]) -> None:
    """Fills a configuration of `transformers` and keeps the official file beside it: the library renames fields."""
    config.official = {name: copy.deepcopy(value) for name, value in official.items() if not name.startswith("_")}
    for name in ("name_or_path", "attn_implementation"):
        config.official.pop(name, None)
    for name in ("dtype", "torch_dtype"):
        if not isinstance(config.official.get(name, ""), str):  # a torch.dtype that a caller has set
            config.official[name] = str(config.official[name]).removeprefix("torch.")
    rope = {name: official.pop(name) for name in ("rope_scaling", "rope_theta") if name in official}
    joined = official.pop("rope_parameters", None) or {}
    official.pop("model_type", None)
    transformers.PreTrainedConfig.__init__(config, **official)
    theta = rope.get("rope_theta", joined.get("rope_theta"))
    config.rope_parameters = {**joined, **(rope.get("rope_scaling") or {}), "rope_theta": theta}


class _Official(transformers.PreTrainedConfig):
    """What the three configurations share: the official fields as attributes, and keye's reading of them."""

    def __init__(self, **official: Any) -> None:
        read_official(self, official)

    @property
    def keye(self) -> KeyeConfig:
        """The checked configuration of keye's own network."""
        return model_config_from_dict(self.official)

    def to_dict(self) -> dict[str, Any]:
        """The official `config.json`."""
        return {**copy.deepcopy(self.official), "model_type": self.model_type}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class KeyeConfigHF(_Official):
    """Preview."""

    model_type = "Keye"

    def __init__(self, **official: Any) -> None:
        read_official(self, official)


class KeyeVL1_5ConfigHF(_Official):
    """1.5."""

    model_type = "KeyeVL1_5"

    def __init__(self, **official: Any) -> None:
        read_official(self, official)


class KeyeVL2ConfigHF(_Official):
    """2.0 and keye-nano."""

    model_type = "KeyeVL2"

    def __init__(self, **official: Any) -> None:
        read_official(self, official)
