"""Checkpoints: a run that ends anywhere goes on to the same weights, whatever was being written at that moment."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from keye.config import ConfigError
from keye.errors import KeyeError
from keye.files import DiskFull
from keye.train import checkpoint
from keye.train.checkpoint import FOLDER, PROGRESS_FILE
from keye.train.loop import train
from keye.train.output import CONFIG_FILE, lock_output
from keye.train.recipes import load_run
from keye.train.recipes.family.config import FamilyConfig
from keye.train.recipes.family.objectives import NextToken
from keye.train.recipes.family.recipe import FamilyRecipe
from tests.support.distributed import text_run, text_stage, train_text
from tests.support.training import assert_same_weights

STEPS = {"steps": 6, "max_tokens": 48, "batch": 1}


class Killed(BaseException):
    """Stands for what ends a process at once."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("runs")
    train_text(text_run(folder, "straight", text_stage(folder, **STEPS)))
    return folder


def names(output: Path) -> list[str]:
    return sorted(path.name for path in (output / FOLDER).iterdir())


def run_until(config: FamilyConfig, target: Any, name: str, call: int, error: BaseException) -> None:
    """A run in which call number `call` of the function `target.name` raises `error`."""
    function, calls = getattr(target, name), iter(range(1, 1000))

    def failing(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise error
        return function(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, failing)
        train(config, FamilyRecipe())


#: What is interrupted: the second checkpoint before its name, at its name, and before it has any tensors; the model
#: at the end of the stage, whose last checkpoint is there; and the end of the stage itself.
PLACES = {"tensors": (checkpoint, "_sync", 3), "rename": (os, "rename", 2), "begin": (checkpoint, "save", 2),
          "model": (FamilyRecipe, "save", 1), "end": (FamilyRecipe, "end_stage", 1)}  # fmt: skip
SLOW = [pytest.param(place, marks=pytest.mark.slow) for place in ("rename", "begin", "model", "end")]


@pytest.mark.parametrize("place", ["tensors", *SLOW])
def test_killed_anywhere_a_run_ends_with_the_same_weights(home: Path, place: str) -> None:
    config = text_run(home, f"killed at {place}", text_stage(home, **STEPS), save_steps=2)
    with pytest.raises(Killed):
        run_until(config, *PLACES[place], Killed())
    train(config, FamilyRecipe())
    assert_same_weights(home / "straight", config.output)
    assert names(config.output) == ["01-00000000"]


@pytest.mark.slow
def test_the_newest_checkpoints_are_kept(home: Path) -> None:
    config = text_run(home, "kept", text_stage(home, **STEPS), save_steps=2, keep=3)
    train_text(config)
    assert names(config.output) == ["00-00000006", "00-00000006-end", "01-00000000"]
    assert_same_weights(home / "straight", config.output)


@pytest.mark.slow
def test_a_disk_that_is_full_is_one_sentence_and_the_run_goes_on_later(home: Path) -> None:
    config = text_run(home, "full", text_stage(home, **STEPS), save_steps=2)
    with pytest.raises(DiskFull, match="no room is left to write"):
        run_until(config, checkpoint, "save", 2, OSError(errno.ENOSPC, "No space left"))
    assert names(config.output)[-1] == "00-00000002"
    train(config, FamilyRecipe())
    assert_same_weights(home / "straight", config.output)


@pytest.mark.slow
def test_a_run_that_is_done_keeps_what_its_stages_have_changed(home: Path) -> None:
    config = text_run(home, "straight", text_stage(home, **STEPS))
    path = config.output / "config.json"
    before = path.read_text()
    path.write_text(before.replace('"max_position_embeddings": ', '"max_position_embeddings": 1'))
    train(config, FamilyRecipe())
    assert path.read_text() != before
    path.write_text(before)


def test_two_runs_in_one_folder(home: Path) -> None:
    config = text_run(home, "locked", text_stage(home, **STEPS))
    with lock_output(config.output), pytest.raises(ConfigError, match="another run is writing to .*locked"):
        train(config, FamilyRecipe())


def test_more_threads_than_cores(tmp_path: Path) -> None:
    config = text_run(tmp_path, "threads", text_stage(tmp_path, **STEPS), threads=9999)
    with pytest.raises(KeyeError, match=r"threads is 9999, but only \d+ cores can be used here; set it to at most"):
        train(config, FamilyRecipe())
    assert not config.output.exists()


def test_a_run_of_an_older_version_is_kept(home: Path) -> None:
    config = text_run(home, "older", text_stage(home, **STEPS))
    config.output.mkdir()
    (config.output / PROGRESS_FILE).write_text(json.dumps({"stage": 0, "step": 5, "seconds": 1.0}))
    with pytest.raises(ConfigError, match="of an older version of keye, which cannot be resumed"):
        train(config, FamilyRecipe())
    assert [path.name for path in config.output.iterdir()] == [PROGRESS_FILE]


@pytest.mark.slow
def test_a_checkpoint_of_other_parameters_names_both_shapes(home: Path) -> None:
    config = text_run(home, "other", text_stage(home, **STEPS), save_steps=2)
    with pytest.raises(Killed):
        run_until(config, checkpoint, "save", 2, Killed())
    changed = config.model_copy(update={"stages": (text_stage(home, **STEPS, trains="decoder"),)})
    with pytest.raises(KeyeError, match=r"holds first.mlp_AR.\S+ as [\d x]+, where this run has nowhere; resume with"):
        train(changed, FamilyRecipe())


def test_the_resolved_configuration_is_saved_with_the_run(home: Path) -> None:
    config, recipe = load_run(home / "straight" / CONFIG_FILE)
    assert isinstance(recipe, FamilyRecipe)
    expected = text_run(home, "straight", text_stage(home, **STEPS))
    assert config.stages == expected.stages and config.output == expected.output.resolve()


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(home: Path) -> None:
    stage = text_stage(home, **{**STEPS, "batch": 2})
    alone = train_text(text_run(home, "one process", stage))
    config = text_run(home, "fewer processes", stage, save_steps=3, processes=2)
    with pytest.raises(Killed):
        run_until(config, FamilyRecipe, "end_stage", 1, Killed())
    log = train_text(config.model_copy(update={"processes": 1}))
    assert [line["loss"] for line in log] == pytest.approx([line["loss"] for line in alone], rel=1e-5)


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_one_sentence_with_its_size(home: Path) -> None:
    config = text_run(home, "too large", text_stage(home, **STEPS))
    with pytest.raises(KeyeError, match=r"a step of \d+ tokens does not fit in the memory of cpu; lower max_tokens"):
        run_until(config, NextToken, "loss", 2, torch.OutOfMemoryError("out of memory"))


def test_time_left_is_known_where_epochs_end_a_stage(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    stage = text_stage(tmp_path, steps=None, epochs=0.5, max_tokens=96, batch=4)
    train(text_run(tmp_path, "epochs", stage, log_seconds=0.0), FamilyRecipe(), report=records.append)
    left = [record["seconds_left"] for record in records if "seconds_left" in record]
    assert len(records) > 2
    assert left


def test_a_folder_that_cannot_be_made_is_one_sentence() -> None:
    with (
        pytest.raises(KeyeError, match="/proc/none/run cannot be written .*name another place"),
        lock_output(Path("/proc/none/run")),
    ):
        pass
