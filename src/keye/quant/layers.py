"""Layers whose matrices are quantised, with the interfaces of the plain ones.

A loader puts them in the place of `nn.Linear`, `nn.Embedding` and `keye.models.moe.Experts`.

Legend: E experts, M outputs, K inputs, d model width, I expert width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from keye.ops import registry
from keye.ops.elementwise import PLAIN, Elementwise
from keye.ops.quantized import PackedWeight, QuantFormat, QuantTensor
from keye.quant.digest import digest

#: Numbers of a matrix that a backward pass holds at once, in rows that packed weights keep together.
TILE_NUMBERS: Final = 1 << 22
TILE_ROWS: Final = 32


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

    def tiles(self, expert: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """The numbers of a matrix [M, K], or of one expert's, a tile of rows at a time: the rows, and their numbers
        [rows, K] in the dtype of the activations."""
        form, (M, K), packed = self.format, self.shape[-2:], self.packed
        step = max(1, TILE_NUMBERS // K // TILE_ROWS) * math.lcm(TILE_ROWS, form.rows)
        for begin in range(0, M, step):
            rows = slice(begin, min(M, begin + step))
            if packed is not None:
                part = packed.unpack_rows(expert or 0, rows)
            else:
                part = (self.tensor if expert is None else self.tensor[expert])[rows]
            yield rows, part.dequantize(self.dtype)

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
        rows, bias = x.reshape(-1, x.shape[-1]), self.bias
        if _needs_gradient(rows, bias):
            y = Product.apply(rows, self.weight, None, bias)
        else:
            y = _multiply(rows, self.weight, None, bias)
        return y.view(*x.shape[:-1], self.out_features)

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
            return Mixture.apply(x, weights, chosen, self) if self.gate_up_proj.packed is not None else None
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
        return Product.apply(x, self.gate_up_proj, sizes, None)

    def project_down(self, x: Tensor, sizes: list[int]) -> Tensor:
        """The second one: [rows, I] -> [rows, d]."""
        return Product.apply(x, self.down_proj, sizes, None)


class Product(torch.autograd.Function):
    """`x @ weight.T + bias` of a quantised weight, with the gradients of `x` and `bias`: kernels compute the product,
    and rounding of activations in them counts as none. The backward pass holds one tile of numbers at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight, sizes: list[int] | None, bias: Tensor | None) -> Tensor:
        """Rows [N, K] -> [N, M]; of experts, rows that are sorted by expert, `sizes` of each."""
        ctx.weight, ctx.sizes = weight, sizes
        return _multiply(x, weight, sizes, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        to_bias = grad.sum(0) if ctx.needs_input_grad[3] else None
        if not ctx.needs_input_grad[0]:
            return None, None, None, to_bias
        if ctx.sizes is None:
            return _turn_back(grad, ctx.weight, None), None, None, to_bias
        parts = [_turn_back(part, ctx.weight, e) for e, part in enumerate(grad.split(ctx.sizes)) if part.shape[0]]
        empty = grad.new_empty(0, ctx.weight.shape[-1])
        return torch.cat(parts) if parts else empty, None, None, None


class Mixture(torch.autograd.Function):
    """`QuantExperts.mix` with the gradients of tokens and weights. Nothing is kept for the backward pass but these: it
    computes the inner numbers again, one expert at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, chosen: Tensor, experts: QuantExperts) -> Tensor:
        ctx.experts = experts
        ctx.save_for_backward(x, weights, chosen)
        mixed = experts.mix(x, weights, chosen)
        assert mixed is not None
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weights, chosen = ctx.saved_tensors
        up, down, K = ctx.experts.gate_up_proj, ctx.experts.down_proj, chosen.shape[1]
        flat = chosen.flatten()
        order, counts = flat.argsort(stable=True), torch.bincount(flat, minlength=up.shape[0]).tolist()
        dx, dweights = torch.zeros_like(x, dtype=torch.float32), torch.zeros_like(weights).flatten()
        for e, slots in enumerate(order.split(counts)):
            if not len(slots):
                continue
            tokens, share = slots // K, weights.flatten()[slots].unsqueeze(1)
            inner = torch.cat([x[tokens] @ tile.t() for _, tile in up.tiles(e)], dim=1)
            gate, value = inner.float().chunk(2, dim=1)
            open_, back = gate.sigmoid(), _turn_back(grad[tokens], down, e).float()
            dweights[slots] = (back * gate * open_ * value).sum(1).to(dweights.dtype)
            back *= share
            dgate = back * value * open_ * (1 + gate * (1 - open_))
            both = torch.cat((dgate, back * gate * open_), dim=1).to(x.dtype)
            dx.index_add_(0, tokens, _turn_back(both, up, e).float())
        return dx.to(x.dtype), dweights.view_as(weights), None, None


def _turn_back(grad: Tensor, weight: QuantizedWeight, expert: int | None) -> Tensor:
    """`grad @ weight` [N, K] for gradients [N, M] of its products, tile by tile."""
    total: Tensor | None = None
    for rows, tile in weight.tiles(expert):
        part = grad[:, rows] @ tile.to(grad.dtype)
        if total is None and rows.stop == grad.shape[1]:
            return part
        total = part.float() if total is None else total.add_(part)
    assert total is not None
    return total.to(grad.dtype)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a product is part of a backward pass."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


@torch.no_grad()
def _multiply(x: Tensor, weight: QuantizedWeight, sizes: list[int] | None, bias: Tensor | None = None) -> Tensor:
    """The product by the kernels."""
    packed = weight.packed
    if packed is not None:
        return packed.matmul(x, bias) if sizes is None else packed.grouped_matmul(x, sizes)
    y = registry.multiply_quantized(x, weight.tensor, sizes)
    return y if bias is None else y + bias
