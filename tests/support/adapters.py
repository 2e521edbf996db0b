"""LoRA adapters by hand, in the layout that PEFT writes, and weights that hold the same numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from keye.models.keye import KeyeModel

PREFIX = "base_model.model."
#: Layers of the tiny model of every kind that an adapter may change.
LAYERS = (
    "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.v_proj",
    "model.layers.1.self_attn.sa_indexer.q_proj", "model.layers.1.mlp.gate", "lm_head",
)  # fmt: skip


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], *, r: int = 4, alpha: float = 8, prefix: str = PREFIX, **fields: Any
) -> Path:
    """The files of an adapter with these tensors, under the names of the model."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA", "r": r, "lora_alpha": alpha, "bias": "none", "use_rslora": False, "use_dora": False,
        "target_modules": ["q_proj"], "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
        "base_model_name_or_path": "tiny", "init_lora_weights": True, **fields,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    return folder


def random_pairs(model: KeyeModel, layers: tuple[str, ...] = LAYERS, *, r: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Pairs of matrices for layers of a model."""
    generator, tensors = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for name in layers:
        out, inner = model.get_submodule(name).weight.shape  # type: ignore[misc,union-attr]
        if name.endswith("embed_tokens"):
            tensors[f"{name}.lora_embedding_A"] = 0.3 * torch.randn(r, out, generator=generator)
            tensors[f"{name}.lora_embedding_B"] = 0.3 * torch.randn(inner, r, generator=generator)
        else:
            tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(r, inner, generator=generator)
            tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(out, r, generator=generator)
    return tensors


def add_products(model: KeyeModel, tensors: Mapping[str, Tensor], scale: float) -> None:
    """Adds `scale * B @ A` to the weights of a model, layer by layer."""
    with torch.no_grad():
        for name, a in tensors.items():
            module, _, half = name.partition(".lora_")
            if half == "A.weight":
                model.get_submodule(module).weight += scale * tensors[f"{module}.lora_B.weight"] @ a  # type: ignore[operator]
            elif half == "embedding_A":
                product = tensors[f"{module}.lora_embedding_B"] @ a
                model.get_submodule(module).weight += scale * product.t()  # type: ignore[operator]


def rslora(alpha: float, r: int) -> float:
    return alpha / math.sqrt(r)
