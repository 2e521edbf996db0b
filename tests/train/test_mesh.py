"""Runs of several processes have the losses of one with the same batches, whichever way the model is divided."""

import json
from pathlib import Path

import pytest
import torch

from keye.config import ConfigError, model_config_from_dict
from keye.models.load import save_model
from keye.train.config import LoraSettings, ParallelSettings
from keye.train.mesh import check_sizes
from keye.train.recipes.family.batches import features_folder
from keye.train.recipes.nano.initialise import fresh_model
from tests.support.distributed import (
    LONG,
    largest_difference,
    picture_stage,
    read_log,
    text_run,
    text_stage,
    torchrun,
    train_text,
)
from tests.support.tiny import tiny_folder, tiny_raw
from tests.support.training import weights

SHARDED = ParallelSettings(shard=True)


def test_two_processes_that_share_the_weights_have_the_losses_of_one(tmp_path: Path) -> None:
    stage = text_stage(tmp_path, batch=2, trains="all", attention="sparse")
    alone = train_text(text_run(tmp_path, "one", stage))
    shared = train_text(text_run(tmp_path, "two", stage, processes=2, parallel=SHARDED))
    assert len(alone) == 50 and alone[-1]["loss"] < alone[0]["loss"]
    assert largest_difference(alone, shared) < 1e-5
    assert largest_difference(alone, shared, "grad_norm") < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_processes_that_divide_the_tokens_have_the_losses_of_one(tmp_path: Path, attention) -> None:
    stage = text_stage(tmp_path, steps=8, trains="all", attention=attention, router_z=0.001)
    alone = train_text(text_run(tmp_path, "one", stage))
    for number, parallel in enumerate((ParallelSettings(context=2), ParallelSettings(context=2, shard=True))):
        divided = train_text(text_run(tmp_path, f"divided {number}", stage, processes=2, parallel=parallel))
        for name in ("loss", "grad_norm", "balance", *(["kl"] if attention == "sparse" else [])):
            assert largest_difference(alone, divided, name) < 2e-5, name


@LONG
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance", "kinds"), [
    ("float32", 1e-5, [(2, False), (4, True)]), ("bfloat16", 2e-3, [(2, False), (4, False)]),
    # FSDP2 rounds a gradient that it has summed in float32 to the dtype of its weight: a step here is 1e-4 off.
    ("bfloat16", 1e-2, [(2, True)]),
])  # fmt: skip
def test_torchrun_has_the_losses_of_one_process(tmp_path: Path, dtype, tolerance, kinds) -> None:
    stage = text_stage(tmp_path, trains="all", attention="sparse")
    alone = train_text(text_run(tmp_path, "one", stage, dtype=dtype))
    for processes, shard in kinds:
        config = text_run(tmp_path, f"{processes} {shard}", stage, dtype=dtype, parallel=ParallelSettings(shard=shard))
        result = torchrun(config, processes)
        assert result.returncode == 0, result.stderr
        assert largest_difference(alone, read_log(config.output)) < tolerance, (processes, shard)


@LONG
@pytest.mark.slow
def test_experts_that_lie_in_memory_as_decoding_likes_them_are_divided(tmp_path: Path) -> None:
    raw = tiny_raw() | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 4096}
    model, stage = tiny_folder(tmp_path / "model", weights=False), text_stage(tmp_path, steps=2)
    (model / "config.json").write_text(json.dumps(raw))
    save_model(fresh_model(model_config_from_dict(raw), 0), model, dtype=torch.bfloat16)
    options = {"fresh": False, "dtype": "bfloat16"}
    alone = train_text(text_run(tmp_path, "one", stage, **options))
    shared = train_text(text_run(tmp_path, "two", stage, processes=2, parallel=SHARDED, **options))
    assert largest_difference(alone, shared) < 1e-2


@LONG
@pytest.mark.slow
def test_processes_that_divide_the_experts_have_the_losses_of_one(tmp_path: Path) -> None:
    stage = text_stage(tmp_path, steps=8, trains="all", attention="sparse")
    config = text_run(tmp_path, "one", stage)
    alone = train_text(config)
    kinds = [(2, ParallelSettings(expert=2)), (4, ParallelSettings(expert=2, context=2, shard=True))]
    for processes, parallel in kinds:
        divided = text_run(tmp_path, f"divided {processes}", stage, processes=processes, parallel=parallel)
        log = train_text(divided)
        for name in ("loss", "grad_norm"):
            assert largest_difference(alone, log, name) < 2e-5, name
        left, right = weights(config.output), weights(divided.output)
        assert left.keys() == right.keys()
        # AdamW moves numbers whose gradient is nearly zero by its sign.
        assert max(float((left[name] - right[name]).abs().mean()) for name in left) < 1e-5


@pytest.mark.parametrize(("fields", "message"), [
    ({"context": 3}, "parallel.context is 3, which does not divide the 4 processes of the run"),
    ({"expert": 3}, "parallel.expert is 3, which does not divide the 4 processes of the run"),
    ({"expert": 4}, "parallel.expert is 4, which does not divide the 6 experts of a layer"),
])  # fmt: skip
def test_sizes_that_do_not_divide(fields, message) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sizes(ParallelSettings(**fields), 4, model_config_from_dict(tiny_raw() | {"num_experts": 6}).text)


@LONG
@pytest.mark.slow
@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_processes_without_pictures_keep_step_with_those_that_have_some(tmp_path: Path, attention) -> None:
    """The tower is trained; of the packs of a step some have pictures, of different sizes, and some have none."""
    stage = picture_stage(tmp_path, steps=6, attention=attention, trains="all")
    alone = train_text(text_run(tmp_path, "one", stage))
    for number, parallel in enumerate((SHARDED, ParallelSettings(context=2, shard=True))):
        divided = train_text(text_run(tmp_path, f"divided {number}", stage, processes=2, parallel=parallel))
        for name in ("loss", "grad_norm"):
            assert largest_difference(alone, divided, name) < 2e-5, name


@LONG
@pytest.mark.slow
@pytest.mark.parametrize("trains", ["decoder", "projector"])
def test_what_a_frozen_tower_has_computed_is_kept_by_processes_that_share_its_weights(tmp_path: Path, trains) -> None:
    stage = picture_stage(tmp_path, steps=6, trains=trains, features_gib=1)
    alone = train_text(text_run(tmp_path, "one", stage))
    shared = train_text(text_run(tmp_path, "two", stage, processes=2, parallel=SHARDED))
    assert largest_difference(alone, shared) < 2e-5
    stored = [sorted(path.name for path in features_folder(tmp_path / name).iterdir()) for name in ("one", "two")]
    assert stored[0] == stored[1] != []


@pytest.mark.slow
def test_an_adapter_is_trained_by_processes_that_share_the_weights(tmp_path: Path) -> None:
    stage, lora = text_stage(tmp_path, steps=10, lr=1e-2, trains="decoder"), LoraSettings(rank=4, experts=True)
    alone = train_text(text_run(tmp_path, "one", stage, lora=lora))
    shared = train_text(text_run(tmp_path, "two", stage, lora=lora, processes=2, parallel=SHARDED))
    assert alone[-1]["loss"] < alone[0]["loss"]
    assert largest_difference(alone, shared) < 1e-5
    assert (tmp_path / "two" / "adapter_model.safetensors").exists()
