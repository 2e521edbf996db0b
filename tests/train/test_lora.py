"""LoRA for training: what it changes, what it trains, and files that inference and PEFT read."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import keye
from keye import Keye
from keye.chat.messages import Medium
from keye.config import model_config_from_dict
from keye.models.keye import KeyeModel
from keye.models.moe import MoE
from keye.train.config import LoraSettings
from keye.train.features import encode_media
from keye.train.lora import LoraError, LoraParameters, add_lora, load_adapter, multiply_grouped, save_adapter
from keye.train.losses import token_log_probs
from keye.train.packed import TreeStep
from keye.train.packing import load, pack
from keye.train.recipe import move_batch
from keye.train.recipes.nano.initialise import fresh_model
from keye.train.tree import IGNORE
from tests.support.layouts import nano_layout, sample
from tests.support.tiny import tiny_folder, tiny_model, tiny_raw

IDS = list(range(20, 60))
EVERYTHING = LoraSettings(rank=4, alpha=6.0, targets=("all-linear", "router", "indexer", "head"), experts=True,
                          rank_pattern={"gate_up_proj": 2, "q_proj": 3}, alpha_pattern={"down_proj": 5.0})  # fmt: skip


def log_probs(model: KeyeModel, ids: list[int] = IDS, mode: str = "dense") -> Tensor:
    """Log-probabilities of all but the first token by the training step."""
    step = TreeStep(torch.tensor([[0, len(ids), -1]]), model.config.text, mode)  # type: ignore[arg-type]
    positions = torch.arange(len(ids)).expand(3, -1)
    logits = model.logits(model(model.embed(torch.tensor(ids)), positions, step))
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)


def engine_log_probs(model: Keye, adapter: str | None = None, ids: list[int] = IDS) -> Tensor:
    return model.engine.score([ids], adapter=adapter)[0].logprobs


def fill(lora: LoraParameters, seed: int = 7) -> None:
    """Numbers in place of the zeros that training begins with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.named.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_outputs_stay_the_same_to_the_last_bit_until_b_is_trained(mode: str) -> None:
    model = tiny_model().model.train()
    before, names = log_probs(model, mode=mode), list(model.state_dict())
    lora = add_lora(model, EVERYTHING)
    assert torch.equal(log_probs(model, mode=mode), before)
    assert list(model.state_dict()) == names
    fill(lora)
    assert not torch.allclose(log_probs(model, mode=mode), before, atol=1e-2)
    with lora.disabled():
        assert torch.equal(log_probs(model, mode=mode), before)


def test_gradients_reach_the_pairs_and_nothing_else() -> None:
    model = tiny_model().model.train()
    lora = add_lora(model, EVERYTHING)
    fill(lora)
    log_probs(model).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    without = [
        name
        for name, parameter in lora.named.items()
        if parameter.grad is None or not bool(parameter.grad.isfinite().all()) or not parameter.grad.any()
    ]
    assert not [name for name in without if ".sa_indexer." not in name]  # dense attention does not use the indexer


def merged(model: KeyeModel, lora: LoraParameters) -> KeyeModel:
    """The model with the pairs in its weights."""
    other = copy.deepcopy(model).requires_grad_(True)
    for name, pair in lora.pairs.items():
        weight, product = weight_of(other, name), pair.scale * pair.B @ pair.A
        weight.data += product.mT if pair.A.ndim == 3 else product
    for moe in (module for module in other.modules() if isinstance(module, MoE)):
        moe.mix_adapted = None
    for module in other.modules():
        module._forward_hooks.clear()
    return other


def weight_of(model: KeyeModel, name: str) -> nn.Parameter:
    is_fused = name.endswith(("gate_up_proj", "experts.down_proj"))
    return model.get_parameter(name if is_fused else f"{name}.weight")


