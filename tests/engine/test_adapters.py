"""LoRA adapters: chosen by each request, together in one step, and never mixed by a cache."""

from __future__ import annotations

import copy
import gc
import json
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import keye
from keye import Answer, Keye, KeyeError
from keye.config import model_config_from_dict
from keye.engine.request import Generating
from keye.engine.sampling import SamplingParams
from keye.models.adapter_files import read_adapter
from keye.models.adapters import merge
from keye.models.keye import KeyeModel
from keye.models.load import replace_layers
from keye.models.moe import Experts
from keye.ops.quantized import QuantFormat
from keye.quant.layers import QuantEmbedding, QuantExperts, QuantizedWeight, QuantLinear
from keye.train.recipes.nano.initialise import fresh_model
from tests.support.adapters import LAYERS, add_products, random_pairs, rslora, write_adapter
from tests.support.engine import about, add, clip, greedy, run, run_all, step, tokens_of
from tests.support.latent import latent_folder
from tests.support.tiny import tiny_folder, tiny_model, tiny_raw

TEXTS = ([3, 5, 7, 11, 13], list(range(20, 60)))
EXPERTS = "model.layers.0.mlp.experts"
FUSED_RANKS = {"gate_up_proj": 2, "down_proj": 2}


@pytest.fixture
def model() -> Keye:
    return Keye(tiny_model())


def scores(model: Keye, adapter: str | None = None) -> list[Tensor]:
    return [result.logprobs for result in model.engine.score(TEXTS, adapter=adapter)]


def merged_scores(tensors: Mapping[str, Tensor], scale: float) -> list[Tensor]:
    """Of a model whose weights hold the adapter."""
    other = Keye(tiny_model())
    add_products(other.model, tensors, scale)
    return scores(other)


