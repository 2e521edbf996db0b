"""Fresh weights for a model that is trained from nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from keye.chat.tokenizer import Tokenizer
from keye.config import KeyeConfig
from keye.models.keye import KeyeModel

EMBEDDING_STD = 0.5
HEAD_STD = 0.02
GATE_STD = 0.02


@torch.no_grad()
def fresh_model(config: KeyeConfig, seed: int) -> KeyeModel:
    """A float32 model: matrices with std 1/sqrt(fan_in), outputs of residual branches smaller by sqrt(2 * layers).

    The head starts as a scaled copy of the embeddings (they are trained apart): copying a token from the context to the
    answer then needs no learned translation.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)

    model = KeyeModel(config).float()
    layers = config.text.num_hidden_layers
    vision_layers = config.vision.num_hidden_layers
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            if name.endswith("bias"):
                parameter.zero_()
            continue
        fan_in = parameter.shape[1] if parameter.ndim in (2, 3) else parameter[0].numel()
        depth = vision_layers if name.startswith("visual.") else layers
        shrink = 1 / math.sqrt(2 * depth) if name.endswith(_RESIDUAL_OUTPUTS) else 1.0
        normal(parameter, shrink / math.sqrt(fan_in))
    normal(model.model.embed_tokens.weight, EMBEDDING_STD)
    if config.has_vision:
        normal(model.visual.vision_model.embeddings.position_embedding.weight, 0.3)
    if not config.text.tie_word_embeddings:
        model.lm_head.weight.copy_(model.model.embed_tokens.weight * (HEAD_STD / EMBEDDING_STD))
    for name, parameter in model.named_parameters():
        if name.endswith(".mlp.gate.weight"):
            normal(parameter, GATE_STD)
    return model


def number_tokens(tokenizer: Tokenizer) -> dict[str, dict[int, float]]:
    """Token ids of the whole numbers and of the tenths that are single tokens, with their values."""
    values = {"integer": {str(n): float(n) for n in range(1000)}, "fraction": {f".{n}": float(n) for n in range(10)}}
    return {
        kind: {ids[0]: value for text, value in texts.items() if len(ids := tokenizer.encode(text)) == 1}
        for kind, texts in values.items()
    }


@torch.no_grad()
def order_numbers(model: KeyeModel, numbers: Mapping[str, Mapping[int, float]]) -> None:
    """Gives number tokens embeddings that know their value: sines and cosines of it, at the usual size of embeddings.

    `numbers` maps the kind of number ("integer", "fraction") to token id -> value; each kind has dimensions of its own.
    Equal numbers then match and near ones are near from the first step, for rare numbers as for common ones.
    """
    table, head = model.model.embed_tokens.weight, model.lm_head.weight
    width, start = table.shape[1], 0
    for values in numbers.values():
        ids = torch.tensor(list(values))
        value = torch.tensor([values[i] for i in values])
        size = width // (2 * len(numbers)) // 2 * 2  # half of all dimensions go to numbers
        periods = torch.logspace(math.log10(2.5), math.log10(max(8.0, 2.0 * float(value.max()))), size // 2)
        angles = value[:, None] * (2 * math.pi / periods)
        features = torch.cat((angles.sin(), angles.cos()), dim=1)
        rows = torch.randn(len(ids), width, generator=torch.Generator().manual_seed(start)) * 0.2
        rows[:, start : start + size] += features * math.sqrt(width / size)
        rows *= EMBEDDING_STD / rows.pow(2).mean(1, keepdim=True).sqrt()
        table[ids] = rows.to(table.dtype)
        if not model.config.text.tie_word_embeddings:
            head[ids] = (rows * (HEAD_STD / EMBEDDING_STD)).to(head.dtype)
        start += size


_RESIDUAL_OUTPUTS = ("o_proj.weight", "out_proj.weight", "fc2.weight", "experts.down_proj", "mlp.down_proj.weight")
