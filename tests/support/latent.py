"""A tiny checkpoint of Keye-VL-671B with random weights, in the layout of the official files: one tensor for each
expert, float8 with scales where that is asked for, shards with an index, a draft layer, a chat template of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from keye.config import model_config_from_dict
from keye.models.keye import KeyeModel
from keye.weights.names import file_tensors
from tests.support.tiny import NANO, tiny_raw

#: As such a template may look; it writes the token that begins a prompt by name, as DeepSeek's does.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BLOCK = (16, 16)


def latent_raw(**changes: Any) -> dict[str, Any]:
    """config.json with three narrow layers, the first dense, and YaRN."""
    base = tiny_raw()
    shared = ("vocab_size", "vision_config", "image_token_id", "video_token_id", "vision_start_token_id",
            "vision_end_token_id", "eos_token_id", "max_position_embeddings")  # fmt: skip
    return {
        **{name: base[name] for name in shared},
        "architectures": ["KeyeVLMoeForConditionalGeneration"], "torch_dtype": "bfloat16",
        "hidden_size": 64, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 12, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": False,
        "attention_bias": False, "ep_size": 1, "num_nextn_predict_layers": 1, "aux_loss_alpha": 0.001, "seq_aux": True,
        "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 16, "beta_fast": 32,
                         "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
        **changes,
    }  # fmt: skip


def latent_model(seed: int = 0, **changes: Any) -> KeyeModel:
    """Such a model in float32, with random weights that make it choose between tokens."""
    model = KeyeModel(model_config_from_dict(latent_raw(**changes))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.1 * noise)
            else:
                fan = tensor.shape[-2] if ".experts." in name else tensor.shape[-1]
                tensor.copy_(noise * (0.1 if tensor.dim() < 2 else fan**-0.5))
    return model


def official_tensors(model: KeyeModel, *, float8: bool = False) -> dict[str, Tensor]:
    """The tensors of the official files: experts one by one, a draft layer, and with `float8` the matrices of layers
    in blocks with their scales."""
    tensors = {
        name: view(tensor).contiguous()
        for own, tensor in model.state_dict().items()
        for name, view in file_tensors(own, tuple(tensor.shape), {own.rpartition(".")[0]})
    }
    layers = model.config.text.num_hidden_layers
    for name in ("input_layernorm.weight", "mlp.gate.weight"):
        tensors[f"model.layers.{layers}.{name}"] = tensors[f"model.layers.{layers - 1}.{name}"].clone()
    tensors[f"model.layers.{layers}.eh_proj.weight"] = torch.zeros(64, 128)
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stays = not name.startswith("model.layers.") or tensor.dim() < 2 or ".mlp.gate." in name
        if float8 and not stays:
            out[name], out[f"{name}_scale_inv"] = to_float8(tensor, BLOCK)
        else:
            out[name] = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
    return out


def to_float8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Codes e4m3 of the shape of `weight` and float32 scales, one for each block; the last ones may be short."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[part].abs().max().clamp_min(1e-12) / 448
            codes[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def latent_folder(folder: Path, *, float8: bool = False, seed: int = 0, **changes: Any) -> Path:
    """A checkpoint folder in two shards."""
    folder.mkdir(parents=True)
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(NANO / name, folder / name)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    raw = latent_raw(**changes)
    if float8:
        raw["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = official_tensors(latent_model(seed, **changes), float8=float8)
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
