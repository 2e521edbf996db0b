"""A model of the architecture of keye-nano, small enough to run in a test: a folder and its parts."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from keye.chat.tokenizer import Tokenizer
from keye.config import KeyeConfig, load_processor_config, model_config_from_dict
from keye.engine.runtime import Runtime
from keye.media.processor import Processor
from keye.models.load import save_model
from keye.train.recipes.nano.initialise import fresh_model

NANO = Path(__file__).parents[2] / "configs" / "nano"


def tiny_raw(topk: int = 16) -> dict[str, Any]:
    """config.json with two narrow layers."""
    raw = json.loads((NANO / "config.json").read_text())
    raw |= {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "num_experts": 4, "moe_intermediate_size": 32,
    }  # fmt: skip
    raw["rope_scaling"] = {"type": "mrope", "mrope_section": [4, 6, 6]}
    raw["sa_config"] = {"indexer_num_heads": 2, "indexer_head_dim": 16, "indexer_num_kv_heads": 1, "topk": topk}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    raw["vision_config"] |= vision
    return raw


def tiny_config(topk: int = 16) -> KeyeConfig:
    return model_config_from_dict(tiny_raw(topk))


def tiny_model(seed: int = 0, topk: int = 16) -> Runtime:
    """Fresh weights, float32."""
    model = fresh_model(tiny_config(topk), seed).eval()
    return Runtime.create("tiny", model, Tokenizer.from_file(NANO), Processor(load_processor_config(NANO)))


def tiny_folder(folder: Path, *, weights: bool = True) -> Path:
    """A model folder; without `weights` only what a fresh training run starts from."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(NANO / name, folder / name)
    (folder / "config.json").write_text(json.dumps(tiny_raw()))
    if weights:
        save_model(fresh_model(tiny_config(), 0), folder, dtype=torch.bfloat16)
    return folder
