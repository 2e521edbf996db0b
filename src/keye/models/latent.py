"""Latent attention of a decoder layer, as DeepSeek-V3 has it. Module names and numerics are those of its official code.

Legend: T tokens of the step, H heads, N and R dimensions of a query without and with rotation, V those of a value, C
those of a latent, d model width.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from keye.config import TextConfig
from keye.models.attention import Rope, Step
from keye.models.layers import Layer, Linear, RMSNorm
from keye.ops.latent import LatentQuery

#: The official code norms latents with this whatever `rms_norm_eps` says.
LATENT_EPS: Final = 1e-6


class KeyValueExpansion(nn.Module):
    """The weight that makes keys and values of latents, [H * (N + V), C]: for decoding it is applied to queries and
    outputs instead, so it is no `nn.Linear` and is never quantised or sharded. It is 0.3 % of the layers' numbers."""

    def __init__(self, latent: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, latent))


class LatentAttention(Layer):
    """Queries, a latent and a rotary key for each token; attention by the step; output projection."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        assert config.latent is not None
        latent, d, bias = config.latent, config.hidden_size, config.attention_bias
        self.layer, self.heads, self.rank = layer, config.num_attention_heads, latent.kv_lora_rank
        self.nope_dim, self.rope_dim = latent.qk_nope_head_dim, latent.qk_rope_head_dim
        if latent.q_lora_rank is None:
            self.q_proj = Linear(d, self.heads * config.head_dim, bias=False)
        else:
            self.q_a_proj = Linear(d, latent.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(latent.q_lora_rank, LATENT_EPS)
            self.q_b_proj = Linear(latent.q_lora_rank, self.heads * config.head_dim, bias=False)
        self.has_query_latent = latent.q_lora_rank is not None
        self.kv_a_proj_with_mqa = Linear(d, self.rank + self.rope_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.rank, LATENT_EPS)
        self.kv_b_proj = KeyValueExpansion(self.rank, self.heads * (self.nope_dim + latent.v_head_dim))
        self.o_proj = Linear(self.heads * latent.v_head_dim, d, bias=bias)
        self.scale = config.head_dim**-0.5 * (config.yarn.score_scale if config.yarn is not None else 1.0)

    def forward(self, x: Tensor, rope: Rope, step: Step) -> Tensor:
        """[T, d] -> [T, d]."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.has_query_latent else self.q_proj(x)
        nope, rotary = q.unflatten(-1, (self.heads, -1)).split((self.nope_dim, self.rope_dim), dim=-1)
        latent, rope_k = self.kv_a_proj_with_mqa(x).split((self.rank, self.rope_dim), dim=-1)
        rotary, rope_k = self._rotate(rotary, rope), self._rotate(rope_k.unsqueeze(1), rope).squeeze(1)
        query = LatentQuery(nope, rotary, self.kv_b_proj.weight.unflatten(0, (self.heads, -1)), self.scale)
        return self.o_proj(step.attend_latent(self.layer, query, self.kv_a_layernorm(latent), rope_k).flatten(1))

    def _rotate(self, x: Tensor, rope: Rope) -> Tensor:
        """Rotates the pairs (2i, 2i + 1) of `x` [T, heads, R]. They come out as halves, in queries and keys alike."""
        return self.elementwise.rotate(x.unflatten(-1, (-1, 2)).mT.flatten(-2), rope.cos, rope.sin)
