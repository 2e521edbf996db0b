"""Random checkpoints of the architecture of 2.0, and what keye computes with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import keye
from keye.cache.sequence import KVCache
from keye.config import model_config_from_dict
from keye.engine.prompt import Prompt
from keye.hub import asset
from keye.models.attention import AttentionMode, CachedStep, Span
from keye.models.load import save_model
from keye.train.recipes.nano.initialise import fresh_model

#: Small enough that a prompt of a few dozen tokens has many more keys.
TOPK = 16


def random_checkpoint(folder: Path, *, moe: bool = True, topk: int | None = TOPK) -> Path:
    """A model of two layers in float32, with experts or dense, with an indexer or (`topk` None) without."""
    folder.mkdir(parents=True)
    raw: dict[str, Any] = json.loads((asset("nano") / "config.json").read_text())
    raw |= {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4, "moe_intermediate_size": 64,
        "torch_dtype": "float32", "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "sa_config": {"indexer_num_heads": 2, "indexer_head_dim": 16, "indexer_num_kv_heads": 1, "topk": topk},
    }  # fmt: skip
    raw["vision_config"] |= {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2
    }  # fmt: skip
    if not moe:
        raw["architectures"] = ["KeyeVL2ForConditionalGeneration"]
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
            del raw[name]
    if topk is None:
        del raw["sa_config"]
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(asset("nano") / name, folder / name)
    (folder / "config.json").write_text(json.dumps(raw))
    model = fresh_model(model_config_from_dict(raw), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lm_head.weight", ".sa_indexer.q_proj.weight", "self_attn.q_norm.weight")):
                parameter.mul_(4)  # sharper: what is attended to then decides more of the answer
    save_model(model, folder)
    return folder


@torch.inference_mode()
def log_probabilities(own: keye.Keye, prompt: Prompt, reply: list[int], mode: AttentionMode = "sparse") -> Tensor:
    """Of every token after the first of a prompt with this reply, float32 [tokens - 1], by keye's own network."""
    model = own.model
    ids = torch.cat((prompt.token_ids, torch.tensor(reply, dtype=torch.int64)))
    after = torch.arange(prompt.next_position, prompt.next_position + len(reply)).expand(3, -1)
    vision = prompt.vision()
    x = model.embed(ids, None if vision is None else model.encode_vision(*vision))
    span = Span(0, len(ids), KVCache(model.config.text.num_hidden_layers))
    hidden = model(x, torch.cat((prompt.position_ids, after), dim=1), CachedStep([span], model.config.text, mode=mode))
    return model.logits(hidden[:-1]).log_softmax(-1).gather(1, ids[1:, None])[:, 0]
