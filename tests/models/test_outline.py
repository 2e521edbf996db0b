"""Parameters by part: the same whether experts are fused or apart, and nothing is left over."""

from __future__ import annotations

import math
from typing import Any

import pytest

from keye.config import read_json
from keye.hub import asset
from keye.models.outline import PACKING_ROWS, PARTS, active_parameters, outline, parameters_by_part, read_parameters


@pytest.mark.parametrize("name", ["preview", "1.5", "2.0", "671b"])
def test_every_tensor_of_a_published_model_has_a_part(name: str) -> None:
    result = outline(read_json(asset(f"configs/{name}") / "config.json"))
    parts = parameters_by_part(result.shapes)
    assert "other" not in parts
    assert sum(parts.values()) == sum(math.prod(shape) for shape in result.shapes.values())
    assert read_parameters(result.shapes) == sum(parts.values()) - PACKING_ROWS * 1152


def test_parts_of_a_small_model(make_model: Any, raw_config: dict[str, Any]) -> None:
    model = make_model()
    parts = parameters_by_part({name: tensor.shape for name, tensor in model.state_dict().items()})
    result = outline(raw_config)
    assert parameters_by_part(result.shapes) == {"packing table (never read)": PACKING_ROWS * 32, **parts}
    assert parts["experts"] == 2 * 8 * 3 * 48 * 24
    assert parts["router"] == 2 * 8 * 48
    assert parts["indexer"] == 2 * (8 * 17 * 48 + 16 * 48 + 16 + 32)
    assert list(parts) == [part for part, _ in PARTS if part in parts]


def test_separate_experts_and_the_pooling_head() -> None:
    shapes = {
        "model.layers.0.mlp.experts.7.up_proj.weight": (3, 2), "model.layers.0.mlp.gate.weight": (5, 2),
        "model.layers.0.mlp.gate_proj.weight": (7, 2), "visual.vision_model.head.mlp.fc1.weight": (11, 2),
        "model.layers.0.post_attention_layernorm.weight": (13,), "model.layers.0.self_attn.q_norm.weight": (17,),
    }  # fmt: skip
    assert parameters_by_part(shapes) == {
        "pooling head (never read)": 22, "attention": 17, "router": 10, "experts": 6, "dense layers": 14, "norms": 13,
    }  # fmt: skip


def test_tied_embeddings_count_once(raw_config: dict[str, Any]) -> None:
    untied, tied = outline(raw_config), outline({**raw_config, "tie_word_embeddings": True})
    assert set(untied.shapes) - set(tied.shapes) == {"lm_head.weight"}


def test_active_parameters() -> None:
    parts = {"vision tower": 1000, "embeddings": 500, "experts": 80, "attention": 7, "head": 3}
    assert active_parameters(parts, (2, 8)) == 20 + 7 + 3
    assert active_parameters({**parts, "experts": 0, "dense layers": 4}, None) == 14


def test_deepseek_v3_has_its_published_size() -> None:
    shapes = outline(read_json(asset("configs/671b") / "config.json")).shapes
    decoder = {name: shape for name, shape in shapes.items() if not name.startswith(("visual.", "mlp_AR."))}
    assert sum(map(math.prod, decoder.values())) == 671_026_419_200