def test_gradients_are_those_of_the_product() -> None:
    """dA = scale * B^T dW and dB = scale * dW A^T, with dW the gradient of a weight that holds the product."""
    model = tiny_model().model.train()
    lora = add_lora(model, EVERYTHING)
    fill(lora)
    other = merged(model, lora)
    torch.testing.assert_close(log_probs(model), log_probs(other), atol=2e-4, rtol=1e-4)
    log_probs(model).sum().backward()
    log_probs(other).sum().backward()
    for name, pair in lora.pairs.items():
        if ".sa_indexer." in name:  # dense attention does not use it
            continue
        grad = weight_of(other, name).grad
        assert grad is not None and pair.A.grad is not None and pair.B.grad is not None
        grad = pair.scale * (grad.mT if pair.A.ndim == 3 else grad)
        for own, expected in ((pair.A.grad, pair.B.mT @ grad), (pair.B.grad, grad @ pair.A.mT)):
            assert float((own - expected.detach()).norm() / expected.detach().norm()) < 1e-3, name


@pytest.mark.parametrize("sizes", [[64, 0, 128, 64], [3, 0, 7, 1], [0, 0, 0, 5]], ids=["blocks", "few", "single"])
def test_grouped_products_are_those_of_each_expert(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(shape, generator=generator, requires_grad=True)
               for shape in ((sum(sizes), 6), (4, 3, 6), (4, 5, 3)))  # fmt: skip
    expected = torch.cat([part @ a[e].t() @ b[e].t() for e, part in enumerate(x.split(sizes))])
    ours = multiply_grouped(x, a, b, sizes)
    torch.testing.assert_close(ours, expected)
    for own, other in zip(torch.autograd.grad(ours.square().sum(), (x, a, b)),
                          torch.autograd.grad(expected.square().sum(), (x, a, b)), strict=True):  # fmt: skip
        torch.testing.assert_close(own, other, atol=1e-3, rtol=1e-4)


def test_dropout_is_of_training_alone() -> None:
    model = tiny_model().model.eval()
    lora = add_lora(model, EVERYTHING.model_copy(update={"dropout": 0.5}))
    fill(lora)
    assert torch.equal(log_probs(model), log_probs(model))
    model.train()
    assert not torch.equal(log_probs(model), log_probs(model))


def test_targets_are_groups_names_and_patterns() -> None:
    def layers(*targets: str, **fields: Any) -> set[str]:
        return set(add_lora(tiny_model().model, LoraSettings(targets=targets, **fields)).pairs)

    attention = layers("all-linear")  # this model has no dense MLP
    assert {name.rpartition(".")[2] for name in attention} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(attention) == 8 and not any("sa_indexer" in name or "visual" in name for name in attention)
    assert layers("all-linear", experts=True) == layers("attention", "experts")
    assert layers("vision") == layers("tower", "projector")
    assert all("q_proj" in name for name in layers("q_proj"))
    assert layers("model.layers.1.self_attn.[qv]_proj") == {f"model.layers.1.self_attn.{n}_proj" for n in "qv"}
    assert layers("attention", exclude=("o_proj", "*.k_proj")) == {
        n for n in attention if n.endswith(("q_proj", "v_proj"))
    }
    assert layers("projector") == {"mlp_AR.linear_1", "mlp_AR.linear_2"}
    assert any(name.startswith("visual.") for name in layers("tower"))


def test_counts_are_by_group() -> None:
    counts = add_lora(
        tiny_model().model, LoraSettings(rank=4, targets=("q_proj", "experts"), exclude=("visual.*",))
    ).counts
    assert (counts["attention"].adapted, counts["attention"].layers) == (2, 8)
    assert counts["attention"].numbers == 2 * 4 * (64 + 64)
    assert (counts["experts"].adapted, counts["experts"].layers) == (4, 4)
    assert counts["experts"].numbers == 2 * 4 * (4 * (64 + 64) + 4 * (32 + 64))
    assert (counts["tower"].adapted, counts["tower"].numbers) == (0, 0)
    assert "dense" not in counts  # of which the model has none


