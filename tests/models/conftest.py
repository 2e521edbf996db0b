"""Small models of the 2.0 architecture with random weights, made fresh for each test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from keye.cache.sequence import KVCache
from keye.config import KeyeConfig, model_config_from_dict
from keye.models.attention import CachedStep, Span
from keye.models.keye import KeyeModel

#: Two layers of every kind of part: M-RoPE with three sections, grouped heads, experts, an indexer that keeps 8 keys.
RAW_CONFIG: dict[str, Any] = {
    "architectures": ["KeyeVL2MoeForConditionalGeneration"],
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}, "max_position_embeddings": 4096,
    "attention_bias": False, "tie_word_embeddings": False, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "norm_topk_prob": True,
    "sa_config": {"topk": 8, "indexer_num_heads": 8, "indexer_head_dim": 16},
    "image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93,
    "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                      "image_size": 56, "patch_size": 14, "spatial_merge_size": 2},
}  # fmt: skip

MakeModel = Callable[..., KeyeModel]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def raw_config() -> dict[str, Any]:
    """A copy of the small `config.json`."""
    return dict(RAW_CONFIG)


@pytest.fixture
def small_config() -> KeyeConfig:
    return model_config_from_dict(RAW_CONFIG)


@pytest.fixture
def make_model() -> MakeModel:
    """`make_model(seed, **overrides)`: a small model in eval mode; overrides are fields of `config.json`."""

    def make(seed: int = 0, **overrides: Any) -> KeyeModel:
        model = KeyeModel(model_config_from_dict({**RAW_CONFIG, **overrides})).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "norm" in name and name.endswith("weight"):
                    parameter.copy_(1.0 + 0.1 * noise)
                else:
                    fan = parameter.shape[-2] if "experts" in name else parameter.shape[-1]
                    parameter.copy_(noise * fan**-0.5)
        return model

    return make


class Prompt:
    """Token ids [T] and positions [3, T] of one random sequence; the three axes differ as after an image."""

    def __init__(self, seed: int, length: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, 90, (length,), generator=generator)
        self.positions = torch.arange(length) + torch.randint(0, 3, (3, length), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)


def run_in_chunks(model: KeyeModel, prompt: Prompt, chunks: list[int], mode: Any = "sparse") -> Tensor:
    """Logits [T, V] of a prompt that is fed in chunks of the given lengths through one cache."""
    cache = KVCache(model.config.text.num_hidden_layers)
    logits, start = [], 0
    with torch.no_grad():
        for n in chunks:
            part = slice(start, start + n)
            step = CachedStep([Span(0, n, cache)], model.config.text, mode=mode)
            hidden = model(model.embed(prompt.ids[part]), prompt.positions[:, part], step)
            logits.append(model.logits(hidden))
            start += n
    assert start == len(prompt)
    return torch.cat(logits)


@pytest.fixture
def make_prompt() -> type[Prompt]:
    """`make_prompt(seed, length)`."""
    return Prompt


@pytest.fixture
def run_chunks() -> Callable[..., Tensor]:
    """`run_chunks(model, prompt, chunk_lengths, mode)` -> logits [T, V]."""
    return run_in_chunks


def random_chunks(seed: int, length: int) -> list[int]:
    """Random chunk lengths that sum to `length`, single tokens often among them."""
    generator = torch.Generator().manual_seed(seed)
    chunks: list[int] = []
    while (left := length - sum(chunks)) > 0:
        largest = (1, 3, 40, left)[int(torch.randint(0, 4, (), generator=generator))]
        chunks.append(min(left, 1 + int(torch.randint(0, largest, (), generator=generator))))
    return chunks


@pytest.fixture
def make_chunks() -> Callable[[int, int], list[int]]:
    """`make_chunks(seed, length)` -> chunk lengths."""
    return random_chunks
