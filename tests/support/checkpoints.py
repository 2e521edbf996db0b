"""Checkpoints in the layout of each release: the official configuration, narrowed, with the official tokenizer and
random weights; and data to fine-tune them on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from keye.config import load_model_config
from keye.models.keye import KeyeModel
from keye.models.load import save_model
from keye.releases import find_release
from tests.support.clips import write_clip
from tests.support.layouts import RELEASES

Shared = Callable[[str], Path]

_NARROW = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32,
    "num_key_value_heads": 1, "max_position_embeddings": 4096,
}  # fmt: skip
#: Replies; each is one token of the official tokenizer.
WORDS = ("red", "green", "blue", "grey", "left", "right", "up", "down", "one", "two")
_NARROW_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def official_checkpoint(release: str, folder: Path, shared: Shared, *, seed: int = 0, topk: int = 48) -> Path:
    """A loadable folder of "preview", "1.5" or "2.0", in bfloat16."""
    tokens = shared(f"checkpoints/{RELEASES['preview']}")
    raw = json.loads((shared(f"checkpoints/{RELEASES[release]}") / "config.json").read_text())
    raw |= _NARROW
    raw["rope_scaling"] = {"type": "mrope", "mrope_section": [4, 6, 6]}
    raw["vision_config"] |= _NARROW_VISION
    if release == "2.0":
        raw |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        raw["sa_config"] |= {"indexer_num_heads": 2, "indexer_head_dim": 16, "topk": topk}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    names = ("tokenizer.json", "tokenizer_config.json") + (
        ("preprocessor_config.json",) if release == "preview" else ()
    )
    for name in names:
        shutil.copyfile(tokens / name, folder / name)
        (folder / name).chmod(0o644)
    _add_tokens(folder / "tokenizer.json", find_release(release).official_token_ids)
    if release == "preview":
        shutil.copyfile(tokens / "chat_template.json", folder / "chat_template.json")
    else:  # the template is Preview's, whose system message is its own
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    save_model(random_model(folder, seed), folder, dtype=torch.bfloat16)
    return folder


def random_model(folder: Path, seed: int) -> KeyeModel:
    """Random float32 weights for the configuration of a folder."""
    generator = torch.Generator().manual_seed(seed)
    model = KeyeModel(load_model_config(folder)).float()
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2:
                    std = 1.0 if isinstance(module, nn.Embedding) else parameter.shape[-1] ** -0.5
                    if module is getattr(model, "lm_head", None):
                        std = 0.6  # a head that can be sure of one of 150,000 tokens
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
                elif name == "bias":
                    parameter.zero_()
    return model


def _add_tokens(file: Path, ids: Any) -> None:
    """Adds the marks of a release that Preview's tokenizer lacks."""
    raw = json.loads(file.read_text())
    known = {entry["content"] for entry in raw["added_tokens"]}
    form = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    raw["added_tokens"] += [{"id": i, "content": text, **form} for text, i in ids.items() if text not in known]
    file.write_text(json.dumps(raw))


def write_samples(folder: Path, count: int = 50) -> Path:
    """Conversations about texts, images, videos, and last three videos of unequal lengths; the replies are short."""
    folder.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number in range(count - 1):
        reply = WORDS[number * 7 % len(WORDS)]
        row: dict[str, Any] = {"messages": [{"role": "user", "content": f"what is number {number}?"},
                                            {"role": "assistant", "content": reply}]}  # fmt: skip
        if number % 3 == 1:
            Image.new("RGB", (56, 84), (number * 5, 255 - number * 5, 99)).save(folder / f"{number}.png")
            row["images"] = [f"{number}.png"]
            row["messages"][0]["content"] = "<image>" + row["messages"][0]["content"]
        elif number % 3 == 2 and number < 24:  # 2 to 6 frames of two a second; no two alike
            write_clip(
                folder / f"{number}.mp4", frames=3 + 3 * (number % 4), fps=4, size=(56, 56 if number < 12 else 84)
            )
            row["videos"] = [f"{number}.mp4"]
            row["messages"][0]["content"] = "<video>" + row["messages"][0]["content"]
        rows.append(row)
    rows.append({"videos": ["8.mp4", "2.mp4", "11.mp4"], "messages": [
        {"role": "user", "content": "first <video> then <video> last <video> which is longest?"},
        {"role": "assistant", "content": "the third"},
    ]})  # fmt: skip
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