@pytest.mark.parametrize(
    "fields",
    [
        {"targets": "dense"},
        {"targets": ("attention", "qkv_proj")},
        {"targets": "model.layers.9.*"},
        {"targets": "down_proj"},  # a layer of single experts, which are fused here
        {"targets": "q_proj", "exclude": "*"},
    ],
)
def test_a_target_without_a_layer_is_an_error_before_anything_changes(fields: dict[str, Any]) -> None:
    model = tiny_model().model
    with pytest.raises(LoraError, match=r"dense|qkv_proj|down_proj|layers\.9|leaves no layer"):
        add_lora(model, LoraSettings(**fields))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_experts_of_a_model_without_any_are_an_error() -> None:
    model = fresh_model(model_config_from_dict(tiny_raw() | {"num_experts": 0}), 0)
    with pytest.raises(LoraError, match="experts"):
        add_lora(model, LoraSettings(experts=True))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_the_engine_computes_what_the_trainer_computes(mode: str, rslora: bool, tmp_path: Path) -> None:
    topk = 64 if mode == "dense" else 16
    model = tiny_model(topk=topk).model.train()
    lora = add_lora(model, EVERYTHING.model_copy(update={"rslora": rslora}))
    fill(lora)
    ours = log_probs(model, mode=mode)
    runtime = Keye(tiny_model(topk=topk))
    runtime.load_adapter(save_adapter(lora, tmp_path / "tuned"), "tuned")
    assert float((engine_log_probs(runtime, "tuned") - ours).abs().max().detach()) < 1e-3
    assert not torch.allclose(engine_log_probs(runtime), ours, atol=1e-2)


@pytest.mark.parametrize("quant", [None, "int8", "int4"])
def test_in_bfloat16_layers_with_pairs_are_those_of_the_engine_to_the_last_bit(quant: Any, tmp_path: Path) -> None:
    """The scales, 6 / 4 and others, are no powers of two: it matters which half of a pair they are rounded into."""
    folder = tiny_folder(tmp_path / "model")
    model, runtime = (keye.load(folder, quant=quant) for _ in range(2))
    plain = keye.load(folder, quant=quant).model
    lora = add_lora(model.model.train(), EVERYTHING)
    fill(lora)
    adapter = runtime.engine.load_adapter(save_adapter(lora, tmp_path / "tuned"), "tuned")
    for name in {name.partition(".experts.")[0] for name in lora.pairs}:  # of experts, the layer that routes to them
        ours, theirs, before = (own.get_submodule(name) for own in (model.model, runtime.model, plain))
        width = model.model.config.text.hidden_size if isinstance(ours, MoE) else ours.in_features
        x = torch.randn(40, int(width), generator=torch.Generator().manual_seed(1)).bfloat16()
        with torch.no_grad(), runtime.model.adapter_rows.use_for_all(adapter):
            expected, without = theirs(x), before(x)
        trained = ours(x.requires_grad_())
        if isinstance(ours, MoE):
            expected, without, trained = expected[0], without[0], trained[0]
        assert torch.equal(trained, expected), name
        assert not torch.allclose(trained, without, atol=1e-2), name


