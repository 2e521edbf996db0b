"""Small element-wise operations of the networks, each one function of tensors.

They are plain torch. A network calls them through an `Elementwise`, so that one model can use compiled versions
(training on a CPU gains most: `benchmarks/train_step.py` measures it) while other models of the process keep their
numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from keye.ops.reference import hadamard_transform


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


def index_query(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """`norm_rotate`, then a Hadamard transform. `x` [N, heads, D]."""
    return hadamard_transform(norm_rotate(x, weight, eps, cos, sin))


def index_key(x: Tensor, weight: Tensor, bias: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Layer norm in float32, rotary embedding, Hadamard transform. `x` [N, heads, D]."""
    y = F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)
    return hadamard_transform(rotate(y, cos, sin))


def weighted_sum(y: Tensor, weight: Tensor) -> Tensor:
    """Sums expert outputs `y` [T, K, d] with `weight` [T, K] in float32, in the dtype of `y`."""
    return (y.float() * weight.float().unsqueeze(-1)).sum(1).to(y.dtype)


class Elementwise(NamedTuple):
    """The versions that one model uses."""

    rms_norm: Callable[..., Tensor] = rms_norm
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]] = add_rms_norm
    swiglu: Callable[..., Tensor] = swiglu
    rotate: Callable[..., Tensor] = rotate
    norm_rotate: Callable[..., Tensor] = norm_rotate
    index_query: Callable[..., Tensor] = index_query
    index_key: Callable[..., Tensor] = index_key
    weighted_sum: Callable[..., Tensor] = weighted_sum


#: Eager torch.
PLAIN = Elementwise()


@cache
def compile_elementwise(device: torch.device) -> Elementwise | None:
    """Compiled versions, whose first calls take seconds; None where no compiler for `device` works. Those of the
    indexer stay plain: a difference in the last bit would select other keys."""
    compiled = [name for name in Elementwise._fields if not name.startswith("index_")]
    fused = PLAIN._replace(**{name: torch.compile(getattr(PLAIN, name), dynamic=True) for name in compiled})
    try:
        fused.rms_norm(torch.ones(2, 8, device=device), torch.ones(8, device=device), 1e-6)
    except (RuntimeError, OSError):  # what torch raises when its compiler fails or is missing
        return None
    return fused
