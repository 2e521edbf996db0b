"""Layers whose matrices are quantised, with the interfaces of the plain ones.

A loader puts them in the place of `nn.Linear`, `nn.Embedding` and `keye.models.moe.Experts`.

Legend: E experts, M outputs, K inputs, d model width, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from keye.ops import quantized
from keye.ops.elementwise import PLAIN, Elementwise
from keye.ops.quantized import QuantFormat, QuantTensor


class QuantizedWeight(nn.Module):
    """A quantised matrix [..., M, K] in the place of a parameter `weight`: the state has `weight.codes`,
    `weight.scales` and, where the format has them, `weight.minima`.

    `shape` is that of the matrix, `dtype` that of the activations beside it, which `.to(dtype)` changes; codes and
    scales keep theirs.
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor | None

    def __init__(
        self, form: QuantFormat, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.format, self.shape, self.dtype = form, tuple(shape), dtype
        empty = QuantTensor.empty(form, self.shape, device or torch.empty(0).device)
        self.register_buffer("codes", empty.codes)
        self.register_buffer("scales", empty.scales)
        self.register_buffer("minima", empty.minima)

    @classmethod
    def wrap(cls, tensor: QuantTensor, dtype: torch.dtype) -> QuantizedWeight:
        """A weight that holds these very tensors."""
        weight = cls(tensor.format, tensor.shape, dtype, "meta")
        weight.codes, weight.scales, weight.minima = tensor.codes, tensor.scales, tensor.minima
        return weight

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def tensor(self) -> QuantTensor:
        """Codes and scales, not copied."""
        return QuantTensor(self.format, self.shape, self.codes, self.scales, self.minima)

    def numel(self) -> int:
        """Numbers of the matrix."""
        return torch.Size(self.shape).numel()

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.format}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        """Moves between devices, and changes no bit: `nn.Module` would convert scales, and codes of fp8."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self


class QuantLinear(nn.Module):
    """`nn.Linear` with a quantised weight."""

    bias: nn.Parameter | None

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)

    @classmethod
    def like(cls, plain: nn.Linear, form: QuantFormat) -> QuantLinear:
        """One in the place of a plain layer, whose bias it takes; its numbers are not written yet."""
        weight = plain.weight
        return cls(QuantizedWeight(form, tuple(weight.shape), weight.dtype, weight.device), plain.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., M]."""
        y = quantized.matmul(x.reshape(-1, x.shape[-1]), self.weight.tensor).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantEmbedding(nn.Module):
    """`nn.Embedding` with a quantised table [V, d]."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        assert weight.format.rows == 1, "rows are looked up one by one"
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight = weight

    @classmethod
    def like(cls, plain: nn.Embedding, form: QuantFormat) -> QuantEmbedding:
        """One in the place of a plain table; its numbers are not written yet."""
        weight = plain.weight
        return cls(QuantizedWeight(form, tuple(weight.shape), weight.dtype, weight.device))

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., d] in the dtype of the activations."""
        weight, flat = self.weight, ids.reshape(-1)
        minima = None if weight.minima is None else weight.minima[flat]
        shape = (len(flat), self.embedding_dim)
        rows = QuantTensor(weight.format, shape, weight.codes[flat], weight.scales[flat], minima)
        return rows.dequantize(weight.dtype).view(*ids.shape, self.embedding_dim)


class QuantExperts(nn.Module):
    """`keye.models.moe.Experts` with quantised weights: `gate_up_proj` [E, 2I, d] and `down_proj` [E, d, I]. Unlike
    the official fused tensors these are [outputs, inputs]."""

    elementwise: Elementwise = PLAIN

    def __init__(self, gate_up_proj: QuantizedWeight, down_proj: QuantizedWeight) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj

    @classmethod
    def empty(
        cls, experts: int, dim: int, inner: int, form: QuantFormat, dtype: torch.dtype, device: torch.device
    ) -> QuantExperts:
        """One of `experts` experts between `dim` and `inner` numbers, which are not written yet."""
        shapes = (experts, 2 * inner, dim), (experts, dim, inner)
        return cls(*(QuantizedWeight(form, shape, dtype, device) for shape in shapes))

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        """`x` [rows, d] sorted by expert, `sizes` rows of each expert -> [rows, d]."""
        return self.project_down(self.elementwise.swiglu(self.project_up(x, sizes)), sizes)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, d, I."""
        return self.down_proj.shape  # type: ignore[return-value]

    def project_up(self, x: Tensor, sizes: list[int]) -> Tensor:
        """The first of the two products alone: [rows, d] -> [rows, 2I]."""
        return quantized.grouped_matmul(x, self.gate_up_proj.tensor, sizes)

    def project_down(self, x: Tensor, sizes: list[int]) -> Tensor:
        """The second one: [rows, I] -> [rows, d]."""
        return quantized.grouped_matmul(x, self.down_proj.tensor, sizes)
