"""The DSA indexer of one decoder layer: which keys are worth attending to.

Legend: T tokens, J indexer heads, I indexer head dim, d model width. Names and numerics follow the official 2.0 code.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch import bfloat16 as bf16

from keye.config import TextConfig
from keye.models.layers import Layer, RMSNorm
from keye.ops.reference import hadamard_transform, quantize_fp8

#: `exact` keeps the dtype of the activations; `fp8` rounds queries and keys to e4m3 with power-of-two scales after the
#: Hadamard transform; `official` also rounds to bfloat16 at every point where the official code does.
Numerics = Literal["exact", "fp8", "official"]


class IndexerOutput(NamedTuple):
    """`q` [T, J, I], `k` [T, I] (one head shared by all), `gate` float32 [T, J] including the factor I ** -0.5."""

    q: Tensor
    k: Tensor
    gate: Tensor


class Indexer(Layer):
    """Scores I[t,s] = sum_j gate[t,j] relu(q[t,j] . k[s]); this module makes q, k and gate from hidden states."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        assert config.sparse is not None
        self.heads, self.dim = config.sparse.indexer_num_heads, config.sparse.indexer_head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.heads * (self.dim + 1), bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.dim, bias=False)
        self.q_norm = RMSNorm(self.dim, config.rms_norm_eps)
        self.k_norm = nn.LayerNorm(self.dim, eps=config.rms_norm_eps)
        self.numerics: Numerics = "exact"

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> IndexerOutput:
        """`x` [T, d] after input_layernorm; `cos`, `sin` float32 [T, I/2] of the indexer's own M-RoPE."""
        q, k, w = self.project(x, cos, sin)
        if self.numerics != "exact":
            # Scales are powers of two: multiplying them back in is exact, so the scores are those of the official code.
            q_values, q_scale = quantize_fp8(q)
            k_values, k_scale = quantize_fp8(k)
            q, k = (q_values * q_scale).to(q.dtype), (k_values * k_scale).to(k.dtype)
        return IndexerOutput(q, k, w.float() * self.dim**-0.5)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, J, I] and keys [T, I] after norm, M-RoPE and Hadamard, and raw gates [T, J]."""
        fused = self.q_proj(x)
        q, w = fused.split((self.heads * self.dim, self.heads), dim=-1)
        q = self.q_norm(q.unflatten(-1, (self.heads, self.dim)))
        k = F.layer_norm(
            self.k_proj(x).float(), (self.dim,), self.k_norm.weight.float(), self.k_norm.bias.float(), self.k_norm.eps
        ).to(x.dtype)
        if self.numerics == "official":
            q, k = _rotate_bf16(q.to(bf16), cos, sin), _rotate_bf16(k.to(bf16).unsqueeze(1), cos, sin)
        else:
            q, k = self.elementwise.rotate(q, cos, sin), self.elementwise.rotate(k.unsqueeze(1), cos, sin)
        if not self.training:  # orthonormal: it changes no score, only what quantisation sees
            q, k = hadamard_transform(q), hadamard_transform(k)
        return q, k.squeeze(1), w


def _rotate_bf16(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding with every product and sum rounded to bfloat16. `x` bfloat16 [T, heads, I]."""
    cos, sin = cos.to(bf16).unsqueeze(1), sin.to(bf16).unsqueeze(1)
    a, b = x.chunk(2, dim=-1)
    return F.pad(a * cos - b * sin, (0, b.shape[-1])) + F.pad(b * cos + a * sin, (a.shape[-1], 0))
