"""Quantised weights in a model: which layers take them, and filling them from floating-point tensors or from codes.

Legend: E experts, M outputs, K inputs, I expert width, d model width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from keye.config import KeyeConfig
from keye.errors import KeyeError
from keye.models.moe import Experts
from keye.ops.quantized import QuantFormat, QuantTensor
from keye.quant.layers import QuantEmbedding, QuantExperts, QuantizedWeight, QuantLinear
from keye.quant.policy import UNLISTED, Policy
from keye.quant.search import Loss, QuantError, quantize_into
from keye.weights.names import file_tensors
from keye.weights.source import TensorSource, WeightsError

#: Bytes of a floating-point tensor that are read and quantised at once.
PIECE_BYTES: Final = 16 * 2**20
#: The same of one whose codes are taken over: buffers of this size stay in the processor's caches.
CODES_BYTES: Final = 2 * 2**20
#: The format of weights whose pieces a file has in several: experts of which each has its own.
_MIXED: Final = QuantFormat("int8", 32)

#: Names of the dtypes of codes and scales, in safetensors and in torch.
_NAMES: Final = {
    torch.uint8: ("U8", "uint8"), torch.int8: ("I8", "int8"), torch.float8_e4m3fn: ("F8_E4M3", "float8_e4m3fn"),
    torch.bfloat16: ("BF16", "bfloat16"), torch.float32: ("F32", "float32"),
}  # fmt: skip

#: What each input of a matrix counts for, by the official name of its tensor: float32 [K], or [E, K] for experts.
Importance = Mapping[str, Tensor]
Work = Callable[[], object]


@dataclass(frozen=True)
class Fill:
    """A tensor of the files and what it fills: `work` reads it into the place of `own`, the name of a tensor of the
    model's state or of a quantised weight."""

    name: str
    own: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    work: Callable[[TensorSource, Any], Iterator[Work]]

    def mismatch(self, source: TensorSource) -> str | None:
        """How the tensor differs from what is wanted, None where it does not: its shape, and where codes and scales
        are wanted its dtype."""
        if source.shape != self.shape:
            return f"{self.name} is {list(source.shape)} instead of {list(self.shape)}"
        if self.dtype is not None and source.dtype not in _NAMES[self.dtype]:
            return f"{self.name} is {source.dtype} instead of {_NAMES[self.dtype][0]}"
        return None


