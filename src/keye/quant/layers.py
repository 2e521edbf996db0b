"""Layers whose matrices are quantised, with the interfaces of the plain ones.

A loader puts them in the place of `nn.Linear`, `nn.Embedding` and `keye.models.moe.Experts`.

Legend: E experts, M outputs, K inputs, d model width, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from keye.ops import registry
from keye.ops.elementwise import PLAIN, Elementwise
from keye.ops.quantized import PackedWeight, QuantFormat, QuantTensor
from keye.quant.digest import digest


class QuantizedWeight(nn.Module):
    """A quantised matrix [..., M, K] in the place of a parameter `weight`: the state has `weight.codes`,
    `weight.scales` and, where the format has them, `weight.minima`.

    `shape` is that of the matrix, `dtype` that of the activations beside it, which `.to(dtype)` changes; codes and
    scales keep theirs. A weight that fast kernels read is `packed`: it then has no codes and scales of its own, and
    makes them again for a state and for another device.
    """

    codes: Tensor | None
    scales: Tensor | None
    minima: Tensor | None
    packed: PackedWeight | None = None
    _digest: str | None = None

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
        return torch.device("cpu") if self.codes is None else self.codes.device

    @property
    def tensor(self) -> QuantTensor:
        """Codes and scales: not copied, or unpacked."""
        if self.packed is not None:
            return self.packed.unpack()
        assert self.codes is not None and self.scales is not None
        return QuantTensor(self.format, self.shape, self.codes, self.scales, self.minima)

    @property
    def digest(self) -> str:
        """A hash of codes and scales, of large ones in part; also while they are packed."""
        if self.packed is not None:
            assert self._digest is not None
            return self._digest
        return digest(part for part in (self.codes, self.scales, self.minima) if part is not None)

    def pack(self) -> None:
        """Has fast kernels read the weight from now on, where there are any for it; takes as much memory again while it
        works."""
        if self.packed is None and (packed := registry.pack_weight(self.tensor)) is not None:
            self._digest, self.packed = self.digest, packed
            self.codes = self.scales = self.minima = None

    def adopt(self, packed: PackedWeight, own_digest: str) -> None:
        """Takes a packed weight of the same numbers, whose digest is known, in the place of codes and scales."""
        self.packed, self._digest = packed, own_digest
        self.codes = self.scales = self.minima = None

    def unpack(self) -> None:
        """Undoes `pack`."""
        if self.packed is not None:
            tensor, self.packed = self.packed.unpack(), None
            self.codes, self.scales, self.minima = tensor.codes, tensor.scales, tensor.minima

    def numel(self) -> int:
        """Numbers of the matrix."""
        return torch.Size(self.shape).numel()

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.format}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        """Moves between devices, and changes no bit: `nn.Module` would convert scales, and codes of fp8."""
        like = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.dtype = like.dtype
        if like.device != self.device:
            self.unpack()
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            tensor = self.packed.unpack()
            parts = ("codes", tensor.codes), ("scales", tensor.scales), ("minima", tensor.minima)
            destination.update({prefix + name: part for name, part in parts if part is not None})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)


def pack_weights(model: nn.Module) -> None:
    """Packs the quantised matrices of a model one by one; those that rows are looked up in stay as they are."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, QuantEmbedding)}
    for module in model.modules():
        if isinstance(module, QuantizedWeight) and id(module) not in tables:
            module.pack()


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
        rows, packed = x.reshape(-1, x.shape[-1]), self.weight.packed
        if packed is not None and not _needs_gradient(rows, self.bias):
            return packed.matmul(rows, self.bias).view(*x.shape[:-1], self.out_features)
        y = registry.multiply_quantized(rows, self.weight.tensor).view(*x.shape[:-1], self.out_features)
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
        assert weight.codes is not None and weight.scales is not None, "tables are not packed"
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

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor | None:
        """Tokens `x` [T, d] through their `chosen` experts int64 [T, K], summed with `weights` float32 [T, K], in one
        call; None where no kernel does so."""
        if _needs_gradient(x, weights):
            return None
        return registry.mix_packed_experts(x, weights, chosen, self.gate_up_proj.packed, self.down_proj.packed)

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        """`x` [rows, d] sorted by expert, `sizes` rows of each expert -> [rows, d]."""
        return self.project_down(self.elementwise.swiglu(self.project_up(x, sizes)), sizes)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, d, I."""
        return self.down_proj.shape  # type: ignore[return-value]

    def project_up(self, x: Tensor, sizes: list[int]) -> Tensor:
        """The first of the two products alone: [rows, d] -> [rows, 2I]."""
        return _multiply(x, self.gate_up_proj, sizes)

    def project_down(self, x: Tensor, sizes: list[int]) -> Tensor:
        """The second one: [rows, I] -> [rows, d]."""
        return _multiply(x, self.down_proj, sizes)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a product is part of a backward pass, which packed weights do not have."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _multiply(x: Tensor, weight: QuantizedWeight, sizes: list[int]) -> Tensor:
    if weight.packed is not None and not _needs_gradient(x):
        return weight.packed.grouped_matmul(x, sizes)
    return registry.multiply_quantized(x, weight.tensor, sizes)
