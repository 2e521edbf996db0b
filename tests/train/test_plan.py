"""Predicted memory and arithmetic of training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from keye.config import KeyeConfig, model_config_from_dict
from keye.errors import KeyeError
from keye.models.attention import IndexerOutput
from keye.models.keye import KeyeModel
from keye.models.load import replace_layers
from keye.models.quant_fill import quantize_layer
from keye.ops import registry
from keye.ops.elementwise import PLAIN
from keye.ops.tree import Segment, attend_dense, attend_sparse
from keye.quant.layers import QuantizedWeight, pack_weights
from keye.quant.policy import make_policy
from keye.train.config import LoraSettings, StageConfig, TrainConfig
from keye.train.lora import add_lora
from keye.train.plan import plan_training
from tests.support.tiny import tiny_raw

TOKENS = 512
STAGE: dict[str, Any] = {"name": "tune", "steps": 1, "optimizer": "adamw"}


def raw_config(**fields: Any) -> dict[str, Any]:
    """A layer and a half of width from which the compiled core computes norms, with few words and small experts."""
    raw = tiny_raw(topk=64) | {
        "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 128, "num_experts": 8, "moe_intermediate_size": 256,
    }  # fmt: skip
    raw["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    return raw | fields


def make_run(quant: Any = None, lora: LoraSettings | None = None, **fields: Any) -> TrainConfig:
    stage = StageConfig(**STAGE, **({} if lora else {"trains": "all"}))
    return TrainConfig(model=Path(), output=Path(), stages=(stage,), quant=quant, lora=lora, **fields)


class TreeSteps:
    """Attention of the tokens of one segment, as training computes it."""

    def __init__(self, config: KeyeConfig, is_sparse: bool) -> None:
        self.sparse, self.topk = is_sparse, config.text.sparse.topk if config.text.sparse else 0
        self.segments = (Segment(0, TOKENS, ((0, TOKENS),), 0),)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, index: IndexerOutput | None) -> Tensor:
        if index is None:
            return attend_dense(q, k, v, self.segments)
        return attend_sparse(q, k, v, index.q, index.k, index.gate, self.segments, self.topk, teach=False)[0]

    def observe_layer(self, layer: int, hidden: Tensor) -> None: ...

    def observe_router(self, layer: int, logits: Tensor, chosen: Tensor) -> None: ...


def build(config: KeyeConfig, quant: str | None) -> KeyeModel:
    """A model of random numbers, without files."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = KeyeModel(config).bfloat16()
        if quant is not None:
            policy = make_policy(quant)

            def quantise(name: str, layer: nn.Module) -> nn.Module:
                form = policy.format_of(f"{name}.weight")
                return layer if form is None else quantize_layer(layer, form)

            replace_layers(model, quantise)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        for weight in model.modules():
            if isinstance(weight, QuantizedWeight):
                assert weight.codes is not None and weight.scales is not None
                weight.codes.view(torch.uint8).random_(0, 16)
                weight.scales.fill_(0.003)
    pack_weights(model)
    model.set_elementwise(registry.find_elementwise(model.device, config.text.hidden_size))
    return model.train()


