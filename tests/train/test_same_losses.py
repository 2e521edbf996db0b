"""A seeded run of the nano recipe has the losses that it had before the loop and the recipe were separated (e5b5567).

The figures are those of that commit, bit for bit on one machine; the tolerance is for other processors, which round
bfloat16 products otherwise. `make gpu` runs it on a card (KEYE_TEST_DEVICE=cuda).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from keye.train.recipes.nano.config import Mix
from tests.support.training import a_run, nano_stage, train_nano

DEVICE = os.environ.get("KEYE_TEST_DEVICE", "cpu")
LOSS_TOLERANCE = 0.01 if DEVICE == "cpu" else 0.02
MIX = (Mix(frames=3, clips=2, questions=5),)
STAGES = (
    nano_stage("see", kind="vision", trains="vision", steps=2, batch=3, warmup_steps=1, text_chance=0.9),
    nano_stage("read", steps=3, mix=MIX, warmup_steps=1, time_binding=0.1, pointing=0.1, events=0.1, plain_times=0.4,
               task_weights={"read": 3.0, "start": 2.0}),
    nano_stage("warm up", steps=2, mix=MIX, warmup_steps=1, trains="indexer", attention="warmup"),
    nano_stage("select", steps=2, mix=MIX, warmup_steps=1, trains="all", attention="sparse", pointing=0.05),
)  # fmt: skip
RECORDED = [
    {"loss": 32.54, "grad_norm": 43.84},
    {"loss": 29.51, "grad_norm": 23.29},
    {"loss": 7.534, "balance": 1.056, "grad_norm": 13.53},
    {"loss": 7.57, "balance": 1.04, "grad_norm": 8.015},
    {"loss": 7.523, "balance": 1.054, "grad_norm": 12.97},
    {"kl/3": 0.4433, "grad_norm": 0.8833},
    {"kl/3": 0.4043, "grad_norm": 0.6762},
    {"loss": 7.506, "kl/3": 0.2601, "balance": 1.028, "grad_norm": 2.392},
    {"loss": 7.501, "kl/3": 0.2133, "balance": 1.058, "grad_norm": 2.354},
]


def test_losses_of_every_stage(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    train_nano(a_run(tmp_path, "out", *STAGES, device=DEVICE), report=records.append)
    assert len(records) == len(RECORDED)
    for record, expected in zip(records, RECORDED, strict=True):
        for name, value in expected.items():
            rel = 0.05 if name == "grad_norm" else LOSS_TOLERANCE
            assert record[name] == pytest.approx(value, rel=rel), (record, name)
