"""Small element-wise operations of the networks, each one function of tensors.

They are plain torch; `fuse()` replaces them by compiled versions, which training on a CPU gains from most:
`benchmarks/train_step.py` measures it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32, in the dtype of `x`."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the new residual stream `x + delta` and its RMSNorm."""
    y = x + delta
    return y, rms_norm(y, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for `gate_up` [..., 2I] with the gate in the first half. Returns [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, NeoX layout (dimension i pairs with i + D/2), in float32, in the dtype of `x`.

    `x` [N, heads, D]; `cos`, `sin` float32 [N, D/2].
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def norm_rotate(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """The query/key norm over the head dimension followed by the rotary embedding. `x` [N, heads, D]."""
    return rotate(rms_norm(x, weight, eps), cos, sin)


def masked_softmax(logits: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(logits * scale) where `mask` (broadcastable bool) is true, in float32, in the dtype of `logits`."""
    return (logits.float() * scale).masked_fill(~mask, -1e30).softmax(-1).to(logits.dtype)


def weighted_sum(y: Tensor, weight: Tensor) -> Tensor:
    """Sums expert outputs `y` [T, K, d] with `weight` [T, K] in float32, in the dtype of `y`."""
    return (y.float() * weight.float().unsqueeze(-1)).sum(1).to(y.dtype)


class Table:
    """The versions in use. Networks call `table.rms_norm(...)`; `fuse` swaps every entry at once."""

    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    swiglu: Callable[..., Tensor]
    rotate: Callable[..., Tensor]
    norm_rotate: Callable[..., Tensor]
    masked_softmax: Callable[..., Tensor]
    weighted_sum: Callable[..., Tensor]

    def __init__(self) -> None:
        self.fused = False
        self.plain()

    def plain(self) -> None:
        """Back to eager torch."""
        for function in _FUNCTIONS:
            setattr(self, function.__name__, function)
        self.fused = False

    def fuse(self) -> bool:
        """Compiles every entry; the first calls take seconds. Without a working C++ compiler nothing changes: False."""
        for function in _FUNCTIONS:
            setattr(self, function.__name__, torch.compile(function, dynamic=True))
        try:
            self.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)
        except (RuntimeError, OSError):  # what torch raises when its compiler fails or is missing
            self.plain()
            return False
        self.fused = True
        return True


_FUNCTIONS = (rms_norm, add_rms_norm, swiglu, rotate, norm_rotate, masked_softmax, weighted_sum)
table = Table()
