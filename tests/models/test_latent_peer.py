"""The 671B decoder against transformers' DeepSeek-V3, from files that transformers saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from keye.cache.sequence import KVCache
from keye.config import model_config_from_dict
from keye.models.attention import CachedStep, Span
from keye.models.load import load_model
from tests.support.latent import latent_raw

#: Sizes and routing of the tiny model; keye's own names are left out.
FIELDS = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "n_shared_experts", "n_routed_experts", "routed_scaling_factor", "kv_lora_rank",
    "q_lora_rank", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim", "n_group", "topk_group", "num_experts_per_tok",
    "first_k_dense_replace", "norm_topk_prob", "rope_theta", "rms_norm_eps",
)  # fmt: skip
YARN = {"type": "yarn", "factor": 8, "original_max_position_embeddings": 16, "beta_fast": 16, "beta_slow": 1}


@pytest.mark.slow  # it imports transformers; the recorded cases of tests/golden hold the same decoder
@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": None, "attention_bias": True, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        {"rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0}, "n_shared_experts": 3},
        {"rope_scaling": {**YARN, "mscale_all_dim": 0.7}, "first_k_dense_replace": 0, "n_group": 2, "topk_group": 2},
        {"rope_scaling": YARN, "norm_topk_prob": False, "first_k_dense_replace": 3},
    ],
)
def test_logits_are_those_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    fields = {**{name: latent_raw()[name] for name in FIELDS}, "vocab_size": 128, "max_position_embeddings": 256}
    torch.manual_seed(0)
    peer = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**{**fields, **changes}, attn_implementation="eager")
    ).eval()
    with torch.no_grad():
        for name, tensor in (*peer.named_parameters(), *peer.named_buffers()):
            if "inv_freq" not in name:
                tensor.normal_(1.0 if "norm" in name else 0.0, 0.2 if tensor.dim() < 2 else tensor.shape[-1] ** -0.5)
    peer.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    config = model_config_from_dict(
        {**raw, "architectures": ["KeyeVLMoeForConditionalGeneration"], "vision_config": None}
    )
    assert not config.unknown
    model, _ = load_model(tmp_path, config, dtype=torch.float32)
    ids = torch.randint(0, 128, (40,))
    with torch.no_grad():
        step = CachedStep([Span(0, 40, KVCache(3))], config.text)
        got = model.logits(model(model.embed(ids), torch.arange(40).expand(3, -1), step))
        torch.testing.assert_close(got, peer(ids[None]).logits[0], rtol=0, atol=1e-4)
