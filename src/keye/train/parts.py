"""The parameters that a stage changes, by names of parts or patterns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Final

from torch import nn

from keye.config import ConfigError
from keye.train.config import StageConfig

_VISION: Final = r"visual\.|mlp_AR\."
#: Parts by the names of their parameters; `keye.train.config.PARTS` says what they mean.
_PARTS: Final[Mapping[str, re.Pattern[str]]] = {
    name: re.compile(pattern)
    for name, pattern in (
        ("all", ""),
        ("vision", _VISION),
        ("tower", r"visual\."),
        ("projector", r"mlp_AR\."),
        ("decoder", rf"(?!{_VISION})"),
        ("embeddings", r"model\.embed_tokens\."),
        ("attention", r"model\..*\.self_attn\.(?!sa_indexer\.)"),
        ("experts", r"model\..*\.mlp\.(experts|shared_experts)\."),
        ("router", r"model\..*\.mlp\.gate\."),
        ("dense", r"model\..*\.mlp\.(gate|up|down)_proj\."),
        ("indexer", r"model\..*\.sa_indexer\."),
        ("norms", rf"(?!{_VISION}).*norm\.(weight|bias)$"),
        ("head", r"lm_head\."),
    )
}


def is_in_part(parameter: str, part: str) -> bool:
    """Whether a parameter belongs to a part, by its name."""
    return _PARTS[part].match(parameter) is not None


def choose_parameters(model: nn.Module, stage: StageConfig) -> dict[str, nn.Parameter]:
    """The parameters that a stage changes, by name; these alone need a gradient afterwards. Indexers are among them
    only where the attention teaches them. `ConfigError` for a part or pattern that no parameter matches."""
    parameters = dict(model.named_parameters())
    tied = "lm_head.weight" not in parameters
    matches = {name: _match(name, parameters, tied) for name in (*stage.trained_parts, *stage.frozen_parts)}
    if missing := [name for name, names in matches.items() if not names]:
        raise ConfigError(f"stage {stage.name!r}: the model has no parameters {missing[0]!r}; leave that name out")
    wanted = {name for part in stage.trained_parts for name in matches[part]}
    wanted -= {name for part in stage.frozen_parts for name in matches[part]}
    if stage.attention == "dense":
        wanted = {name for name in wanted if not _PARTS["indexer"].match(name)}
    if not wanted:
        raise ConfigError(f"stage {stage.name!r} changes no parameters; let trains name more than freezes")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in wanted)
    return {name: parameter for name, parameter in parameters.items() if name in wanted}


def _match(name: str, parameters: Mapping[str, nn.Parameter], tied: bool) -> list[str]:
    """The parameters of a part, or that a pattern matches; floating-point ones alone can be trained."""
    if name == "head" and tied:
        name = "embeddings"
    if (part := _PARTS.get(name)) is not None:
        matched = [known for known in parameters if part.match(known)]
    else:
        matched = [known for known in parameters if fnmatchcase(known, name)]
    return [known for known in matched if parameters[known].is_floating_point()]


def choose_adapters(named: Mapping[str, nn.Parameter], stage: StageConfig) -> dict[str, nn.Parameter]:
    """The parameters of adapters that a stage changes: all but those of layers in parts, or of patterns, that it
    freezes, and those of indexers with dense attention, which gives them nothing to learn."""
    frozen = (*stage.frozen_parts, *(("indexer",) if stage.attention == "dense" else ()))
    chosen = dict(named)
    for part in frozen:
        chosen = {name: each for name, each in chosen.items() if name not in _match(part, named, tied=False)}
    if not chosen:
        raise ConfigError(f"stage {stage.name!r} changes nothing of the adapter; let freezes name less")
    for name, parameter in named.items():
        parameter.requires_grad_(name in chosen)
    return chosen
