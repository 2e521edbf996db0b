"""The steps and packs that a check predicts are those that training takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from keye.train.finetune.check import count_work
from keye.train.layout import Layout
from keye.train.recipes.family.batches import open_stream
from tests.support.family import all_steps, family_stage, talk, write_rows
from tests.support.tiny import NANO

#: Letters of a question: some fill more than half a pack, so that packs are far from full.
LETTERS = (3, 70, 71, 72, 5, 73, 90, 4)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("packing", [True, False])
def test_steps_and_packs_are_those_of_training(packing: bool, batch: int, tmp_path: Path) -> None:
    rows = [talk("x" * count, "y") for count in LETTERS * 3]
    stage = family_stage(write_rows(tmp_path / "a.jsonl", rows), batch=batch, packing=packing, steps=None, epochs=1.0)
    steps = all_steps(stage, NANO)
    layout = Layout.of_folder(NANO, max_tokens=stage.max_tokens)
    stream = open_stream(stage.data, NANO, seed=3, epochs=1.0)
    work = count_work(stage, [layout.lay_out(sample).length for sample in stream], len(rows))
    packs = sum(len(step.micro) for step in steps)
    assert work.steps == len(steps)
    assert work.packs == packs if not packing else work.packs >= packs  # what samples share, training counts once


def test_many_samples_are_as_many_times_the_work_of_some(tmp_path: Path) -> None:
    stage = family_stage(write_rows(tmp_path / "a.jsonl", [talk("a", "b")]), max_tokens=100, steps=None, epochs=1.0)
    assert count_work(stage, [60], 1e6).steps == 1_000_000  # each fills more than half of a pack
    assert count_work(stage, [20], 1e6).steps == 200_000
    few = stage.model_copy(update={"steps": 7, "epochs": None})
    work = count_work(few, [60, 30], None)
    assert (work.steps, work.packs, work.tokens) == (7, 7, 630)
