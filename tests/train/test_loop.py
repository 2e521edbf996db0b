"""Whole runs of a tiny model: files, resuming to the same weights, learning."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from keye.commands.train import report_line
from keye.config import ConfigError, load_model_config
from keye.errors import KeyeError
from keye.models.load import load_model
from keye.models.quantize import quantize_checkpoint
from keye.quant.policy import make_policy
from keye.train.checkpoint import FOLDER
from keye.train.metrics import round_figure
from keye.train.output import LOG_FILE
from keye.train.recipes.nano.config import Mix
from tests.support.tiny import tiny_folder
from tests.support.training import (
    LANGUAGE,
    SPARSE,
    VISION,
    a_run,
    assert_same_weights,
    nano_stage,
    train_nano,
    weights,
)  # fmt: skip


class Killed(Exception):
    """Stands for whatever ends a run early."""


def kill_at(stage: str, step: int):
    def report(figures):
        if (figures["stage"], figures["step"]) == (stage, step):
            raise Killed

    return report


def test_interrupted_run_ends_with_the_same_weights(tmp_path):
    stages = (VISION, LANGUAGE, SPARSE)
    straight = train_nano(a_run(tmp_path, "straight", *stages))
    config = a_run(tmp_path, "broken", *stages)
    # Between checkpoints, just before one, and right after a stage has begun.
    for stage, step in (("read", 3), ("read", 4), ("select", 1)):
        with pytest.raises(Killed):
            train_nano(config, report=kill_at(stage, step))
    train_nano(config)
    assert_same_weights(straight, config.output)
    assert [path.name for path in (config.output / FOLDER).iterdir()] == ["03-00000000"]
    # Nothing is left to do, and the result is a model like any other.
    train_nano(config)
    assert_same_weights(straight, config.output)
    load_model(config.output, load_model_config(config.output))
    log = [json.loads(line) for line in (straight / LOG_FILE).read_text().splitlines()]
    assert [line["step"] for line in log if line["stage"] == "read"] == [1, 2, 3, 4, 5]


def test_the_last_record_of_a_stage_is_of_its_last_step(tmp_path):
    records = []
    train_nano(a_run(tmp_path, "out", VISION, log_seconds=3600.0), report=records.append)
    assert [record["step"] for record in records] == [VISION.steps]
    assert all(records[0][name] > 0 for name in ("grad_norm", "loss", "steps_per_second"))


def test_figures_of_the_log_are_json():
    values = (0.000123456789, 1234567.8, 12345678, float("nan"), float("inf"))
    assert [round_figure(value) for value in values] == [1.23457e-4, 1234570.0, 12345678, None, None]
    assert report_line({"stage": "read", "step": 3, "minutes": 0.5, "loss": None, "grad_norm": None}) == (
        "read: step 3, 0.5 min, loss not finite, grad_norm not finite"
    )


def test_resuming_with_other_stages_is_an_error(tmp_path):
    config = a_run(tmp_path, "out", LANGUAGE)
    with pytest.raises(Killed):
        train_nano(config, report=kill_at("read", 3))
    changed = config.model_copy(update={"stages": (LANGUAGE.model_copy(update={"trains": "all"}),)})
    with pytest.raises(KeyeError, match="resume with the same model and stages"):
        train_nano(changed)


def test_existing_output_is_kept_unless_resumed(tmp_path):
    config = a_run(tmp_path, "out", VISION)
    train_nano(config)
    with pytest.raises(ConfigError, match="already holds a run"):
        train_nano(config, resume=False)


def test_a_run_starts_from_the_weights_of_its_model(tmp_path):
    tiny_folder(tmp_path / "model")
    out = train_nano(a_run(tmp_path, "out", VISION, fresh=False))
    before, after = weights(tmp_path / "model"), weights(out)
    untouched = [name for name in before if not name.startswith(("visual.", "mlp_AR."))]
    assert untouched
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    assert not torch.equal(before["mlp_AR.linear_1.weight"], after["mlp_AR.linear_1.weight"])


def test_seeds_and_fresh_weights(tmp_path):
    first = train_nano(a_run(tmp_path, "one", VISION))
    second = train_nano(a_run(tmp_path, "two", VISION, seed=5))
    assert not torch.equal(weights(first)["lm_head.weight"], weights(second)["lm_head.weight"])


@pytest.mark.slow
def test_a_tiny_model_learns(tmp_path):
    stage = nano_stage(
        "learn", steps=150, trains="all", lr=5e-3, adam_lr=5e-3, warmup_steps=10, text_chance=0.0,
        mix=(Mix(frames=2, clips=6, questions=8),), task_weights={"presence": 5.0, "count": 5.0, "start": 5.0},
    )  # fmt: skip
    losses = []
    train_nano(
        a_run(tmp_path, "out", stage, save_steps=None), report=lambda figures: losses.append(figures.get("loss"))
    )
    finite = [loss for loss in losses if loss is not None]
    assert sum(finite[-10:]) < 0.35 * sum(finite[:10])


def test_a_model_that_is_not_a_run_is_not_overwritten(tmp_path):
    tiny_folder(tmp_path / "mine")
    before = (tmp_path / "mine" / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="holds a model that no run made"):
        train_nano(a_run(tmp_path, "mine", VISION))
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "log.jsonl", "model-00001-of-00002.safetensors"])
def test_files_of_others_are_kept(tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("mine\n")
    with pytest.raises(ConfigError, match="choose another output so that it is kept"):
        train_nano(a_run(tmp_path, "mine", VISION))
    assert [(file.name, file.read_text()) for file in (tmp_path / "mine").iterdir()] == [(name, "mine\n")]


def test_output_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="is a file; output must be a folder"):
        train_nano(a_run(tmp_path, "out", VISION))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_run_that_cannot_begin_leaves_nothing_behind(tmp_path, missing):
    tiny_folder(tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    with pytest.raises(KeyeError):
        train_nano(a_run(tmp_path, "out", LANGUAGE, fresh=missing == "tokenizer.json"))
    assert not (tmp_path / "out").exists()


def test_stages_that_have_begun_keep_their_names(tmp_path):
    config = a_run(tmp_path, "out", VISION, LANGUAGE)
    with pytest.raises(Killed):
        train_nano(config, report=kill_at("read", 3))
    with pytest.raises(ConfigError, match="began with the stages see, read; keep these"):
        train_nano(a_run(tmp_path, "out", LANGUAGE, SPARSE))


def test_a_checkpoint_without_indexers_cannot_be_trained(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "sa_indexer" not in k}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="has no indexer weights"):
        train_nano(a_run(tmp_path, "out", LANGUAGE, fresh=False))


def test_a_quantised_checkpoint_cannot_be_trained(tmp_path):
    source = tiny_folder(tmp_path / "source")
    quantize_checkpoint(source, load_model_config(source), tmp_path / "model", make_policy("int8"))
    with pytest.raises(ConfigError, match="is quantised and cannot be trained"):
        train_nano(a_run(tmp_path, "out", LANGUAGE, fresh=False))
