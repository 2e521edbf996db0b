"""Building blocks that several networks share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from keye.ops import registry
from keye.ops.elementwise import PLAIN, Elementwise


class Layer(nn.Module):
    """A module that calls element-wise operations: the plain ones, unless its model has others."""

    elementwise: Elementwise = PLAIN


class RMSNorm(Layer):
    """Root-mean-square norm over the last dimension with a learned weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return self.elementwise.rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """A projection of the decoder; few rows, as in decoding, are multiplied by a faster kernel where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return registry.linear(x, self.weight, self.bias)


def embedding(count: int, dim: int) -> nn.Embedding:
    """An embedding table left unfilled: on the meta device torch would import its compiler to fill it, for a second."""
    return nn.Embedding.from_pretrained(torch.empty(count, dim), freeze=False)


class MLP(nn.Module):
    """Dense SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, inner, bias=False)
        self.up_proj = Linear(dim, inner, bias=False)
        self.down_proj = Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, dim] -> [T, dim]."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
