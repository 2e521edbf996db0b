"""Processes that divide heads, widths and experts of each layer have the losses of one."""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from keye.config import ConfigError, TextConfig, model_config_from_dict
from keye.train.config import LoraSettings, ParallelSettings
from keye.train.loop import Run
from keye.train.mesh import Mesh, check_sizes
from keye.train.parallel import Group, local_part
from keye.train.recipes.family.config import FamilyConfig
from keye.train.recipes.nano.initialise import fresh_model
from tests.support.distributed import LONG, largest_difference, read_log, text_run, text_stage, torchrun, train_text
from tests.support.latent import latent_raw
from tests.support.tiny import tiny_folder, tiny_raw
from tests.support.training import weights

FIGURES = {"dense": ("loss", "balance"), "warmup": ("kl",), "sparse": ("loss", "kl", "balance")}
Log = list[dict[str, Any]]


def wide_raw(**fields: Any) -> dict[str, Any]:
    """A model with four key heads of two attention heads each, and experts in one layer of two."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return tiny_raw() | heads | {"mlp_only_layers": [0], **fields}


def wide_model(folder: Path, **fields: Any) -> None:
    model = tiny_folder(folder / "model", weights=False)
    (model / "config.json").write_text(json.dumps(wide_raw(**fields)))


def wide_text(**fields: Any) -> TextConfig:
    return model_config_from_dict(wide_raw(num_experts=6, **fields)).text


def run(folder: Path, name: str, attention: str, steps: int = 10, **fields: Any) -> FamilyConfig:
    trains = "indexer" if attention == "warmup" else "all"
    stage = text_stage(folder, name=attention, steps=steps, trains=trains, attention=attention, router_z=0.001)
    return text_run(folder, name, stage, peak_flops=1e9, **fields)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    wide_model(folder)
    return folder


@pytest.fixture(scope="module")
def alone(home: Path) -> Callable[[str], Log]:
    """The log of one process, by attention."""
    return cache(lambda attention: train_text(run(home, f"one {attention}", attention)))


def assert_same_log(left: Log, right: Log, attention: str, processes: int) -> None:
    for name in FIGURES[attention]:
        assert largest_difference(left, right, name) < 1e-5, name
    assert largest_difference(left, right, "grad_norm") < 1e-4
    # Tokens of a step count once, however many processes have a part in them.
    for pair in zip(left, right, strict=True):
        tokens = [line["tokens_per_second"] / line["steps_per_second"] for line in pair]
        shares = [line["mfu"] / line["steps_per_second"] for line in pair]
        assert tokens[0] == pytest.approx(tokens[1], rel=1e-4)
        assert shares[0] == pytest.approx(processes * shares[1], rel=1e-4)


def assert_same_model(left: Path, right: Path) -> None:
    first, second = weights(left), weights(right)
    assert {name: each.shape for name, each in first.items()} == {name: each.shape for name, each in second.items()}
    # AdamW moves numbers whose gradient is nearly zero by its sign.
    assert max(float((first[name] - second[name]).abs().mean()) for name in first) < 1e-5


def test_two_processes_that_divide_the_heads_have_the_losses_of_one(home: Path) -> None:
    parallel = ParallelSettings(tensor=2, shard=True)
    short = run(home, "short", "sparse", 3)
    shared = run(home, "shared", "sparse", 3, processes=2, parallel=parallel)
    assert_same_log(train_text(short), train_text(shared), "sparse", 2)
    assert_same_model(short.output, shared.output)


@pytest.fixture
def four_processes() -> Iterator[Group]:
    """The first of four, whose messages go nowhere."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield Group(0, 4)
    dist.destroy_process_group()