@pytest.mark.slow
def test_in_bfloat16_trained_replies_have_the_same_log_probabilities_in_the_engine(tmp_path: Path) -> None:
    """Of keye-nano with a trained adapter, about a video of 32 frames."""
    layout, folder = nano_layout(), keye.hub.asset("nano")
    video = Medium("video", str(keye.hub.asset("demo.mp4")), {"nframes": 32})
    pairs = (("when is the cyan triangle visible?", "[[3.0, 5.0]]"), ("how many circles are there?", "7"))
    items = [sample((video, question), answer) for question, answer in pairs]
    packs = [move_batch(load(pack([layout.lay_out(item)], 100_000)[0]), torch.device("cpu")) for item in items]
    model = keye.load(folder).model.train()
    lora = add_lora(model, LoraSettings(rank=8, alpha=11.0, experts=True))  # the scale is not a power of two
    optimizer = torch.optim.AdamW(list(lora.named.values()), lr=3e-3)

    def learnt(packed: Any) -> tuple[Tensor, Tensor]:
        step = TreeStep(packed.segments, model.config.text, "sparse", teach=False)
        hidden = model(model.embed(packed.token_ids, encode_media(model, packed)), packed.position_ids, step)
        rows = (packed.labels != IGNORE).nonzero().squeeze(1)
        return token_log_probs(model.logits, hidden[rows], packed.labels[rows]), rows

    for _ in range(15):
        for packed in packs:
            (-learnt(packed)[0].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    runtime = keye.load(folder, adapters={"tuned": save_adapter(lora, tmp_path / "tuned")})
    errors = []
    for item, packed in zip(items, packs, strict=True):
        ours, rows = learnt(packed)
        assert float(ours.detach().mean()) > -0.1
        prompt = layout.builder.lay_out(layout.builder.render(item.messages, template=layout.template))
        errors.append((runtime.engine.score([prompt], adapter="tuned")[0].logprobs[rows] - ours.detach()).abs())
    error = torch.cat(errors)
    assert float(error.mean()) <= 0.003 and float(error.max()) <= 0.1


@pytest.mark.parametrize("own", ["gate_up_proj", "down_proj"])
def test_one_fused_tensor_alone_is_read_back(own: str, tmp_path: Path) -> None:
    model = tiny_model(topk=64).model.train()
    lora = add_lora(model, LoraSettings(rank=2, targets=f"experts.{own}"))
    fill(lora)
    runtime = Keye(tiny_model(topk=64))
    runtime.load_adapter(save_adapter(lora, tmp_path), "tuned")
    assert float((engine_log_probs(runtime, "tuned") - log_probs(model)).abs().max().detach()) < 1e-3


def test_training_goes_on_with_a_saved_adapter(tmp_path: Path) -> None:
    lora = add_lora(tiny_model().model, EVERYTHING)
    fill(lora)
    save_adapter(lora, tmp_path, base="tiny")
    again = add_lora(tiny_model().model, EVERYTHING, seed=1)
    load_adapter(again, tmp_path)
    for name, parameter in lora.named.items():
        torch.testing.assert_close(again.named[name], parameter)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    with pytest.raises(LoraError, match="targets of this run"):
        load_adapter(add_lora(tiny_model().model, LoraSettings()), tmp_path)
    with pytest.raises(LoraError, match="rank"):
        load_adapter(add_lora(tiny_model().model, EVERYTHING.model_copy(update={"rank": 8})), tmp_path)


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_a_quantised_base_computes_in_training_what_it_computes_in_the_engine(quant: Any, tmp_path: Path) -> None:
    folder, ids = tiny_folder(tmp_path / "model"), IDS[:16]  # short enough for dense attention in the engine
    runtime = keye.load(folder, quant=quant, dtype="float32")
    model = runtime.model.train()
    before = log_probs(model, ids)
    lora = add_lora(model, EVERYTHING)
    fill(lora)
    ours = log_probs(model, ids)
    assert not torch.allclose(ours, before, atol=1e-2)
    ours.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in lora.named.values() if p.grad is not None)
    save_adapter(lora, tmp_path / "tuned")
    runtime = keye.load(folder, quant=quant, dtype="float32", adapters={"tuned": tmp_path / "tuned"})
    assert float((engine_log_probs(runtime, "tuned", ids) - ours).abs().max().detach()) < 1e-3
    assert float((engine_log_probs(runtime, None, ids) - before).abs().max().detach()) < 1e-3


def test_layers_computed_again_give_the_same_gradients(tmp_path: Path) -> None:
    """Of a quantised base with experts, by activation checkpointing."""
    model = keye.load(tiny_folder(tmp_path), quant="int4", dtype="float32").model.train()
    lora = add_lora(model, EVERYTHING.model_copy(update={"dropout": 0.5, "targets": ("all-linear", "head")}))
    fill(lora)

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        return list(torch.autograd.grad(log_probs(model).sum(), list(lora.named.values())))

    expected = gradients()
    model.set_recompute(True)
    for ours, other in zip(gradients(), expected, strict=True):
        assert torch.equal(ours, other)
