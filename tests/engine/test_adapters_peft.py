"""Adapters that PEFT itself makes compute here what they compute there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keye import Keye, KeyeError
from keye.models.moe import MoE, Router
from tests.support.oracles import oracle
from tests.support.tiny import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TEXTS = ([3, 5, 7, 11, 13], list(range(20, 60)))
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "regex": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": r".*layers\.1\..*(q_proj|o_proj)"},
    "all": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "router": {"r": 4, "lora_alpha": 8, "target_modules": ["gate", "lm_head", "embed_tokens"]},
    "patterns": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2},
                 "alpha_pattern": {"layers.1.self_attn.v_proj": 32}},
    "experts": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "target_parameters": FUSED},
    "down": {"r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": FUSED[1:]},
}  # fmt: skip


def fill(model: nn.Module) -> None:
    """Numbers in place of the zeros that training begins with."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def scores(model: Keye, adapter: str | None = None) -> list[Tensor]:
    return [result.logprobs for result in model.engine.score(TEXTS, adapter=adapter)]


def make(folder: Path, **fields: Any) -> list[Tensor]:
    """Writes an adapter with PEFT; the scores of PEFT's model."""
    peft = oracle("peft")
    runtime = tiny_model()
    wrapped = peft.get_peft_model(runtime.model, peft.LoraConfig(**fields))
    for module in wrapped.modules():
        if isinstance(module, MoE) and not isinstance(module.gate, Router):  # PEFT's layer stands there
            module.gate.choose = module.gate.base_layer.choose
    fill(wrapped)
    wrapped.save_pretrained(str(folder))
    return scores(Keye(runtime))


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_of_peft_computes_the_same(name: str, tmp_path: Path) -> None:
    expected = make(tmp_path, **CONFIGS[name])
    model = Keye(tiny_model())
    base = scores(model)
    model.load_adapter(tmp_path, "mine")
    for ours, theirs, before in zip(scores(model, "mine"), expected, base, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
        assert not torch.allclose(ours, before, atol=1e-2)


@pytest.mark.parametrize(
    ("fields", "sentence"), [({"use_dora": True}, "use_dora"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
                             ({"lora_bias": True}, "lora_bias")],
)  # fmt: skip
def test_variants_of_peft_are_named(fields: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    peft = oracle("peft")
    wrapped = peft.get_peft_model(tiny_model().model, peft.LoraConfig(target_modules=["q_proj"], **fields))
    wrapped.save_pretrained(str(tmp_path))
    with pytest.raises(KeyeError, match=sentence):
        Keye(tiny_model()).load_adapter(tmp_path, "mine")
