"""Parts with new weights in a model that keeps the others."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from keye.config import ConfigError, load_model_config
from keye.models.load import load_model, save_model
from keye.train.packed import TreeStep
from keye.train.recipes.nano.initialise import fresh_model
from keye.train.renew import renew_parts
from tests.support.tiny import tiny_config, tiny_folder


@pytest.fixture
def dense_folder(tmp_path):
    """A model whose config.json describes indexers that its file does not hold."""
    folder = tiny_folder(tmp_path / "model", weights=False)
    save_model(fresh_model(tiny_config(), 0), folder, dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "sa_indexer" not in name}, folder / "model.safetensors")
    return folder


def test_indexers_are_added_to_a_model_that_attends_densely(dense_folder):
    config = load_model_config(dense_folder)
    model, report = load_model(dense_folder, config, dtype=torch.float32)
    assert report.lacks_indexer and model.config.text.sparse is None
    before = {name: p.clone() for name, p in model.named_parameters()}
    renew_parts(model, config, ("indexer",), seed=1)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in before.items())
    added = {name for name, _ in model.named_parameters()} - before.keys()
    assert added and all(".sa_indexer." in name for name in added)
    save_model(model, dense_folder, dtype=torch.float32)
    assert not load_model(dense_folder, config)[1].lacks_indexer


@pytest.mark.parametrize("size", [0.1, 1.0, 20.0])
def test_scores_of_new_indexers_hardly_differ(dense_folder, size):
    config = load_model_config(dense_folder)
    model, _ = load_model(dense_folder, config, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight *= size
    renew_parts(model, config, ("indexer",), seed=1)
    length, scored = 64, []

    class Watch(TreeStep):
        def attend(self, layer, q, k, v, index):
            scores = ((index.q @ index.k.T).relu() * index.gate[:, :, None]).sum(1)[-1]
            scored.append(scores.softmax(0))
            return super().attend(layer, q, k, v, index)

    step = Watch(torch.tensor([[0, length, -1]]), config.text, "warmup")
    ids = torch.randint(20, 200, (length,), generator=torch.Generator().manual_seed(0))
    model(model.embed(ids), torch.arange(length).expand(3, length), step)
    for shares in scored:
        entropy = -float((shares * shares.log()).sum().detach()) / math.log(length)
        assert 0.9 < entropy < 0.99999


def test_a_new_projector_leaves_the_rest_alone():
    model, config = fresh_model(tiny_config(), 0), tiny_config()
    before = {name: p.clone() for name, p in model.named_parameters()}
    renew_parts(model, config, ("projector",), seed=1)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"mlp_AR.linear_1.weight", "mlp_AR.linear_2.weight"}
    first = model.mlp_AR.linear_1.weight.clone()
    renew_parts(model, config, ("projector",), seed=1)
    assert torch.equal(model.mlp_AR.linear_1.weight, first)


def test_what_a_model_does_not_have_is_named(tmp_path):
    folder = tiny_folder(tmp_path / "model", weights=False)
    raw = json.loads((folder / "config.json").read_text())
    del raw["sa_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    config = load_model_config(folder)
    with pytest.raises(ConfigError, match="config.json has no sa_config; add it"):
        renew_parts(fresh_model(config, 0), config, ("indexer",), seed=0)
    with pytest.raises(ConfigError, match='renews names "dense"'):
        renew_parts(fresh_model(config, 0), config, ("dense",), seed=0)
