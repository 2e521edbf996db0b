"""Products of rows sorted by expert with the weights of their experts, in one launch, where there is a kernel for it.

The definition is a loop over experts, which `keye.models.moe` runs itself where `fast` says no: on processors, and in
training, since the kernel has no backward pass. `torch._grouped_mm` is not used: it takes bfloat16 only, and weights
and rows whose strides are multiples of 16 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from keye.ops.registry import backends


def fast(x: Tensor, weights: Tensor) -> bool:
    """Whether `matmul` takes these: rows on a card that the Triton backend serves, no gradients, one dtype."""
    if torch.is_grad_enabled() or x.dtype != weights.dtype or backends.of(x.device).name != "triton":
        return False
    from keye.ops import triton

    return triton.serves(x)


def matmul(x: Tensor, weights: Tensor, sizes: list[int]) -> Tensor:
    """`x` [N, K] sorted by expert, `weights` [E, K, M], `sizes` rows of each expert -> [N, M]."""
    from keye.ops import triton

    return triton.grouped_matmul(x, weights, sizes)
