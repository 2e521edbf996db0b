"""Which parameters a stage changes."""

import pytest

from keye.config import ConfigError
from keye.train.config import PARTS, StageConfig
from keye.train.parts import choose_parameters
from keye.train.recipes.nano.initialise import fresh_model
from tests.support.tiny import tiny_config


def chosen(trains, **fields):
    model = fresh_model(tiny_config(), 0)
    names = set(choose_parameters(model, StageConfig(name="s", steps=1, trains=trains, **fields)))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names
    return names


@pytest.mark.parametrize(
    ("part", "inside", "outside"),
    [
        ("vision", "mlp_AR.linear_1.weight", "model.norm.weight"),
        ("tower", "visual.vision_model.encoder.layers.0.mlp.fc1.weight", "mlp_AR.linear_1.weight"),
        ("projector", "mlp_AR.pre_norm.bias", "visual.vision_model.post_layernorm.weight"),
        ("embeddings", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("attention", "model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.sa_indexer.q_proj.weight"),
        ("experts", "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.gate.weight"),
        ("router", "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.down_proj"),
        ("norms", "model.layers.0.input_layernorm.weight", "visual.vision_model.post_layernorm.weight"),
        ("head", "lm_head.weight", "model.norm.weight"),
        ("model.layers.1.*", "model.layers.1.input_layernorm.weight", "model.layers.0.input_layernorm.weight"),
    ],
)
def test_a_part_has_its_parameters_and_no_others(part, inside, outside):
    names = chosen(part)
    assert inside in names
    assert outside not in names


@pytest.mark.parametrize("part", ["decoder", "all", "model.layers.*"])
def test_indexers_are_trained_where_attention_teaches_them(part):
    assert not any(".sa_indexer." in name for name in chosen(part))
    assert any(".sa_indexer." in name for name in chosen(part, attention="sparse"))


def test_freezing_takes_out_of_what_is_trained():
    names = chosen("all", freezes=("tower", "*.layers.0.*"))
    assert "mlp_AR.linear_1.weight" in names
    assert not any(name.startswith("visual.") or ".layers.0." in name for name in names)


def test_every_parameter_has_a_part():
    model = fresh_model(tiny_config(), 0)
    parts = [name for name in PARTS if name not in ("all", "vision", "decoder", "dense")]
    assert chosen(parts, attention="sparse") == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"trains": "model.layers.9.*"}, "the model has no parameters 'model.layers.9.*'"),
        ({"trains": "all", "freezes": "dense"}, "no parameters 'dense'; leave that name out"),
        ({"trains": "projector", "freezes": "vision"}, "changes no parameters"),
    ],
)
def test_a_name_that_means_nothing_is_an_error(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        chosen(**fields)
