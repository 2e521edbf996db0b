"""Quantised models: made while loading, saved, loaded, updated; from every layout of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from keye.cache.fingerprint import fingerprint
from keye.config import ProcessorConfig
from keye.errors import KeyeError
from keye.models.keye import KeyeModel
from keye.models.load import load_model, save_model, update_tensors
from keye.models.quant_fill import quantized_weights
from keye.ops.quantized import QuantFormat
from keye.ops.registry import backends
from keye.quant.layers import pack_weights
from keye.quant.policy import PARTS, make_policy, parse_part
from keye.quant.search import quantize
from keye.weights.safetensors import WEIGHTS_FILE
from keye.weights.source import WeightsError
from tests.models.test_weights import per_expert

Run = Callable[..., Tensor]


@pytest.fixture
def run(make_prompt: Any, run_chunks: Any) -> Run:
    prompt = make_prompt(0, 20)
    return lambda model: run_chunks(model, prompt, [20])


def same_bits(a: KeyeModel, b: KeyeModel) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        t.dtype == second[n].dtype and torch.equal(t.view(torch.uint8), second[n].view(torch.uint8))
        for n, t in first.items()
    )


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_quantised_while_it_is_loaded(
    make_model: Any, run: Run, tmp_path: Path, kind: str, tied: bool
) -> None:
    model = make_model(tie_word_embeddings=tied)
    save_model(model, tmp_path)
    with backends.using("reference"):
        loaded, _ = load_model(tmp_path, model.config, dtype=torch.float32, quant=kind)
    weights = quantized_weights(loaded)
    for name, weight in weights.items():
        plain = model.state_dict()[name]
        plain = plain.transpose(1, 2) if plain.dim() == 3 else plain
        expected = quantize(plain, weight.format)
        assert torch.equal(weight.codes.view(torch.uint8), expected.codes.view(torch.uint8)), name
        assert torch.equal(weight.scales, expected.scales), name
    floats = {n for n, p in loaded.named_parameters() if p.dim() > 1}
    assert all("mlp.gate" in n or "_embedding" in n for n in floats) and ("lm_head.weight" in weights) != tied
    assert loaded.dtype == torch.float32
    for name, weight in weights.items():
        numbers = weight.tensor.dequantize()
        model.state_dict()[name].copy_(numbers.transpose(1, 2) if numbers.dim() == 3 else numbers)
    with backends.using("reference"):
        torch.testing.assert_close(run(loaded), run(model))


@pytest.mark.parametrize("kind", ["int4", "fp8"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_model_is_saved_and_loaded_bit_for_bit(
    make_model: Any, tmp_path: Path, kind: str, tied: bool
) -> None:
    model = make_model(tie_word_embeddings=tied).bfloat16()
    save_model(model, tmp_path / "plain")
    quantised, _ = load_model(tmp_path / "plain", model.config, dtype=torch.bfloat16, quant=kind)
    save_model(quantised, tmp_path / "out", dtype=torch.float16)
    stored = load_file(tmp_path / "out" / WEIGHTS_FILE)
    assert stored["model.embed_tokens.weight.scales"].dtype == torch.bfloat16
    assert stored["model.norm.weight"].dtype == torch.float16
    save_model(quantised, tmp_path / "out")
    loaded, report = load_model(tmp_path / "out", quantised.config, dtype=torch.bfloat16)
    assert same_bits(loaded, quantised) and not report.unused
    with pytest.raises(WeightsError, match=rf"quantised already \({kind}\)"):
        load_model(tmp_path / "out", quantised.config, quant="int8")


def test_every_layout_of_experts_gives_the_same_codes(make_model: Any, tmp_path: Path) -> None:
    model = make_model()
    for folder in ("fused", "split"):
        save_model(model, tmp_path / folder)
    save_file(per_expert(load_file(tmp_path / "fused" / WEIGHTS_FILE)), tmp_path / "split" / WEIGHTS_FILE)
    fused, split = (load_model(tmp_path / f, model.config, quant="int4")[0] for f in ("fused", "split"))
    assert same_bits(fused, split)


def test_parts_have_formats_of_their_own(make_model: Any, tmp_path: Path) -> None:
    model = make_model()
    save_model(model, tmp_path)
    policy = make_policy("int4", 32, dict(map(parse_part, ["head=int8", "vision-tower=keep", "experts=int4:128"])))
    weights = quantized_weights(load_model(tmp_path, model.config, quant=policy)[0])
    assert weights["lm_head.weight"].format == QuantFormat("int8")
    assert weights["model.layers.0.mlp.experts.down_proj"].format == QuantFormat("int4", 128)
    assert weights["model.layers.0.self_attn.o_proj.weight"].format == QuantFormat("int4", 32)
    assert weights["model.layers.0.self_attn.sa_indexer.q_proj.weight"].format == QuantFormat("int8")
    assert not any(name.startswith("visual.") for name in weights)


@pytest.mark.parametrize("text", ["head", "head=int3", "tail=int8", "head=keep:64", "head=int4:48", "experts=int8:x"])
def test_wrong_parts_are_named(text: str) -> None:
    with pytest.raises(KeyeError):
        make_policy("int4", None, dict([parse_part(text)]))


def test_weights_of_a_quantised_model_are_replaced(make_model: Any, tmp_path: Path) -> None:
    old, new = make_model(0), make_model(1)
    for name, model in ("old", old), ("new", new):
        save_model(model, tmp_path / name)
    quantised, expected = (load_model(tmp_path / name, old.config, quant="int4")[0] for name in ("old", "new"))
    tensors = {name: t.bfloat16() for name, t in new.state_dict().items()}
    with pytest.raises(WeightsError, match="o_proj.weight holds NaN"):
        update_tensors(
            quantised, {**tensors, "model.layers.1.self_attn.o_proj.weight": torch.full((48, 128), torch.nan)}
        )
    assert update_tensors(quantised, tensors) == 1
    save_model(new.bfloat16(), tmp_path / "half")
    assert same_bits(quantised, load_model(tmp_path / "half", old.config, dtype=quantised.dtype, quant="int4")[0])
    assert not same_bits(quantised, expected), "numbers were rounded to bfloat16 first"


def test_files_that_do_not_fit_are_named(make_model: Any, tmp_path: Path) -> None:
    model = make_model()
    save_model(model, tmp_path)
    quantised, _ = load_model(tmp_path, model.config, quant="int4")
    save_model(quantised, tmp_path)
    name = "model.layers.0.self_attn.o_proj.weight"
    good = load_file(tmp_path / WEIGHTS_FILE)
    for key, value, sentence in (
        ("codes", good[f"{name}.codes"].to(torch.int8), rf"mis-shaped: {name}.codes is I8 instead of U8"),
        ("codes", good[f"{name}.codes"][:, 1:].contiguous(), rf"mis-shaped: {name}.codes is \[48, 63\]"),
        ("scales", None, rf"missing: {name}.scales"),
    ):
        tensors = {**good, f"{name}.{key}": value}
        save_file({n: t for n, t in tensors.items() if t is not None}, tmp_path / WEIGHTS_FILE)
        with pytest.raises(WeightsError, match=sentence):
            load_model(tmp_path, quantised.config)
    raw = json.loads(json.dumps(quantised.config.raw))
    raw["quantization_config"]["version"] = 2
    with pytest.raises(KeyeError, match="another version of keye"):
        load_model(tmp_path, replace(quantised.config, raw=raw))


def test_numbers_that_are_none_are_named(make_model: Any, tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 2, 1] = torch.nan
    save_model(model, tmp_path)
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.experts\.down_proj holds NaN"):
        load_model(tmp_path, model.config, quant="int4")


def test_every_matrix_of_a_model_has_a_part(make_model: Any) -> None:
    policy = make_policy("int4")
    for name, tensor in make_model(mlp_only_layers=[1]).state_dict().items():
        part, is_listed = policy.place_of(name)
        assert policy.format_of(name) is not None or is_listed, (name, tuple(tensor.shape))
        assert part in {part for part, _ in PARTS} or is_listed


def test_a_fingerprint_tells_formats_apart_and_not_how_memory_holds_them(make_model: Any, tmp_path: Path) -> None:
    model = make_model()
    save_model(model, tmp_path)
    prints = {}
    for kind in ("int4", "int8"):
        with backends.using("reference"):
            loaded, _ = load_model(tmp_path, model.config, quant=kind)
        before = fingerprint("m", loaded, ProcessorConfig())
        pack_weights(loaded)
        assert fingerprint("m", loaded, ProcessorConfig()) == before
        prints[kind] = before
        update_tensors(loaded, {"model.layers.0.self_attn.o_proj.weight": torch.randn(48, 128)})
        assert fingerprint("m", loaded, ProcessorConfig()).weights != before.weights
    assert prints["int4"].weights != prints["int8"].weights and prints["int4"].config != prints["int8"].config


def test_a_tied_head_has_the_format_of_the_embeddings(make_model: Any, tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=True)
    save_model(model, tmp_path)
    policy = make_policy("int4", overrides={"head": QuantFormat("int8")})
    with pytest.raises(KeyeError, match="head and embeddings the same format"):
        load_model(tmp_path, model.config, quant=policy)