def compare(ours: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def differ(ours: list[Tensor], others: list[Tensor]) -> bool:
    return all(not torch.allclose(a, b, atol=1e-2) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("layers", [LAYERS, ("model.embed_tokens", "lm_head")], ids=["linear", "embeddings"])
def test_an_adapter_computes_what_merged_weights_compute(model: Keye, tmp_path: Path, layers: tuple[str, ...]) -> None:
    base, tensors = scores(model), random_pairs(model.model, layers)
    model.load_adapter(write_adapter(tmp_path, tensors), "mine")
    compare(scores(model, "mine"), merged_scores(tensors, 2.0))
    assert differ(scores(model, "mine"), base)
    for ours, before in zip(scores(model), base, strict=True):
        assert torch.equal(ours, before)


def test_layers_that_peft_copies_beside_embeddings_and_heads_change_nothing(model: Keye, tmp_path: Path) -> None:
    """PEFT does so where they are targets; it trains none of their numbers."""
    layers = ("model.embed_tokens", "lm_head")
    tensors = random_pairs(model.model, layers)
    model.load_adapter(write_adapter(tmp_path / "a", tensors), "pairs")
    copies = {f"{name}.base_layer.weight": model.model.get_submodule(name).weight.detach() for name in layers}
    model.load_adapter(write_adapter(tmp_path / "b", tensors | copies), "copies")
    assert all(map(torch.equal, scores(model, "copies"), scores(model, "pairs")))


def test_ranks_and_scales_follow_the_patterns(model: Keye, tmp_path: Path) -> None:
    q, v = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
    tensors = random_pairs(model.model, (q,), r=2) | random_pairs(model.model, (v,), r=3, seed=1)
    fields = {
        "r": 3,
        "alpha": 6,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"^q_proj": 99, "^v_proj": 99, r"layers\.1.self_attn.v_proj$": 12},
    }
    model.load_adapter(write_adapter(tmp_path, tensors, use_rslora=True, **fields), "mine")
    other = Keye(tiny_model())
    for name, scale in ((q, rslora(6, 2)), (v, rslora(12, 3))):
        add_products(other.model, {key: t for key, t in tensors.items() if key.startswith(name)}, scale)
    compare(scores(model, "mine"), scores(other))


def fused_experts(turned: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Pairs of both fused parameters of a layer as PEFT writes them, and what they add to each."""
    generator = torch.Generator().manual_seed(3)
    E, d, inner, r = 4, 64, 32, 2
    tensors, added = dict[str, Tensor](), dict[str, Tensor]()
    for own, rows, columns, place in (("gate_up_proj", d, 2 * inner, ".base_layer"), ("down_proj", inner, d, "")):
        out, inputs = (rows, columns) if turned else (columns, rows)
        a = 0.3 * torch.randn(r * E, inputs, generator=generator)
        b = 0.3 * torch.randn(out, r * E, generator=generator)
        tensors |= {f"{EXPERTS}{place}.lora_A.weight": a, f"{EXPERTS}{place}.lora_B.weight": b}
        sides = "ore,eri->eoi" if turned else "ore,eri->eio"
        added[own] = 2.0 * torch.einsum(sides, b.view(out, r, E), a.view(E, r, inputs))
    return tensors, added


@pytest.mark.parametrize("turned", [True, False])
def test_fused_experts_are_read_as_peft_writes_them(model: Keye, tmp_path: Path, turned: bool) -> None:
    """`turned`: PEFT takes them for [E, out, in]. Square ones, as gate_up_proj here, are taken for those."""
    tensors, added = fused_experts(turned)
    if not turned:
        tensors = {name: tensor for name, tensor in tensors.items() if ".base_layer." not in name}
        del added["gate_up_proj"]
    model.load_adapter(write_adapter(tmp_path, tensors, r=2, alpha=4, target_parameters=["x"]), "mine")
    other = Keye(tiny_model())
    with torch.no_grad():
        for own, delta in added.items():
            getattr(other.model.get_submodule(EXPERTS), own).add_(delta)
    compare(scores(model, "mine"), scores(other))


def test_layers_of_single_experts_are_joined(model: Keye, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    other = Keye(tiny_model())
    experts, tensors = other.model.get_submodule(EXPERTS), dict[str, Tensor]()
    for number, own, inputs, out in ((0, "gate_proj", 64, 32), (2, "up_proj", 64, 32), (2, "down_proj", 32, 64)):
        a, b = 0.3 * torch.randn(4, inputs, generator=generator), 0.3 * torch.randn(out, 4, generator=generator)
        tensors |= {f"{EXPERTS}.{number}.{own}.lora_A.weight": a, f"{EXPERTS}.{number}.{own}.lora_B.weight": b}
        with torch.no_grad():
            if own == "down_proj":
                experts.down_proj[number] += 2 * (b @ a).t()
            else:
                experts.gate_up_proj[number, :, slice(0, 32) if own == "gate_proj" else slice(32, 64)] += (
                    2 * (b @ a).t()
                )
    model.load_adapter(write_adapter(tmp_path, tensors), "mine")
    compare(scores(model, "mine"), scores(other))


def test_an_adapter_merged_into_the_weights_computes_the_same(model: Keye, tmp_path: Path) -> None:
    tensors = random_pairs(model.model) | fused_experts()[0]
    adapter = model.engine.load_adapter(write_adapter(tmp_path, tensors, rank_pattern=FUSED_RANKS), "mine")
    other = copy.deepcopy(model.model)
    merge(other, adapter)
    compare(scores(model, "mine"), scores(Keye(tiny_model_of(other))))


def test_a_weight_of_two_layers_takes_no_merged_adapter(tmp_path: Path) -> None:
    """The product would change the other layer too."""
    network = fresh_model(model_config_from_dict(tiny_raw() | {"tie_word_embeddings": True}), 0).eval()
    path = write_adapter(tmp_path, random_pairs(network, ("lm_head",)))
    adapter = read_adapter(path, "mine", network, dtype=torch.float32, device=torch.device("cpu"))
    before = network.lm_head.weight.clone()
    with pytest.raises(KeyeError, match="one weight in this model"):
        merge(network, adapter)
    assert torch.equal(network.lm_head.weight, before)


def tiny_model_of(network: KeyeModel) -> Any:
    runtime = tiny_model()
    runtime.model.load_state_dict(network.state_dict())
    return runtime


def test_requests_with_different_adapters_share_a_step(model: Keye, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        model.load_adapter(write_adapter(tmp_path / name, random_pairs(model.model, seed=seed)), name)
    chosen = (None, "a", "b", "a", None)
    requests = [greedy(model, about(clip(i, 2)), 24, adapter=name) for i, name in enumerate(chosen)]
    alone = [tokens_of(run_all(model, request)[0]) for request in requests]
    model.clear_caches()
    inboxes = [add(model, request) for request in requests]
    most = 0
    while not model.core.is_idle():
        step(model)
        most = max(most, sum(isinstance(task.state, Generating) for task in model.core.tasks))
    assert most == len(requests)
    assert [tokens_of(inbox) for inbox in inboxes] == alone
    assert len({tuple(tokens) for tokens in alone}) > 1


def test_prefix_and_vision_caches_do_not_mix_adapters(model: Keye, tmp_path: Path) -> None:
    layers = ("visual.vision_model.encoder.layers.0.mlp.fc1", "mlp_AR.linear_1", "model.layers.0.self_attn.v_proj")
    for seed, name in enumerate("ab"):
        model.load_adapter(write_adapter(tmp_path / name, random_pairs(model.model, layers, seed=seed)), name)
    question = about(clip(1, 16))

    def probabilities(name: str | None) -> list[float]:
        answer = model.chat(question, max_tokens=4, ignore_eos=True, adapter=name, logprobs=0)
        cached.append(answer.usage.cached_tokens)
        return [prob.logprob for prob in answer.logprobs or ()]

    fresh, cached = dict[str | None, list[float]](), list[int]()
    for name in (None, "a", "b"):
        model.clear_caches()
        fresh[name] = probabilities(name)
    model.clear_caches()
    for _ in range(2):
        for name, expected in fresh.items():
            assert probabilities(name) == pytest.approx(expected, abs=1e-4)
    assert all(cached[-3:]) and not any(cached[:-3])
    assert abs(fresh[None][0] - fresh["a"][0]) > 0.01 and abs(fresh["a"][0] - fresh["b"][0]) > 0.01


def quantise(model: KeyeModel) -> None:
    form = QuantFormat("int8")

    def factory(_name: str, layer: torch.nn.Module) -> torch.nn.Module:
        if isinstance(layer, Experts):
            E, d, inner = layer.sizes
            own = QuantExperts.empty(E, d, inner, form, torch.float32, torch.device("cpu"))
            fill(own.gate_up_proj, layer.gate_up_proj.transpose(1, 2))
            fill(own.down_proj, layer.down_proj.transpose(1, 2))
            return own
        kind = QuantEmbedding if isinstance(layer, torch.nn.Embedding) else QuantLinear
        own = kind.like(layer, form)
        fill(own.weight, layer.weight)
        return own

    replace_layers(model, factory)


@torch.no_grad()
def fill(weight: QuantizedWeight, values: Tensor) -> None:
    scales = values.abs().amax(-1, keepdim=True) / 127
    weight.scales.copy_(scales)
    weight.codes.copy_((values / weight.scales.float()).round().clamp(-127, 127))


def test_adapters_load_onto_quantised_layers(model: Keye, tmp_path: Path) -> None:
    tensors = random_pairs(model.model) | fused_experts()[0]
    path = write_adapter(tmp_path, tensors, rank_pattern=FUSED_RANKS)
    model.load_adapter(path, "mine")
    plain, plain_base = scores(model, "mine"), scores(model)
    other = Keye(tiny_model())
    quantise(other.model)
    base = scores(other)
    other.load_adapter(path, "mine")
    for ours, before in zip(scores(other), base, strict=True):
        assert torch.equal(ours, before)
    for quantised, exact, far in zip(scores(other, "mine"), plain, plain_base, strict=True):
        assert (quantised - exact).abs().mean() < 0.2 * (exact - far).abs().mean()
    with pytest.raises(KeyeError, match="quantised: merge the adapter into the original model"):
        merge(other.model, other.runtime.adapters.get("mine"))


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_adapters_load_onto_a_model_that_is_quantised_while_it_is_loaded(quant: Any, tmp_path: Path) -> None:
    """As kernels have packed it: every product that an adapter changes is one that it is added to."""
    folder = tiny_folder(tmp_path / "model")
    model, plain = keye.load(folder, quant=quant), keye.load(folder, quant=quant)
    tensors = random_pairs(tiny_model().model) | fused_experts()[0]
    base = scores(model)
    model.load_adapter(write_adapter(tmp_path / "adapter", tensors, rank_pattern=FUSED_RANKS), "mine")
    for ours, before in zip(scores(model), base, strict=True):
        assert torch.equal(ours, before)
    exact = keye.load(folder, dtype="float32")
    merge(exact.model, exact.engine.load_adapter(tmp_path / "adapter", "mine"))
    for quantised, merged, far in zip(scores(model, "mine"), scores(exact), scores(plain), strict=True):
        assert (quantised - merged).abs().mean() < 0.4 * (merged - far).abs().mean()


def test_a_running_request_goes_on_with_an_adapter_that_is_unloaded(model: Keye, tmp_path: Path) -> None:
    path = write_adapter(tmp_path, random_pairs(model.model))
    model.load_adapter(path, "mine")
    nbytes = model.runtime.ledger.used("adapters")
    request = greedy(model, about(clip(1)), adapter="mine")
    expected = tokens_of(run_all(model, request)[0])
    inbox = add(model, request)
    del request
    while not any(isinstance(task.state, Generating) for task in model.core.tasks):
        step(model)
    model.unload_adapter("mine")
    run(model)
    assert nbytes > 0 and tokens_of(inbox) == expected
    gc.collect()
    assert model.runtime.ledger.used("adapters") == 0
    with pytest.raises(KeyeError, match="no adapter 'mine' is loaded"):
        greedy(model, about(clip(1)), adapter="mine")


def test_a_default_adapter_answers_requests_that_name_none(model: Keye, tmp_path: Path) -> None:
    tensors = random_pairs(model.model)
    before = model.runtime.fingerprint
    model.load_adapter(write_adapter(tmp_path, tensors), "mine")
    expected = scores(model, "mine")
    assert model.runtime.fingerprint == before
    model.runtime.use_by_default("mine")
    assert all(map(torch.equal, scores(model), expected))
    assert model.runtime.fingerprint.weights != before.weights
    with pytest.raises(KeyeError, match="default of all requests"):
        model.unload_adapter("mine")


def test_names_and_weights_of_the_model_stay(model: Keye, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    model.load_adapter(write_adapter(tmp_path, random_pairs(model.model)), "mine")
    scores(model, "mine")
    after = model.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    model.engine.update_weights({"model.norm.weight": before["model.norm.weight"] * 2})
    assert differ(scores(model, "mine"), scores(model))


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "ADALORA"}, "'ADALORA': keye reads LoRA"),
        ({"bias": "all"}, "bias 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"r": 0}, "a rank is 1 to"),
        ({"r": 8}, r"need \[64, 8\] x \[8, 64\]: it was made for another model \(it names tiny\)"),
        ({"rank_pattern": {"(a+)+$": 4}}, "no expressions"),
        ({"alpha_pattern": {r"layers.\d.self_attn.q_proj": 4}}, "no expressions"),
        ({"use_rslora": "yes"}, "use_rslora 'yes'"),
        ({"lora_alpha": "big"}, "lora_alpha 'big'"),
    ],
)  # fmt: skip
def test_configurations_that_are_not_plain_lora_are_named(
    model: Keye, tmp_path: Path, fields: dict[str, Any], sentence: str
) -> None:
    path = write_adapter(tmp_path, random_pairs(model.model, (Q,)))
    config = json.loads((path / "adapter_config.json").read_text()) | fields
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(KeyeError, match=sentence):
        model.load_adapter(path, "mine")
    assert model.runtime.ledger.accounts() == {} and model.runtime.adapters.names == ()


def tensors_with(**changes: Tensor | None) -> dict[str, Tensor]:
    """A pair of a layer, with tensors by the ends of their names in place of others."""
    tensors = {f"{Q}.lora_A.weight": torch.ones(4, 64), f"{Q}.lora_B.weight": torch.ones(64, 4)}
    return {name: t for name, t in (tensors | changes).items() if t is not None}


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (tensors_with(**{f"{Q}.lora_A.weight": torch.ones(4, 96)}), "made for another model"),
        ({"model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 64),
          "model.layers.9.mlp.up_proj.lora_B.weight": torch.ones(64, 4)}, "no linear layer"),
        ({"model.layers.0.input_layernorm.lora_A.weight": torch.ones(4, 64),
          "model.layers.0.input_layernorm.lora_B.weight": torch.ones(64, 4)}, "takes no adapter here"),
        (tensors_with(**{f"{Q}.lora_B.weight": None}), "without the other half"),
        (tensors_with(**{f"{Q}.lora_magnitude_vector.weight": torch.ones(64)}), "DoRA's magnitudes"),
        (tensors_with(**{"lm_head.base_layer.weight": torch.ones(4, 4)}), "with save_embedding_layers=False"),
        (tensors_with(**{f"{Q}.base_layer.weight": torch.ones(64, 65)}), r"has \[64, 65\] for .*another model"),
        (tensors_with(**{f"{Q}.lora_B.weight": torch.full((64, 4), torch.nan)}), "NaN or infinite"),
        (tensors_with(**{f"{Q}.lora_B.weight": torch.ones(64, 4, dtype=torch.int32)}), "not a matrix of numbers"),
        ({f"{EXPERTS}.7.up_proj.lora_A.weight": torch.ones(4, 64),
          f"{EXPERTS}.7.up_proj.lora_B.weight": torch.ones(32, 4)}, "expert 7"),
        ({f"{EXPERTS}.lora_A.weight": torch.ones(16, 65), f"{EXPERTS}.lora_B.weight": torch.ones(32, 16)},
         "experts are 4 of 64 x 64 and 32 x 64"),
        ({}, "holds no tensors"),
    ],
    ids=["shape", "layer", "norm", "half", "dora", "base", "resized", "nan", "dtype", "expert", "experts", "empty"],
)  # fmt: skip
def test_adapters_of_other_models_are_one_sentence(
    model: Keye, tmp_path: Path, tensors: dict[str, Tensor], sentence: str
) -> None:
    with pytest.raises(KeyeError, match=sentence):
        model.load_adapter(write_adapter(tmp_path, tensors), "mine")
    assert model.runtime.ledger.accounts() == {} and model.runtime.adapters.names == ()


def test_files_that_are_missing_or_broken_are_one_sentence(model: Keye, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", random_pairs(model.model, (Q,)))
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(KeyeError, match="cannot be read as safetensors"):
        model.load_adapter(path, "mine")
    file.rename(path / "adapter_model.bin")
    with pytest.raises(KeyeError, match="is a pickle, which keye does not open"):
        model.load_adapter(path, "mine")
    with pytest.raises(KeyeError, match=r"holds no adapter_config\.json"):
        model.load_adapter(tmp_path, "mine")


def test_memory_is_reserved_before_an_adapter_is_read(model: Keye, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    single = {f"{EXPERTS}.3.up_proj.lora_A.weight": torch.randn(4, 64, generator=generator),
              f"{EXPERTS}.3.up_proj.lora_B.weight": torch.randn(32, 4, generator=generator)}  # fmt: skip
    path = write_adapter(tmp_path, single)
    adapter = model.engine.load_adapter(path, "joined")
    down, up = adapter.experts[EXPERTS].gate_up or ()
    assert adapter.nbytes == model.runtime.ledger.used("adapters") == down.nbytes + up.nbytes
    model.runtime.ledger.budget = adapter.nbytes + 100
    with pytest.raises(KeyeError, match="needed for adapters"):
        model.load_adapter(path, "second")
    assert model.runtime.ledger.used("adapters") == adapter.nbytes


def test_names_of_adapters(model: Keye, tmp_path: Path) -> None:
    path = write_adapter(tmp_path, random_pairs(model.model, (Q,)))
    model.load_adapter(path, "captions")
    with pytest.raises(KeyeError, match="loaded already"):
        model.load_adapter(path, "captions")
    for name in ("two words", "..", "a/../b", "/a", ""):
        with pytest.raises(KeyeError, match="not a name"):
            model.load_adapter(path, name)
    with pytest.raises(KeyeError, match="did you mean captions"):
        model.engine.generate([[1]], SamplingParams(max_tokens=1), adapter="caption")


def test_damaged_files_are_one_sentence_or_an_adapter(model: Keye, tmp_path: Path) -> None:
    """Flipped bytes in the configuration and in the header, and files cut short."""
    path = write_adapter(tmp_path, random_pairs(model.model, (Q,), r=2), r=2)
    files = {name: (path / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    rng, outcomes = random.Random(0), Counter[str]()
    for number in range(80):
        name = rng.choice([*files])
        data = bytearray(files[name])
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randint(1, 3)):
            if data:
                data[rng.randrange(min(len(data), 600))] = rng.randrange(256)
        (path / name).write_bytes(data)
        try:
            model.load_adapter(path, f"adapter-{number}")
            outcomes["read"] += 1
        except KeyeError:
            outcomes["rejected"] += 1
        (path / name).write_bytes(files[name])
    assert outcomes["rejected"] > 20


@pytest.mark.parametrize("text", ["[" * 100_000, '{"r": ' + "9" * 5000 + "}", "[]", '{"peft_type": "LORA", "r": true}'])
def test_configurations_beyond_what_python_reads(model: Keye, tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(KeyeError):
        model.load_adapter(tmp_path, "mine")


def test_indexes_and_live_sessions_are_computed_with_one_adapter(tmp_path: Path) -> None:
    model = keye.load(tiny_folder(tmp_path / "model"), dtype="float32")
    layers = ("visual.vision_model.encoder.layers.0.mlp.fc1", "model.layers.0.self_attn.v_proj", "lm_head")
    model.load_adapter(write_adapter(tmp_path / "a", random_pairs(model.model, layers)), "mine")
    video, options = clip(1), {"max_tokens": 3, "ignore_eos": True, "logprobs": 0}

    def probabilities(answer: Answer) -> list[float]:
        return [prob.logprob for prob in answer.logprobs or ()]

    expected = probabilities(model.ask(video, "what?", adapter="mine", **options))
    assert abs(expected[0] - probabilities(model.ask(video, "what?", **options))[0]) > 1e-3
    model.index(video, tmp_path / "mine.keye", adapter="mine")
    indexed = model.ask(tmp_path / "mine.keye", "what?", adapter="mine", **options)
    assert probabilities(indexed) == pytest.approx(expected, abs=1e-3)
    with pytest.raises(KeyeError, match="with another adapter, but the question is asked without an adapter"):
        model.ask(tmp_path / "mine.keye", "what?", **options)
    live = model.live(adapter="mine")
    live.append(video.frames, video.timestamps or ())
    answer = live.ask("what?", max_tokens=3)
    assert answer.usage.completion_tokens > 0
    assert live.request("what?").adapter is model.runtime.adapters.get("mine")


def test_adapters_load_onto_the_decoder_of_671b(tmp_path: Path) -> None:
    """Onto every layer that is called: latents, shared experts, routers of groups."""
    folder = latent_folder(tmp_path / "model")
    model, other = (keye.load(folder, dtype="float32") for _ in range(2))
    called = [name for name, layer in model.model.model.layers.named_modules() if hasattr(layer, "in_features")]
    tensors = random_pairs(model.model, tuple(f"model.layers.{name}" for name in called))
    path = write_adapter(tmp_path / "adapter", tensors)
    base = scores(model)
    model.load_adapter(path, "mine")
    merge(other.model, other.engine.load_adapter(path, "mine"))
    compare(scores(model, "mine"), scores(other))
    assert differ(scores(model, "mine"), base)