def count_kept(model: KeyeModel, is_sparse: bool) -> int:
    """Bytes that autograd keeps of a forward pass, without the model's own and those of layers' settings."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(TOKENS) % model.config.text.vocab_size
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        x = model.embed(ids).requires_grad_()
        hidden = model(x, torch.arange(TOKENS).expand(3, -1), TreeSteps(model.config, is_sparse))  # type: ignore[arg-type]
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize(
    ("fields", "quant", "lora", "is_sparse"),
    [
        ({}, "int4", LoraSettings(), False),
        ({}, "int4", LoraSettings(experts=True, dropout=0.1), False),
        ({}, None, LoraSettings(experts=True), True),
        ({"num_experts": 0}, None, LoraSettings(dropout=0.1), False),
        ({"num_experts": 0}, None, None, False),
    ],
    ids=["int4", "int4 with experts", "sparse with experts", "dense", "everything"],
)
def test_activations_are_those_that_autograd_keeps(
    fields: dict[str, Any], quant: str | None, lora: LoraSettings | None, is_sparse: bool
) -> None:
    if registry.find_elementwise(torch.device("cpu"), 1024) is PLAIN:
        pytest.skip("no compiled core here")
    config = model_config_from_dict(raw_config(**fields))
    run = make_run(quant, lora)
    stage = run.stages[0].model_copy(update={"attention": "sparse" if is_sparse else "dense"})
    model = build(config, quant)
    if lora is not None:
        add_lora(model, lora)
    plan = plan_training(config, run, stage, tokens=TOKENS, visual_tokens=0)
    saved = count_kept(model, is_sparse) + 2 * TOKENS * config.text.hidden_size  # the states that the head keeps
    # How many rows an expert gets depends on the numbers; the plan is for the even case.
    assert plan.parts["activations"] == pytest.approx(saved, rel=0.12)


@pytest.mark.parametrize("quant", [None, "int4", "int8"])
def test_weights_and_trained_numbers_are_those_of_the_model(quant: str | None) -> None:
    config, lora = model_config_from_dict(raw_config()), LoraSettings(rank=4, experts=True, rslora=True)
    run = make_run(quant, lora)
    model = build(config, quant)
    plan = plan_training(config, run, run.stages[0], tokens=TOKENS, visual_tokens=0)
    assert plan.parts["weights"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert plan.trained == sum(parameter.numel() for parameter in add_lora(model, lora).named.values())
    assert plan.parts["adapter"] == plan.parts["gradients"] == 4 * plan.trained
    assert plan.parts["optimizer"] == 12 * plan.trained
    assert plan.total == sum(plan.parts.values()) == plan.to_dict()["bytes"]


def test_everything_is_trained_with_masters_and_moments() -> None:
    config, run = model_config_from_dict(raw_config()), make_run()
    plan = plan_training(config, run, run.stages[0], tokens=TOKENS, visual_tokens=0)
    assert plan.parts["optimizer"] == 12 * plan.trained and plan.parts["gradients"] == 2 * plan.trained
    muon = run.stages[0].model_copy(update={"optimizer": "muon"})
    assert plan_training(config, run, muon, tokens=TOKENS, visual_tokens=0).parts["optimizer"] < 9 * plan.trained


def test_checkpointing_trades_memory_for_arithmetic() -> None:
    config = model_config_from_dict(raw_config(num_hidden_layers=8))
    saved, again = (
        plan_training(config, run, run.stages[0], tokens=4096, visual_tokens=3000)
        for run in (make_run("int4", LoraSettings(), checkpointing=checkpointing) for checkpointing in (False, True))
    )
    assert again.total < 0.7 * saved.total and 1.2 < again.flops / saved.flops < 1.5
    assert again.seconds(10, 1e12) == pytest.approx(10 * again.flops / 1e12)


def test_arithmetic_of_a_dense_model_is_six_times_its_weights_for_each_token() -> None:
    config, run = model_config_from_dict(raw_config(num_experts=0)), make_run()
    plan = plan_training(config, run, run.stages[0], tokens=TOKENS, visual_tokens=0)
    model = build(config, None)
    others = ("visual.", "mlp_AR.", "embed_tokens", "sa_indexer")
    size = sum(p.numel() for name, p in model.named_parameters()
               if p.ndim == 2 and not any(other in name for other in others))  # fmt: skip
    head = 0 if "lm_head.weight" in dict(model.named_parameters()) else model.lm_head.weight.numel()
    assert plan.flops == pytest.approx(6 * (size + head) * TOKENS, rel=0.15)


def test_a_target_that_the_model_does_not_have_is_an_error() -> None:
    config, run = model_config_from_dict(raw_config()), make_run("int4", LoraSettings(targets="dense"))
    with pytest.raises(KeyeError, match="dense"):
        plan_training(config, run, run.stages[0], tokens=TOKENS, visual_tokens=0)


def test_cached_features_need_no_tower() -> None:
    config, run = model_config_from_dict(raw_config()), make_run("int4", LoraSettings())
    runs, cached = (
        plan_training(config, run, run.stages[0], tokens=2048, visual_tokens=1500, cached_features=flag)
        for flag in (False, True)
    )
    assert runs.parts["vision"] > 0 and "vision" not in cached.parts and cached.flops < runs.flops
