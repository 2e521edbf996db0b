"""Checkpoints of MLX with affine codes of 4 or 8 bits, as mlx-vlm writes them.

A quantised layer `X` has `X.weight` (codes in words of 32 bits, the first in the lowest ones), and `X.scales` and
`X.biases` for each group of inputs; a number is code * scale + bias. Names differ from the official ones: the language
model is inside `language_model.`, the vision tower lacks levels or is called otherwise, its projections may be one
tensor, and convolutions have their channels last.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from keye.config.quantization import AffineFormat
from keye.ops.quantized import QuantFormat, QuantTensor
from keye.weights.packed import Packed, PackedTensor, read_rows, unpack_bytes, unpack_halves
from keye.weights.safetensors import StoredTensor
from keye.weights.source import TensorSource, WeightsError

_TEXT: Final = re.compile(r"^(?:model\.)?language_model\.(?=model\.|lm_head\.)|^model\.(?=language_model\.)")
_VISION: Final = re.compile(
    r"^(?:model\.)?(?:visual|vision_tower|vision_model)\.(?:vision_model\.)?"
    r"(?:(?P<part>embeddings|post_layernorm|head)|(?:encoder\.)?(?P<layers>layers))\."
)
_PROJECTOR: Final = re.compile(
    r"^(?:model\.)?(?:(?:visual|vision_tower)\.)?(?:mlp_AR|projector|multi_modal_projector)\.(?=pre_norm|linear_[12])"
)
_JOINED: Final = re.compile(r"^(?P<layer>.*\.self_attn)\.qkv\.(?P<leaf>weight|bias)$")


def official_name(name: str) -> str:
    """The official name of what mlx-vlm calls `name`."""
    if (match := _PROJECTOR.match(name)) is not None:
        return "mlp_AR." + name[match.end() :]
    if (match := _VISION.match(name)) is not None:
        part = match["part"] or "encoder.layers"
        return f"visual.vision_model.{part}." + name[match.end() :]
    if (match := _TEXT.match(name)) is not None:
        name = name[match.end() :]
        return name.replace("language_model.", "model.", 1) if name.startswith("language_model.") else name
    return name


def join_affine(tensors: Mapping[str, StoredTensor], config: AffineFormat) -> dict[str, TensorSource]:
    """The tensors of a checkpoint under official names, those of each quantised layer as one. `WeightsError` for what
    does not fit together."""
    joined: dict[str, TensorSource] = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf in ("scales", "biases") and f"{layer}.weight" in tensors:
            continue
        source: TensorSource = tensor
        if tensor.dtype == "U32":
            source = PackedTensor.of(_packed(layer, tensors, config))
        elif name.endswith("patch_embedding.weight") and len(tensor.shape) == 4 and tensor.shape[1] == tensor.shape[2]:
            source = ChannelsLast(tensor)
        for own, part in _split(official_name(name), source):
            if own in joined:
                raise WeightsError(f"{name} is there twice, under two names; fetch the checkpoint again")
            joined[own] = part
    return joined


def _split(name: str, source: TensorSource) -> Iterator[tuple[str, TensorSource]]:
    """A tensor by its official name; the three projections of one that joins them."""
    match = _JOINED.match(name)
    if match is None:
        yield name, source
        return
    rows = source.shape[0] // 3
    for place, own in enumerate(("q_proj", "k_proj", "v_proj")):
        yield f"{match['layer']}.{own}.{match['leaf']}", source.part(place * rows, (place + 1) * rows)


def _packed(layer: str, tensors: Mapping[str, StoredTensor], config: AffineFormat) -> Packed:
    words = tensors[f"{layer}.weight"]
    scales, biases = tensors.get(f"{layer}.scales"), tensors.get(f"{layer}.biases")
    if scales is None or biases is None or len(words.shape) != 2:
        raise WeightsError(f"{words.name} is {words.dtype} {list(words.shape)}; of MLX keye reads matrices with "
                           "scales and biases")  # fmt: skip
    bits, group = config.layers.get(layer, (config.bits, config.group))
    M, K = words.shape[0], words.shape[1] * 32 // bits
    for tensor in (scales, biases):
        if not tensor.is_readable or tensor.dtype == "F64" or tensor.shape != (M, -(-K // group)):
            raise WeightsError(f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, which does not fit {M} x {K} "
                               f"numbers of {bits} bits in groups of {group}")  # fmt: skip
    is_short = bits == 4 and scales.dtype == biases.dtype == "BF16"
    dtype = torch.bfloat16 if is_short else torch.float32
    form = QuantFormat("int4" if bits == 4 else "int8", group, has_minimum=True, scale_dtype=dtype)

    def minima(scales: Tensor, rows: slice) -> Tensor:
        """Of codes less 128: exact in float32 unless a bias is 2^16 times as large as its scale."""
        own = read_rows(biases, rows)
        return own if bits == 4 else own.float() + 128 * scales.float()

    return Packed(words.name, (M, K), form, words, scales, unpack_halves if bits == 4 else unpack_bytes, minima)


@dataclass(frozen=True)
class ChannelsLast:
    """The weight of a convolution, stored [out, height, width, in] and read as [out, in, height, width]."""

    stored: StoredTensor
    format: QuantFormat | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        out, height, width, channels = self.stored.shape
        return out, channels, height, width

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes

    @property
    def is_readable(self) -> bool:
        return self.stored.is_readable

    @property
    def place(self) -> tuple[str, int]:
        return self.stored.place

    def part(self, begin: int, end: int) -> ChannelsLast:
        return replace(self, stored=self.stored.part(begin, end))

    def quantized(self) -> QuantTensor:
        raise AssertionError("floating-point numbers are in no quantised format")

    def pieces(self, target: Tensor) -> Iterator[Callable[[], object]]:
        yield lambda: target.copy_(self.stored.read().permute(0, 3, 1, 2))
