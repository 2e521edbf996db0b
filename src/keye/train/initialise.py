"""Fresh weights for a model that is trained from nothing."""

from __future__ import annotations

import math

import torch
from torch import nn

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
    normal(model.visual.vision_model.embeddings.position_embedding.weight, 0.3)
    if not config.text.tie_word_embeddings:
        model.lm_head.weight.copy_(model.model.embed_tokens.weight * (HEAD_STD / EMBEDDING_STD))
    for module in model.modules():
        if isinstance(module, nn.Linear) and getattr(module, "out_features", 0) == config.text.num_experts:
            normal(module.weight, GATE_STD)
    return model


_RESIDUAL_OUTPUTS = ("o_proj.weight", "out_proj.weight", "fc2.weight", "experts.down_proj", "mlp.down_proj.weight")
