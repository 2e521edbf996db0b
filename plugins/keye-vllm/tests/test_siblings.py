"""Models of the family that differ in their MLPs, or attend densely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import keye
from cases import CONVERSATIONS, check, greedy
from checkpoints import random_checkpoint
from conftest import StartEngine


@pytest.mark.parametrize(
    ("shape", "options"),
    [({"moe": False}, {}), ({"topk": None}, {}), ({}, {"hf_overrides": {"sa_config": None}})],
    ids=["dense_mlp", "without_sa_config", "asked_to_be_dense"],
)
def test_siblings(shape: dict[str, Any], options: dict[str, Any], tmp_path: Path, start_engine: StartEngine) -> None:
    """Dense MLPs with sparse attention; and dense attention, which needs no indexer, by vLLM's own layer."""
    folder = random_checkpoint(tmp_path / "model", **shape)
    own, engine = keye.load(folder, dtype="float32"), start_engine(folder, **options)
    mode = "sparse" if "moe" in shape else "dense"
    for messages in (CONVERSATIONS["text"], CONVERSATIONS["image"]):
        (output,) = engine.chat(messages, greedy(prompt_logprobs=0), use_tqdm=False)
        check(own, messages, output, mode=mode)
