"""Adapters that keye trains compute in PEFT what they compute here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from keye import Keye
from keye.models.moe import MoE, Router
from keye.train.config import LoraSettings
from keye.train.lora import add_lora, save_adapter
from tests.support.oracles import oracle
from tests.support.tiny import tiny_model
from tests.train.test_lora import IDS, engine_log_probs, fill, log_probs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SETTINGS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "every linear layer": {"targets": ("all-linear", "vision", "router", "indexer", "head"), "dropout": 0.1},
    "patterns": {"targets": ("q_proj", "v_proj"), "rslora": True, "alpha_pattern": {"layers.0.self_attn.v_proj": 7.0},
                 "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 3}},
    "experts": {"experts": True, "rank_pattern": {"gate_up_proj": 2}, "alpha_pattern": {"experts.down_proj": 3.0}},
    "one fused tensor": {"targets": "gate_up_proj"},
    "the other": {"targets": "experts.down_proj", "dropout": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_peft_loads_a_trained_adapter(name: str, tmp_path: Path) -> None:
    peft = oracle("peft")
    model = tiny_model(topk=64).model.train()
    lora = add_lora(model, LoraSettings(rank=4, alpha=6.0, **SETTINGS[name]))
    fill(lora)
    save_adapter(lora, tmp_path)
    ours, base = log_probs(model.eval()), log_probs(tiny_model(topk=64).model)
    runtime = tiny_model(topk=64)
    wrapped = peft.PeftModel.from_pretrained(runtime.model, str(tmp_path))
    for module in wrapped.modules():
        if isinstance(module, MoE) and not isinstance(module.gate, Router):  # PEFT's layer stands there
            module.gate.choose = module.gate.base_layer.choose
    loaded = [key for key in wrapped.state_dict() if ".lora_" in key]
    assert len(loaded) == len(lora.named)
    torch.testing.assert_close(engine_log_probs(Keye(runtime)), ours, atol=1e-4, rtol=0)
    assert not torch.allclose(ours, base, atol=1e-2) and len(ours) == len(IDS) - 1
