"""Stages that change what a model's config.json says: longest context, base of the rotary positions, keys that sparse
attention selects. Weights stay as they are."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from keye.config import ConfigError, model_config_from_dict
from keye.models.keye import KeyeModel
from keye.train.recipes.family.config import FamilyStage
from keye.train.recipes.family.shared_files import write_shared


def apply_changes(stages: Iterable[FamilyStage], model: KeyeModel, folder: Path) -> None:
    """Makes the changes of all `stages` up to the one that begins, in the model and in the config.json of `folder`.
    `ConfigError` where the model has no such number, or the last stage does not fit its context."""
    raw: dict[str, Any] = dict(model.config.raw)
    for stage in stages:
        raw = _change(raw, stage)
    config = model_config_from_dict(raw)
    if stage.max_tokens > config.text.max_position_embeddings:
        raise ConfigError(f"stage {stage.name!r}: max_tokens is {stage.max_tokens:,}, but the model's context holds "
                          f"{config.text.max_position_embeddings:,}; lower it, or set context")  # fmt: skip
    if raw == model.config.raw:
        return
    model.config, model.model.config = config, config.text
    write_shared(folder / "config.json", json.dumps(raw, indent=2) + "\n")


def _change(raw: dict[str, Any], stage: FamilyStage) -> dict[str, Any]:
    raw = dict(raw)
    if stage.context is not None:
        raw["max_position_embeddings"] = stage.context
    if stage.rope_theta is not None:
        raw["rope_theta"] = stage.rope_theta
        for name in ("rope_scaling", "rope_parameters"):
            if isinstance(raw.get(name), dict) and "rope_theta" in raw[name]:
                raw[name] = {**raw[name], "rope_theta": stage.rope_theta}
    if stage.topk is not None:
        if not isinstance(raw.get("sa_config"), dict):
            raise ConfigError(f"stage {stage.name!r}: topk is {stage.topk}, but the model has no indexer; leave it out")
        raw["sa_config"] = {**raw["sa_config"], "topk": stage.topk}
    return raw