def quantize_layer(layer: nn.Module, form: QuantFormat) -> nn.Module:
    """The quantised layer in the place of a plain one, on its device; its numbers are not written yet."""
    if isinstance(layer, nn.Linear):
        return QuantLinear.like(layer, form)
    if isinstance(layer, nn.Embedding):
        return QuantEmbedding.like(layer, form)
    assert isinstance(layer, Experts)
    (experts, dim, twice), up = layer.gate_up_proj.shape, layer.gate_up_proj
    return QuantExperts.empty(experts, dim, twice // 2, form, up.dtype, up.device)


def stored_policy(config: KeyeConfig) -> Policy | None:
    """The formats of a folder that keye quantised, None for others."""
    section = config.raw.get("quantization_config")
    return Policy.from_dict(section) if isinstance(section, Mapping) and section.get("quant_method") == "keye" else None


def keep_formats(
    name: str, layer: nn.Module, tensors: Mapping[str, TensorSource], per_expert: Collection[str]
) -> nn.Module:
    """The layer that keeps its matrix or experts as the files have them: the plain one for floating-point numbers."""
    if not isinstance(layer, Experts):
        source = tensors.get(f"{name}.weight")
        return layer if source is None or source.format is None else quantize_layer(layer, source.format)
    if name not in per_expert:
        return layer
    experts = range(layer.gate_up_proj.shape[0])
    up, down = (
        _common_format(tensors, [f"{name}.{e}.{leaf}_proj.weight" for e in experts for leaf in leaves])
        for leaves in (("gate", "up"), ("down",))
    )
    if up is None and down is None:
        return layer
    if up is not None and (layer.gate_up_proj.shape[2] // 2) % up.rows:
        return layer  # a block of rows would belong to gate and up
    plain = quantize_layer(layer, up or down or _MIXED)
    assert isinstance(plain, QuantExperts)
    gate_up, last = plain.gate_up_proj, plain.down_proj
    return QuantExperts(
        QuantizedWeight(up or _MIXED, gate_up.shape, gate_up.dtype, gate_up.device),
        QuantizedWeight(down or _MIXED, last.shape, last.dtype, last.device),
    )


def _common_format(tensors: Mapping[str, TensorSource], names: Iterable[str]) -> QuantFormat | None:
    """The format of all these tensors; `_MIXED` where they have several, None where none is quantised."""
    formats = {tensors[name].format for name in names if name in tensors}
    return (formats.pop() if formats else None) if len(formats) < 2 else _MIXED


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The quantised weights of a model by the official names of their tensors; one that is tied, once."""
    return {name: weight for name, weight in model.named_modules() if isinstance(weight, QuantizedWeight)}


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model without its quantised weights."""
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, QuantizedWeight):  # whose state may have to be unpacked
            module._save_to_state_dict(state, name + "." if name else "", keep_vars=False)
    return state


def check_listed(model: nn.Module, policy: Policy) -> None:
    """`KeyeError` where more than `UNLISTED` of a quantised model's numbers stay in high precision without being listed
    to."""
    plain = {name: tensor.numel() for name, tensor in plain_state(model).items()}
    left = {name: count for name, count in plain.items() if not policy.place_of(name)[1]}
    total = sum(plain.values()) + sum(weight.numel() for weight in quantized_weights(model).values())
    if sum(left.values()) > UNLISTED * total:
        largest = max(left, key=lambda name: left[name])
        share = sum(left.values()) / total
        raise KeyeError(f"{share:.1%} of the weights would not be quantised, {largest} among them, and no part is set "
                        "to keep them")  # fmt: skip


def plain_fills(own: str, shape: tuple[int, ...], per_expert: Collection[str]) -> Iterator[Fill]:
    """What fills a tensor that is not quantised."""
    example = torch.empty(shape, device="meta")
    for name, view in file_tensors(own, shape, per_expert):
        yield Fill(name, own, tuple(view(example).shape), None, lambda source, to, view=view: source.pieces(view(to)))  # type: ignore[misc]


def weight_fills(
    own: str, weight: QuantTensor, tensors: Collection[str], per_expert: Collection[str],
    importance: Importance | None = None, observe: Callable[[str, Loss], object] | None = None,
) -> Iterator[Fill]:  # fmt: skip
    """What fills a quantised weight: its codes and scales where the files have them, else numbers, which are quantised.
    `observe` is called with what that loses, from several threads."""
    if f"{own}.codes" in tensors:
        for leaf in ("codes", "scales", "minima")[: 3 if weight.format.has_minimum else 2]:
            buffer: Tensor = getattr(weight, leaf)
            yield Fill(
                f"{own}.{leaf}", own, tuple(buffer.shape), buffer.dtype,
                lambda source, to, leaf=leaf: source.pieces(getattr(to, leaf)),  # type: ignore[misc]
            )  # fmt: skip
        return
    counts = None if importance is None else importance.get(own)
    for name, shape, take in _matrices(own, weight.shape, per_expert):
        quantise = _Quantise(name, counts, observe)
        yield Fill(name, own, shape, None, lambda source, to, run=quantise, take=take: run.work(source, to, *take))  # type: ignore[misc]


_Take = tuple[int | None, slice | None]


def _matrices(
    own: str, shape: tuple[int, ...], per_expert: Collection[str]
) -> Iterator[tuple[str, tuple[int, ...], _Take]]:
    """Tensors of the files that make up a quantised matrix: name, shape, and the expert and the rows of it that they
    are; (None, None) is the whole, which is transposed for fused experts."""
    module, _, leaf = own.rpartition(".")
    if len(shape) == 2:
        yield own, shape, (None, None)
    elif module not in per_expert:
        yield own, (shape[0], shape[2], shape[1]), (None, None)
    else:
        E, M, K = shape
        for e in range(E):
            if leaf == "down_proj":
                yield f"{module}.{e}.down_proj.weight", (M, K), (e, None)
            else:
                yield f"{module}.{e}.gate_proj.weight", (M // 2, K), (e, slice(0, M // 2))
                yield f"{module}.{e}.up_proj.weight", (M // 2, K), (e, slice(M // 2, M))


@dataclass(frozen=True)
class _Quantise:
    """The work that turns a tensor of the files into a part of a quantised matrix, piece by piece."""

    name: str
    importance: Tensor | None
    observe: Callable[[str, Loss], object] | None

    def work(self, source: TensorSource, to: QuantTensor, expert: int | None, rows: slice | None) -> Iterator[Work]:
        counts = self.importance
        if expert is not None:
            to = to[expert]
            counts = counts[expert] if counts is not None and counts.dim() > 1 else counts
        to = to if rows is None else to[rows]
        if len(to.shape) == 3:
            for e in range(to.shape[0]):
                own = counts[e] if counts is not None and counts.dim() > 1 else counts
                yield lambda e=e, own=own: self._numbers(source.part(e, e + 1), to[e], own, transposed=True)  # type: ignore[misc]
        elif source.format == to.format and to.format.rows > 1:
            yield lambda: to.copy_(source.quantized())
        else:
            piece = CODES_BYTES if source.format == to.format else PIECE_BYTES
            step = max(1, piece // (4 * to.shape[1]) // to.format.rows) * to.format.rows
            for begin in range(0, to.shape[0], step):
                end = min(begin + step, to.shape[0])
                view = to[begin:end] if to.format.rows == 1 else to
                assert to.format.rows == 1 or step >= to.shape[0], "blocks of rows share a scale"
                fill = self._codes if source.format == to.format else self._numbers
                yield lambda b=begin, e=end, view=view, fill=fill: fill(source.part(b, e), view, counts)  # type: ignore[misc]

    def _codes(self, source: TensorSource, to: QuantTensor, counts: Tensor | None) -> None:
        to.copy_(source.quantized())

    def _numbers(self, source: TensorSource, to: QuantTensor, counts: Tensor | None, transposed: bool = False) -> None:
        dtype = torch.bfloat16 if source.dtype in ("BF16", "bfloat16") else torch.float32
        numbers = torch.empty(source.shape, dtype=dtype)
        for piece in source.pieces(numbers):
            piece()
        if transposed:
            numbers = numbers[0].t()
        loss = None if self.observe is None else Loss()
        try:
            quantize_into(to, numbers.to(to.codes.device), counts, loss)
        except QuantError:
            raise WeightsError(f"{self.name} holds NaN or infinite numbers, which cannot be quantised") from None
        if self.observe is not None and loss is not None:
            self.observe(self.name, loss)
