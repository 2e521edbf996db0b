"""Reading the official configuration: what it says, what is missing, what contradicts itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from keye.config import (
    ConfigError,
    GenerationConfig,
    ProcessorConfig,
    load_generation_config,
    load_model_config,
    load_processor_config,
    model_config_from_dict,
    read_json,
)
from keye.hub import asset
from keye.models.keye import KeyeModel

#: Rows of the packing position table that official checkpoints hold and no forward pass reads.
PACKING_ROWS = 32768
MROPE = {"mrope_section": [16, 24, 24]}
VISION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


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


def test_releases(official: dict[str, Any]) -> None:
    preview, v15, v2 = (
        model_config_from_dict(read_json(asset(f"configs/{name}") / "config.json"))
        for name in ("preview", "1.5", "2.0")
    )
    assert [config.release.name for config in (preview, v15, v2)] == ["preview", "1.5", "2.0"]
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
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"\(gptq\), a quantised checkpoint that keye does not",
        ),
        ({"rope_scaling": None}, "lacks rope_scaling.mrope_section"),
        ({"rope_scaling": {"mrope_section": [16, 24, 23]}}, "sum to head_dim/2 = 64"),
        ({"rope_scaling": {"mrope_section": [32, 32]}}, "must be three whole numbers"),
        ({"rope_scaling": {"mrope_section": "16,24,24"}}, "must be three whole numbers"),
        ({"rope_scaling": {"mrope_section": None}}, "mrope_section None; it must be three whole numbers"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0; it must be a whole number of at least 1"),
        ({"hidden_size": "2048"}, "hidden_size '2048'; it must be a whole number"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers 1.5; it must be a whole number"),
        ({"image_token_id": "<image>"}, "image_token_id '<image>'; it must be a whole number"),
        ({"rope_scaling": {"mrope_section": [16, 24, 24], "mrope_interleaved": True}}, "mrope_interleaved is true"),
        ({"num_key_value_heads": 5}, "not a multiple of num_key_value_heads 5"),
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
        ({"architectures": ["KeyeVLMoeForConditionalGeneration"]}, "lacks kv_lora_rank, qk_nope_head_dim"),
        ({"rope_scaling": {**MROPE, "type": "yarn", "factor": 4.0}}, "type is 'yarn'; only mrope and default are"),
        ({"rope_scaling": {**MROPE, "rope_type": "linear"}}, "rope_type is 'linear'; only mrope and default are"),
        ({"rope_scaling": {**MROPE, "factor": 2}}, "factor is 2, but scaled positions are not implemented"),
        ({"rope_scaling": "mrope"}, "lacks rope_scaling.mrope_section"),
        ({"image_token_id": 151_936}, "image_token_id 151936 is beyond the vocabulary: vocab_size is 151936"),
        ({"image_token_id": 9, "video_token_id": 9}, "image_token_id and video_token_id are both 9"),
        ({"vision_end_token_id": 151_655}, "image_token_id and vision_end_token_id are both 151655"),
        ({"rope_theta": 0}, "rope_theta 0; it must be a number above 0"),
        ({"rope_theta": -1e6}, "rope_theta -1000000.0; it must be a number above 0"),
        ({"rope_theta": "1e6"}, "rope_theta '1e6'; it must be a number above 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps 0; it must be a number above 0"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob 'yes'; it must be true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings 1; it must be true or false"),
        ({"mlp_only_layers": "0"}, "mlp_only_layers '0'; it must be a list of layer numbers"),
        ({"eos_token_id": "</s>"}, "eos_token_id '</s>'; it must be a token id"),
        ({"eos_token_id": [1, None]}, "it must be a token id or a list of them"),
        ({"pad_token_id": [1]}, "pad_token_id \\[1\\]; it must be a token id"),
        ({"sa_config": [1]}, "sa_config \\[1\\]; it must be an object"),
        ({"vision_config": "siglip"}, "vision_config 'siglip'; it must be an object"),
        ({"vision_config": {**VISION, "rope_theta": 0}}, "vision_config has rope_theta 0; it must be a number above 0"),
        ({"vision_config": {**VISION, "patch_size": 500}}, "image_size 384 holds no patch of 500 pixels"),
        ({"vision_config": {"hidden_size": 8}}, "vision_config lacks intermediate_size, num_hidden_layers"),
    ],
)
def test_contradictions_are_one_clear_sentence(official: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        model_config_from_dict({**official, **change})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["mrope", "default"])
def test_rotary_types_that_change_nothing(official: dict[str, Any], name: str) -> None:
    scaling = {**MROPE, "type": name, "rope_type": name, "factor": 1.0}
    assert model_config_from_dict({**official, "rope_scaling": scaling}).text.mrope_section == (16, 24, 24)


def test_rope_parameters_as_transformers_5_saves_them(official: dict[str, Any]) -> None:
    saved = {name: value for name, value in official.items() if name not in ("rope_scaling", "rope_theta")}
    joined = {**MROPE, "rope_type": "mrope", "type": "mrope", "rope_theta": official["rope_theta"]}
    config = model_config_from_dict({**saved, "rope_parameters": joined})
    assert config == model_config_from_dict(official)
    assert config.unknown == () and config.raw["rope_parameters"] == joined
    assert model_config_from_dict({**official, "rope_parameters": joined}) == config
    for wrong, sentence in (
        ({**joined, "rope_theta": 5.0}, "remove one of them"),
        ({**joined, "partial_rotary_factor": 0.5}, "rotates whole heads"),
        ("mrope", "must be an object"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            model_config_from_dict({**official, "rope_parameters": wrong})
    with pytest.raises(ConfigError, match="type is 'yarn'"):
        model_config_from_dict({**saved, "rope_parameters": {**joined, "rope_type": "yarn"}})


def write(folder: Path, **files: object) -> Path:
    """A folder with these JSON files."""
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 16}, "makes patch_size 16 but vision_config.patch_size is 14; they must agree"),
        ({"merge_size": 4}, "makes merge_size 4 but vision_config.spatial_merge_size is 2; they must agree"),
        ({"patch_size": "x"}, "patch_size 'x'; it must be a whole number of at least 1"),
        ({"min_pixels": "many"}, "min_pixels 'many'; it must be a whole number"),
        ({"image_mean": 0.5}, "image_mean 0.5; it must be three numbers"),
        ({"image_mean": [0.5, "x", 0.5]}, "it must be three numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "all of it must be above 0"),
        ({"keye": {"fps": "fast"}}, "preprocessor_config.json has keye.fps 'fast'; it must be a number above 0"),
        ({"keye": {"fps": None}}, "preprocessor_config.json has keye.fps None; it must be a number above 0"),
        ({"keye": {"video_max_tokens": 1.5}}, "video_max_tokens 1.5; it must be a whole number"),
        ({"keye": {"frame_text": "{second}"}}, "may only use the field {seconds}"),
        ({"keye": {"frame_text": 3}}, "frame_text 3; it must be a text"),
        ({"keye": {"adaptive_budget": "no"}}, "adaptive_budget 'no'; it must be true or false"),
        ({"keye": {"image_min_tokens": 9, "image_max_tokens": 4}}, "minimum of tokens is above its maximum"),
        ({"keye": "fast"}, "has keye 'fast'; it must be an object"),
    ],
)
def test_processors_that_cannot_work(
    official: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load_processor_config(write(tmp_path, config=official, preprocessor_config=change))
    assert "\n" not in str(raised.value)


def test_a_processor_without_a_file_must_suit_the_vision_tower_too(official: dict[str, Any], tmp_path: Path) -> None:
    assert load_processor_config(write(tmp_path, config=official)).patch_size == 14
    vision = {**official["vision_config"], "patch_size": 16}
    with pytest.raises(ConfigError, match="makes patch_size 14 but vision_config.patch_size is 16"):
        load_processor_config(write(tmp_path, config={**official, "vision_config": vision}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": "hot"}, "temperature 'hot'; it must be a number 0 or more and at most 100"),
        ({"top_p": 0}, "top_p 0; it must be a number above 0 and at most 1"),
        ({"top_k": 1.5}, "top_k 1.5; it must be a whole number of at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0; it must be a whole number of at least 1"),
        ({"do_sample": "yes"}, "do_sample 'yes'; it must be true or false"),
        ({"eos_token_id": ["</s>"]}, "it must be a token id or a list of them"),
        ({"keye": {"default_system": 3}}, "default_system 3; it must be a text"),
        ({"keye": {"ground_prompt": "when is {it}?"}}, "may only use the field {event}, {article}"),
        ({"keye": {"presence_prompt": "is {it} there?"}}, "may only use the field {event}, {article}"),
        ({"keye": {"scope": "shapes"}}, "it must be an object of short, text"),
        ({"keye": {"scope": {"color": "red"}}}, "it must be an object of short, text"),
        ({"keye": {"scope": {"words": [1]}}}, "words .*it must be a list of texts"),
    ],
)
def test_sampling_that_cannot_work(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load_generation_config(write(tmp_path, generation_config=change))
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


@pytest.mark.parametrize("value", [0, -1, "2", "abc", [1], pytest.param(10**400, id="huge"), True])
def test_tokens_per_second_of_preview(value: Any) -> None:
    raw = read_json(asset("configs/preview") / "config.json")
    raw["vision_config"]["tokens_per_second"] = value
    with pytest.raises(ConfigError, match="tokens_per_second .*; it must be a number above 0"):
        model_config_from_dict(raw)
    raw["vision_config"]["tokens_per_second"] = None
    assert model_config_from_dict(raw).tokens_per_second == 2.0
    other = read_json(asset("configs/1.5") / "config.json")
    other["vision_config"]["tokens_per_second"] = value
    assert model_config_from_dict(other).tokens_per_second is None


@pytest.mark.parametrize("name", ["fps", "video_min_tokens", "image_std", "frame_text", "adaptive_budget"])
def test_fields_of_a_processor_that_cannot_be_none(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^the processor's {name} is None; it must be"):
        ProcessorConfig.of("2.0", **{name: None})
    assert ProcessorConfig.of("2.0", max_frames=None).max_frames is None


@pytest.mark.parametrize("name", ["do_sample", "ground_prompt", "examples"])
def test_fields_of_sampling_that_cannot_be_none(name: str) -> None:
    fields: dict[str, Any] = {name: None}
    with pytest.raises(ConfigError, match=f"has {name} None; it must be"):
        GenerationConfig(**fields)