@pytest.mark.parametrize(("shards", "part"), [(False, 2), (True, 4)])
def test_each_process_has_its_part_of_every_layer(four_processes: Group, shards, part) -> None:
    config = model_config_from_dict(wide_raw(attention_bias=True))
    model = fresh_model(config, 0)
    sizes = {name: p.numel() for name, p in model.model.layers.named_parameters()}
    Mesh(ParallelSettings(tensor=2), four_processes, config, torch.device("cpu"), shards).divide(model)
    local = {name: local_part(p).numel() for name, p in model.model.layers.named_parameters()}
    for name, size in sizes.items():
        is_whole = "norm" in name or "indexer" in name or ".gate." in name or name.endswith("o_proj.bias")
        assert local.pop(name) == (size if is_whole else size // (2 if name.endswith(".bias") else part)), name
    assert not local


@LONG
@pytest.mark.slow
@pytest.mark.parametrize(("attention", "processes", "parallel"), [
    ("dense", 2, {"tensor": 2}), ("warmup", 2, {"tensor": 2, "shard": True}), ("sparse", 2, {"context": 2}),
    ("sparse", 4, {"tensor": 4, "shard": True}), ("sparse", 4, {"tensor": 2, "shard": True}),
    ("sparse", 4, {"tensor": 2, "context": 2, "shard": True}), ("sparse", 4, {"tensor": 2, "expert": 2}),
    ("sparse", 4, {"tensor": 2, "expert": 4, "shard": True}),
])  # fmt: skip
def test_every_way_to_divide_the_heads_has_the_losses_of_one(
    home: Path, alone, attention, processes, parallel
) -> None:  # fmt: skip
    left = alone(attention)
    name = "-".join(f"{each}" for each in (attention, processes, *parallel, *parallel.values()))
    divided = run(home, name, attention, parallel=ParallelSettings(**parallel))
    # Processes of their own: what torch remembers of a mesh is wrong in a process whose next run divides otherwise.
    result = torchrun(divided, processes)
    assert result.returncode == 0, result.stderr
    assert_same_log(left, read_log(divided.output), attention, processes)
    assert_same_model(home / f"one {attention}", divided.output)


@LONG
@pytest.mark.slow
def test_a_run_goes_on_with_heads_divided_otherwise(tmp_path: Path) -> None:
    """Steps by two processes that divide heads, then by one, then by four that divide heads and weights."""
    stage = text_stage(tmp_path, steps=12, trains="all", attention="sparse", optimizer="muon")
    wide_model(tmp_path, attention_bias=True)
    alone = train_text(text_run(tmp_path, "one", stage))
    begun = text_run(tmp_path, "many", stage, processes=2, parallel=ParallelSettings(tensor=2))
    with pytest.raises(KeyboardInterrupt):
        train_steps(begun, 4)
    with pytest.raises(KeyboardInterrupt):
        train_steps(begun.model_copy(update={"processes": 1, "parallel": ParallelSettings()}), 8)
    parallel = ParallelSettings(tensor=2, shard=True)
    result = torchrun(begun.model_copy(update={"processes": 4, "parallel": parallel}), 4)
    assert result.returncode == 0, result.stderr
    log = read_log(begun.output)
    assert [line["step"] for line in log] == list(range(1, 13))
    assert largest_difference(alone, log) < 2e-4  # Muon orthogonalises in bfloat16


def train_steps(config: FamilyConfig, last: int) -> None:
    """A run with Ctrl-C after step `last`."""
    note = Run._log

    def stop(run: Run, stage: Any, clock: Any, *others: Any) -> None:
        note(run, stage, clock, *others)
        run.interrupt.is_requested = clock.step >= last

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_log", stop)
        train_text(config)


@pytest.mark.parametrize(("settings", "fields", "message"), [
    ({"tensor": 3}, {}, "parallel.tensor is 3, which does not divide the 8 processes of the run"),
    ({"tensor": 4, "context": 4}, {}, "parallel.context times parallel.tensor is 16, .* the 8 processes of the run"),
    ({"tensor": 8}, {}, "parallel.tensor is 8, which does not divide the 4 key heads"),
    ({"tensor": 4}, {"num_attention_heads": 6, "num_key_value_heads": 2}, "tensor is 4, .* the 6 attention heads"),
    ({"tensor": 2}, {"intermediate_size": 63}, "tensor is 2, .* the 63 numbers of an MLP's width"),
    ({"tensor": 4}, {}, "tensor is 4, which does not divide the 6 experts of a layer"),
    ({"tensor": 4, "expert": 4}, {}, "expert is 4, which does not divide the 6 experts"),
    ({"tensor": 2, "shard": True}, {"hidden_size": 66}, "divides the hidden_size 66 among 4 processes"),
])  # fmt: skip
def test_sizes_that_do_not_divide(settings, fields, message) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sizes(ParallelSettings(**settings), 8, wide_text(**fields), shards="shard" in settings)


def test_what_cannot_be_divided_by_heads(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="latent attention has no key heads to divide"):
        check_sizes(ParallelSettings(tensor=2), 2, model_config_from_dict(latent_raw()).text)
    with pytest.raises(ValueError, match=r"parallel.tensor .* leave it out with \[lora\]"):
        text_run(tmp_path, "run", text_stage(tmp_path), parallel=ParallelSettings(tensor=2), lora=LoraSettings())
    pictures = text_stage(tmp_path, objective="siglip", trains="tower")
    with pytest.raises(ValueError, match='parallel.tensor divides next tokens alone; .* objective = "siglip"'):
        text_run(tmp_path, "run", pictures, parallel=ParallelSettings(tensor=2))
