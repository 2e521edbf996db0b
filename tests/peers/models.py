"""Small checkpoints with random weights, and the logits that keye computes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keye.cache.sequence import KVCache
from keye.config import load_model_config, model_config_from_dict
from keye.models.attention import CachedStep, Span
from keye.models.load import load_model, save_model
from keye.models.moe import Router
from keye.train.recipes.nano.initialise import fresh_model
from tests.support.tiny import NANO, tiny_raw


def small_folder(
    folder: Path, seed: int = 0, *, dense: bool = False, router_scale: float = 1, **fields: Any
) -> Path:  # fmt: skip
    """A checkpoint in bfloat16: 2.0, or `dense` 1.5, with `fields` of config.json in place of those of a tiny model."""
    raw = {**tiny_raw(), **fields}
    if dense:
        raw = {name: value for name, value in raw.items() if "expert" not in name and name != "sa_config"}
        raw |= {"architectures": ["KeyeVL1_5ForConditionalGeneration"]}
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copyfile(NANO / name, folder / name)
    (folder / "config.json").write_text(json.dumps(raw))
    model = fresh_model(model_config_from_dict(raw), seed)
    for module in model.modules():
        if isinstance(module, Router):
            module.weight.data *= router_scale
    save_model(model, folder, dtype=torch.bfloat16)
    return folder


def dense_logits(folder: Path, tokens: list[int]) -> np.ndarray:
    """float32 logits [tokens, vocabulary] with dense attention."""
    return logits_and_gaps(folder, tokens)[0]


def logits_and_gaps(folder: Path, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The same, and for each token the smallest distance over all layers between the router's logits of the last expert
    that it chooses and of the next one."""
    config = load_model_config(folder)
    config = config.without_indexer() if config.text.sparse is not None else config
    model, _ = load_model(folder, config, dtype=torch.float32, strict=False, quant="none")
    gaps, chosen = [torch.full((len(tokens),), torch.inf)], config.text.num_experts_per_tok
    for module in model.modules():
        if isinstance(module, Router):

            def note(_: object, __: object, scores: torch.Tensor) -> None:
                best = scores.topk(chosen + 1, dim=-1).values
                gaps.append(best[:, -2] - best[:, -1])

            module.register_forward_hook(note)
    span = Span(0, len(tokens), KVCache(config.text.num_hidden_layers))
    positions = torch.arange(len(tokens)).expand(3, -1)
    with torch.no_grad():
        hidden = model(model.embed(torch.tensor(tokens)), positions, CachedStep([span], config.text))
        return model.logits(hidden).numpy(), torch.stack(gaps).amin(0).numpy()


def tokens_of(count: int, vocabulary: int = 1700) -> list[int]:
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(1)).tolist()
