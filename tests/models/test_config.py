"""Reading the official configuration: what it says, what is missing, what contradicts itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from keye.config import ConfigError, load_model_config, model_config_from_dict, read_json
from keye.hub import asset
from keye.models.keye import KeyeModel

#: Rows of the packing position table that official checkpoints hold and no forward pass reads.
PACKING_ROWS = 32768


@pytest.fixture
def official() -> dict[str, Any]:
    return read_json(asset("configs/2.0") / "config.json")


@pytest.mark.parametrize(
    ("name", "total"), [("preview", 8_681_590_384), ("1.5", 8_681_597_296), ("2.0", 31_122_082_160)]
)
def test_official_parameter_count(name: str, total: int) -> None:
    config = model_config_from_dict(read_json(asset(f"configs/{name}") / "config.json"))
    with torch.device("meta"):
        model = KeyeModel(config)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters + PACKING_ROWS * config.vision.hidden_size == total


def test_generations(official: dict[str, Any]) -> None:
    preview, v15, v2 = (
        model_config_from_dict(read_json(asset(f"configs/{name}") / "config.json"))
        for name in ("preview", "1.5", "2.0")
    )
    assert [config.generation for config in (preview, v15, v2)] == ["preview", "1.5", "2.0"]
    assert [config.tokens_per_second for config in (preview, v15, v2)] == [2.0, None, None]
    assert [config.vision.norm_before_merge for config in (preview, v15, v2)] == [True, False, False]
    assert [config.vision.whole_video_attention for config in (preview, v15, v2)] == [True, False, False]
    assert [config.text.sparse is not None for config in (preview, v15, v2)] == [False, False, True]
    assert [config.text.num_experts for config in (preview, v15, v2)] == [0, 0, 128]
    assert v2.without_indexer().text.sparse is None
    wrong = {**official, "vision_config": {**official["vision_config"], "norm_before_merge": True}}
    assert not model_config_from_dict(wrong).vision.norm_before_merge, "the architecture decides, not the file"


def test_official_fields(official: dict[str, Any]) -> None:
    config = model_config_from_dict(official)
    text, sparse = config.text, config.text.sparse
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (32, 4, 128)
    assert (text.num_experts, text.num_experts_per_tok, text.moe_intermediate_size) == (128, 8, 768)
    assert sparse is not None
    assert (sparse.topk, sparse.indexer_num_heads, sparse.indexer_head_dim) == (2048, 16, 64)
    assert text.mrope_section == (16, 24, 24)
    assert text.indexer_mrope_section() == (8, 12, 12)
    assert config.vision.grid_side == 27
    assert config.eos_token_ids == (151645,)
    assert config.dtype == "bfloat16"
    assert all(text.is_moe_layer(i) for i in range(48))


def test_dense_layers(official: dict[str, Any]) -> None:
    text = model_config_from_dict({**official, "mlp_only_layers": [0, 5], "decoder_sparse_step": 2}).text
    assert [i for i in range(8) if text.is_moe_layer(i)] == [1, 3, 7]
    dense = model_config_from_dict({**official, "architectures": ["KeyeVL2ForConditionalGeneration"]}).text
    assert not any(dense.is_moe_layer(i) for i in range(48))


def test_unknown_keys_are_kept_and_listed(official: dict[str, Any]) -> None:
    config = model_config_from_dict({**official, "zebra": 1, "apple": {"x": 2}})
    assert config.unknown == ("apple", "zebra")
    assert config.raw["apple"] == {"x": 2}
    assert model_config_from_dict(official).unknown == ()


def test_every_missing_field_is_named(official: dict[str, Any]) -> None:
    for name in ("hidden_size", "vocab_size", "image_token_id"):
        del official[name]
    with pytest.raises(ConfigError, match="lacks vocab_size, hidden_size, image_token_id"):
        model_config_from_dict(official)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM is not supported"),
        ({"architectures": []}, "architecture none is not supported"),
        ({"rope_scaling": None}, "lacks rope_scaling.mrope_section"),
        ({"rope_scaling": {"mrope_section": [16, 24, 23]}}, "sum to head_dim/2 = 64"),
        ({"rope_scaling": {"mrope_section": [32, 32]}}, "must be three whole numbers"),
        ({"rope_scaling": {"mrope_section": "16,24,24"}}, "must be three whole numbers"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0; it must be a whole number of at least 1"),
        ({"hidden_size": "2048"}, "hidden_size '2048'; it must be a whole number"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers 1.5; it must be a whole number"),
        ({"image_token_id": "<image>"}, "image_token_id '<image>'; it must be a whole number"),
        ({"rope_scaling": {"mrope_section": [16, 24, 24], "mrope_interleaved": True}}, "mrope_interleaved is true"),
        ({"num_key_value_heads": 5}, "no multiple of num_key_value_heads 5"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok 129 must lie between 1 and num_experts 128"),
        ({"moe_intermediate_size": None}, "num_experts needs moe_intermediate_size"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"mlp_only_layers": [48]}, "names layers outside 0..47"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"sa_config": {"topk": 8}}, "sa_config lacks indexer_num_heads, indexer_head_dim"),
        ({"sa_config": {"topk": 8, "indexer_num_heads": 4, "indexer_head_dim": 48}}, "48 must be a power of two"),
        ({"sa_config": {"topk": 8, "indexer_num_heads": 4, "indexer_head_dim": 8}}, "does not scale to"),
        (
            {"sa_config": {"topk": 0, "indexer_num_heads": 4, "indexer_head_dim": 64}},
            "sa_config has topk 0; it must be a whole number of at least 1",
        ),
        ({"sa_config": {"topk": 8, "indexer_num_heads": 4, "indexer_head_dim": 64, "indexer_num_kv_heads": 2}}, "be 1"),
        ({"architectures": ["KeyeVLMoeForConditionalGeneration"]}, "is DeepSeek-V3, which keye does not run yet"),
        ({"vision_config": {"hidden_size": 8}}, "vision_config lacks intermediate_size, num_hidden_layers"),
    ],
)
def test_contradictions_are_one_clear_sentence(official: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        model_config_from_dict({**official, **change})
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_model_config(tmp_path)
    for text, message in (("{", "cannot be read as JSON"), ("[]", "must hold a JSON object, not list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_model_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        load_model_config(tmp_path)


@pytest.mark.parametrize("value", [0, -1, "2", True])
def test_tokens_per_second_of_preview(value: Any) -> None:
    raw = read_json(asset("configs/preview") / "config.json")
    raw["vision_config"]["tokens_per_second"] = value
    with pytest.raises(ConfigError, match="tokens_per_second is .*; it must be a number above 0"):
        model_config_from_dict(raw)
    raw["vision_config"]["tokens_per_second"] = None
    assert model_config_from_dict(raw).tokens_per_second == 2.0
