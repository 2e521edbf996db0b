"""The decoder of Keye-VL-671B: any chunking and batching, number formats, routing by groups, M-RoPE, training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from keye.cache.sequence import KVCache
from keye.cache.slabs import KVFormat, KVOptions
from keye.config import ConfigError, TextConfig, model_config_from_dict, read_json
from keye.hub import asset
from keye.models.attention import CachedStep, Span, cache_rows
from keye.models.keye import KeyeModel
from keye.models.moe import GroupRouter
from keye.train.packed import TreeStep
from tests.support.latent import latent_model, latent_raw

LENGTH = 60


def run(model: KeyeModel, chunks: list[int], cache: KVCache | None = None, seed: int = 0, form: Any = "auto") -> Tensor:
    """Logits [T, V] of random tokens in chunks through one cache."""
    generator = torch.Generator().manual_seed(seed)
    ids, cache = torch.randint(0, 90, (sum(chunks),), generator=generator), cache or KVCache(3)
    out, start = [], 0
    with torch.no_grad():
        for n in chunks:
            step = CachedStep([Span(0, n, cache)], model.config.text)
            step.latent_form = form
            positions = torch.arange(start, start + n).expand(3, -1)
            out.append(model.logits(model(model.embed(ids[start : start + n]), positions, step)))
            start += n
    return torch.cat(out)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "attention_bias": True, "n_shared_experts": 0}])
def test_any_chunking_and_form_gives_the_same_logits(changes: dict[str, Any]) -> None:
    model = latent_model(**changes)
    total = run(model, [LENGTH], form="expanded")
    for chunks in ([LENGTH], [1] * LENGTH, [8, 1, 51]):
        torch.testing.assert_close(run(model, chunks, form="absorbed"), total, rtol=0, atol=1e-4)
        torch.testing.assert_close(run(model, chunks), total, rtol=0, atol=1e-4)


def test_a_batch_equals_each_alone() -> None:
    """Prefill of one sequence beside decoding of another, in one step."""
    model, generator = latent_model(), torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 90, (n,), generator=generator) for n in (30, 12)]
    caches, parts = [KVCache(3), KVCache(3)], [[], []]  # type: ignore[var-annotated]
    with torch.no_grad():
        for cuts in (((0, 20), (0, 11)), ((20, 30), (11, 12))):
            x = torch.cat([ids[i][a:b] for i, (a, b) in enumerate(cuts)])
            positions = torch.cat([torch.arange(a, b) for a, b in cuts]).expand(3, -1)
            border = cuts[0][1] - cuts[0][0]
            step = CachedStep([Span(0, border, caches[0]), Span(border, len(x), caches[1])], model.config.text)
            logits = model.logits(model(model.embed(x), positions, step))
            parts[0].append(logits[:border])
            parts[1].append(logits[border:])
        for i, own in enumerate(ids):
            step = CachedStep([Span(0, len(own), KVCache(3))], model.config.text)
            alone = model.logits(model(model.embed(own), torch.arange(len(own)).expand(3, -1), step))
            torch.testing.assert_close(torch.cat(parts[i]), alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kv", "error"), [("auto", 0.0), ("bf16", 0.01), ("int8", 0.03), ("int4", 0.4)])
def test_latents_are_stored_in_every_format(kv: KVFormat, error: float) -> None:
    model = latent_model()
    store = KVOptions(kv).store(KVOptions(kv).layout(model.cache_rows(), model.dtype), "cpu")
    assert {name: (form.heads, form.dim) for name, form in store.layout.rows.items()} == {
        "latent": (1, 32), "rope_k": (1, 8)
    }  # fmt: skip
    want = run(model, [LENGTH])
    got = run(model, [40, 20], KVCache(3, store))
    off = (got - want).norm(dim=1) / want.norm(dim=1)
    assert off.median() <= error + 1e-5, "but for tokens that another expert takes"


def test_bfloat16_follows_float32() -> None:
    model = latent_model()
    want = run(model, [20])
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias.clone()
    model.bfloat16()
    assert torch.equal(model.model.layers[1].mlp.gate.e_score_correction_bias, bias), "the bias stays in float32"
    assert model.model.layers[1].mlp.gate.weight.dtype == torch.bfloat16
    close = (run(model, [20]) - want).norm(dim=1) / want.norm(dim=1)
    assert close.median() < 0.1, "but for tokens that another expert takes"


def naive_choice(logits: list[float], bias: list[float], text: TextConfig) -> dict[int, float]:
    """The report's rule for one token, in plain Python."""
    routing, K = text.group_routing, text.num_experts_per_tok
    assert routing is not None
    scores = torch.tensor(logits).sigmoid().tolist()
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(logits) // routing.n_group
    groups = [biased[i : i + size] for i in range(0, len(logits), size)]
    best = sorted(range(len(groups)), key=lambda g: -sum(sorted(groups[g])[-2:]))[: routing.topk_group]
    chosen = sorted((e for e in range(len(logits)) if e // size in best), key=lambda e: -biased[e])[:K]
    total = sum(scores[e] for e in chosen) if text.norm_topk_prob else 1.0
    return {e: scores[e] / total * routing.routed_scaling_factor for e in chosen}


@pytest.mark.parametrize("changes", [{}, {"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
                                     {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 4}])  # fmt: skip
def test_routing_by_groups(changes: dict[str, Any]) -> None:
    text = model_config_from_dict(latent_raw(**changes)).text
    gate, generator = GroupRouter(text), torch.Generator().manual_seed(3)
    gate.e_score_correction_bias.copy_(torch.randn(8, generator=generator) * 0.3)
    logits = torch.randn(50, 8, generator=generator)
    weights, chosen = gate.choose(logits)
    unbiased = set()
    for row, ids, got in zip(logits.tolist(), chosen.tolist(), weights.tolist(), strict=True):
        want = naive_choice(row, gate.e_score_correction_bias.tolist(), text)
        assert set(ids) == set(want)
        assert got == pytest.approx([want[e] for e in ids], abs=1e-6)
        unbiased.add(set(naive_choice(row, [0.0] * 8, text)) == set(want))
    assert unbiased == {True, False}, "the bias changes some choices"


def test_shared_experts_see_every_token_unweighted() -> None:
    moe = latent_model().model.layers[1].mlp
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both = moe(x)[0]
        shared, moe.shared_experts = moe.shared_experts, None
        torch.testing.assert_close(both, moe(x)[0] + shared(x))


def test_mrope_only_where_the_file_asks_for_it() -> None:
    scaling = latent_raw()["rope_scaling"]
    plain = latent_model()
    mixed = latent_model(rope_scaling={**scaling, "mrope_section": [1, 2, 1]})
    assert not plain.config.text.uses_mrope and mixed.config.text.uses_mrope
    positions = torch.stack([torch.arange(9), torch.arange(9) * 2, torch.arange(9) * 3])
    same = torch.arange(9).expand(3, -1)
    assert torch.equal(plain.model.rope(positions).cos, plain.model.rope(same).cos)
    assert torch.equal(mixed.model.rope(same).cos, plain.model.rope(same).cos)
    assert not torch.equal(mixed.model.rope(positions).cos, plain.model.rope(same).cos)


def test_training_steps_equal_inference() -> None:
    """One trunk and one branch behind it, as `tests/train/test_packed.py` has them for the other decoders."""
    model = latent_model()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 90, (30,), generator=generator)
    positions = torch.arange(30).expand(3, -1)
    step = TreeStep(torch.tensor([[0, 20, -1], [20, 30, 0]]), model.config.text)
    logits = model.logits(model(model.embed(ids), positions, step))
    torch.testing.assert_close(logits.detach(), run(model, [30]), rtol=0, atol=1e-4)
    logits.sum().backward()
    grad = model.model.layers[0].self_attn.kv_b_proj.weight.grad
    assert grad is not None and grad.abs().sum() > 0


def test_the_published_geometry_without_memory() -> None:
    config = model_config_from_dict(read_json(asset("configs/671b") / "config.json"))
    with torch.device("meta"):
        model = KeyeModel(config)
    layer = model.model.layers[3]
    assert layer.self_attn.kv_b_proj.weight.shape == (128 * 256, 512)
    assert layer.mlp.experts.gate_up_proj.shape == (256, 7168, 4096)
    assert not hasattr(model.model.layers[2].mlp, "experts")
    assert sum(row.layers * row.heads * row.dim for row in cache_rows(config.text).values()) == 61 * 576
    assert config.text.yarn is not None and config.text.yarn.score_scale == pytest.approx(1.3689**2, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kv_lora_rank": None, "n_group": None}, "lacks kv_lora_rank, n_group"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; the decoder of DeepSeek-V3 has sigmoid"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"n_group": 3}, "n_group 3 must divide n_routed_experts 8"),
        ({"n_group": 8}, "into groups of at least 2"),
        ({"topk_group": 5}, "topk_group 5 must be at most n_group 4"),
        ({"topk_group": 1}, "num_experts_per_tok 3 is more than the 2 experts of topk_group"),
        ({"num_key_value_heads": 2}, "num_key_value_heads 2 differs from num_attention_heads 4"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim 7 must be even"),
        ({"rope_interleave": False}, "rope_interleave is false"),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "rope_scaling.type is 'linear'; only yarn"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling lacks original_max_position_embeddings"),
        ({"rope_scaling": {"factor": 4}}, "rope_scaling.factor is 4 without a type"),
        (
            {"rope_scaling": {"type": "default", "short_factor": [1]}},
            "rope_scaling has short_factor, which keye does not",
        ),
        ({"rope_scaling": {"mrope_section": [2, 2, 2]}}, r"must sum to qk_rope_head_dim/2 = 4"),
        ({"rope_scaling": {"mrope_section": [2, 2]}}, "must be three whole numbers"),
        ({"rope_scaling": {"rope_theta": 5}}, "rope_scaling.rope_theta 5 differs from rope_theta 10000"),
        ({"rope_scaling": 4}, "rope_scaling 4; it must be an object"),
        (
            {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}},
            "fmt is 'e5m2'; of float8 weights keye reads",
        ),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}, "float8 weights need two sizes"),
        ({"norm_topk_prob": 1}, "norm_topk_prob 1; it must be true or false"),
    ],
)
def test_what_would_mislead_is_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as raised:
        model_config_from_dict(latent_raw(**change))
    assert "\n" not in str(raised.value)


def test_harmless_fields_are_left_alone_and_unknown_ones_named() -> None:
    config = model_config_from_dict(latent_raw(pretraining_tp=1, auto_map={}, head_dim=8, brand_new=1))
    assert config.unknown == ("brand_new",)
    raw = latent_raw()
    del raw["q_lora_rank"]
    with pytest.raises(ConfigError, match="lacks q_lora_rank, which is null where queries have no latent"):
        model_config_from_dict(raw)
    assert model_config_from_dict(latent_raw(rope_scaling=None)).text.yarn is None
    saved = latent_raw()
    saved["rope_parameters"] = {**saved.pop("rope_scaling"), "rope_theta": saved.pop("rope_theta")}
    assert model_config_from_dict(saved).text == model_config_from_dict(latent_raw()).text, "as transformers 5 saves"


def test_layers_that_route() -> None:
    """DeepSeek counts from 0: with a frequency of 2 the even layers behind the dense ones route."""
    text = model_config_from_dict(latent_raw(num_hidden_layers=6, first_k_dense_replace=1, moe_layer_freq=2)).text
    assert [text.is_moe_layer(i) for i in range(6)] == [False, False, True, False, True, False]
