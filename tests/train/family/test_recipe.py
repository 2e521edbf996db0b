"""What the family's recipe does around the steps of a stage: changes of the model, adapters, what is kept."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from keye.config import ConfigError, load_model_config
from keye.train.config import LoraSettings
from keye.train.recipes.family.batches import read_features
from keye.train.recipes.family.config import FamilyConfig
from keye.train.recipes.family.recipe import FamilyRecipe
from keye.train.recipes.nano.initialise import fresh_model
from tests.support.family import all_steps, family_stage, first_micro, talk, tiny_network, write_rows
from tests.support.tiny import tiny_folder


@pytest.fixture
def folder(tmp_path):
    folder = tiny_folder(tmp_path / "model", weights=False)
    write_rows(folder / "data.jsonl", [talk(f"What is {n}?", "red") for n in range(4)])
    return folder


def begin(folder, *stages, model=None, **run):
    """A recipe whose last stage begins."""
    recipe, model = FamilyRecipe(), model or tiny_network()
    recipe.begin_run(model, FamilyConfig(model=folder, output=folder, stages=stages, **run))
    recipe.begin_stage(stages[-1], model, folder, seed=0, resumed=False)
    return recipe, model


@pytest.mark.parametrize("objective", ["pairs", "modes", "distill", "dpo", "mpo"])
@pytest.mark.parametrize(("parallel", "field"), [({"shard": True}, "shard = true"), ({"expert": 2}, "expert above 1")])
def test_stages_that_use_the_engine_need_the_whole_model(folder, objective, parallel, field):
    fields = {"objective": objective, **({"distill": {"teacher": folder}} if objective == "distill" else {})}
    stages = [family_stage(folder / "data.jsonl", name="first"), family_stage(folder / "data.jsonl", **fields)]
    raw = {"model": folder, "output": folder, "stage": stages, "parallel": parallel}
    with pytest.raises(ValueError, match=rf"parallel has {field}, but objective = .* \(stage 's'\) needs the whole"):
        FamilyConfig(**raw)
    on_gpus = {**raw, "device": "cuda", "parallel": {}}
    assert not FamilyConfig(**on_gpus).shards and FamilyConfig(**{**on_gpus, "stage": stages[:1]}).shards


def test_a_stage_changes_context_and_rope_base(folder):
    stage = family_stage(folder / "data.jsonl", context=65536, rope_theta=8e6, topk=8)
    positions = torch.arange(4).expand(3, 4)
    before = tiny_network().model.rope(positions).cos
    _, model = begin(folder, stage)
    config = load_model_config(folder)
    assert (config.text.max_position_embeddings, config.text.rope_theta, config.text.sparse.topk) == (65536, 8e6, 8)
    assert model.config.text == config.text == model.model.config
    assert not torch.equal(model.model.rope(positions).cos, before)


def test_later_stages_and_resumed_ones_keep_the_changes(folder):
    first = family_stage(folder / "data.jsonl", name="long", context=65536)
    second = family_stage(folder / "data.jsonl", name="after")
    original = (folder / "config.json").read_text()
    begin(folder, first, second)
    assert load_model_config(folder).text.max_position_embeddings == 65536
    (folder / "config.json").write_text(original)  # what a run does that starts again
    begin(folder, first, second)
    assert load_model_config(folder).text.max_position_embeddings == 65536


def test_packs_longer_than_the_context_are_an_error(folder):
    raw = json.loads((folder / "config.json").read_text())
    stage = family_stage(folder / "data.jsonl", max_tokens=2 * raw["max_position_embeddings"])
    with pytest.raises(ConfigError, match=r"max_tokens is .*, but the model's context holds"):
        begin(folder, stage)


@pytest.mark.parametrize("fields", [{"attention": "sparse"}, {"topk": 8}])
def test_what_needs_an_indexer_is_an_error_without(folder, fields):
    raw = json.loads((folder / "config.json").read_text())
    del raw["sa_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    model = fresh_model(load_model_config(folder), 0)
    with pytest.raises(ConfigError, match="the model has no indexer"):
        begin(folder, family_stage(folder / "data.jsonl", **fields), model=model)


def test_an_adapter_is_all_that_learns(folder):
    stage = family_stage(folder / "data.jsonl", attention="sparse", lr=3e-4)
    recipe, model = begin(folder, stage, lora=LoraSettings(rank=2, targets=("attention", "indexer")))
    trained = recipe.prepare(model, stage)
    assert {each.lr for each in trained} == {3e-4} and not any(each.is_matrix for each in trained)
    micro, count = first_micro(stage, folder)
    recipe.make_objective(stage, model).loss(model, micro, count).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert any(each.parameter.grad is not None and each.parameter.grad.any() for each in trained)
    frozen = stage.model_copy(update={"freezes": ("indexer",)})
    names = {each.name for each in recipe.prepare(model, frozen)}
    assert names and not any("sa_indexer" in name for name in names)
    with pytest.raises(ConfigError, match="changes nothing of the adapter"):
        recipe.prepare(model, stage.model_copy(update={"freezes": ("attention", "indexer")}))


def test_an_adapter_is_written_in_place_of_the_model(folder, tmp_path):
    stage = family_stage(folder / "data.jsonl")
    recipe, model = begin(folder, stage, lora=LoraSettings(rank=2))
    recipe.save(model, {}, tmp_path / "out", torch.float32)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    base = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base) == folder


@pytest.mark.parametrize(
    ("fields", "stored"),
    [
        ({"trains": "all"}, None),
        ({"trains": "decoder"}, "tokens"),
        ({"trains": "projector"}, "patches"),
        ({"trains": "decoder", "features_gib": 0.0}, None),
    ],
)
def test_features_are_kept_of_what_is_frozen(folder, fields, stored):
    recipe, _ = begin(folder, family_stage(folder / "data.jsonl", **fields))
    cache = read_features(folder)
    assert (None if cache is None else cache.stored) == stored
    assert (recipe.cache is None) == (stored is None)


def test_kept_features_have_the_same_gradient(folder):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (84, 84, 3), np.uint8)).save(folder / "a.png")
    write_rows(folder / "data.jsonl", [talk("<image>What?", "red", images=["a.png"])])
    stage, results = family_stage(folder / "data.jsonl", trains="decoder"), []
    recipe, model = begin(folder, stage)
    objective = recipe.make_objective(stage, model)
    for expected in (False, True):
        micro, count = first_micro(stage, folder)
        assert (micro.features is not None) == expected
        model.zero_grad()
        objective.loss(model, micro, count).backward()
        results.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


def test_held_out_data_are_read_once_in_order(folder):
    stage = family_stage(folder / "data.jsonl", val_data=[{"path": str(folder / "data.jsonl")}], packing=False)
    recipe, _ = begin(folder, stage)
    counts = []
    source = recipe.open_validation(stage, folder, rank=0, size=1)
    while (step := source.next()) is not None:
        counts.append(step.count)
    assert len(counts) == 4 and all_steps(stage, folder)
    assert recipe.open_validation(family_stage(folder / "data.jsonl"), folder, rank=0, size=1) is None


def test_missing_data_of_a_later_stage_end_the_run_before_the_first(folder):
    first = family_stage(folder / "data.jsonl", name="first")
    second = family_stage(folder / "none.jsonl", name="second")
    with pytest.raises(ConfigError, match="stage 'second': .*none.jsonl is missing; check the path"):
        FamilyRecipe().begin_run(tiny_network(), FamilyConfig(model=folder, output=folder, stages=(first, second)))
    distill = family_stage(folder / "data.jsonl", objective="distill", distill={"teacher": folder / "none"})
    with pytest.raises(ConfigError, match="name the folder of its teacher"):
        FamilyRecipe().begin_run(tiny_network(), FamilyConfig(model=folder, output=folder, stages=(distill,)))
