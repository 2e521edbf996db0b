"""Checkpoints of compressed-tensors (llm-compressor, vLLM) and float8 ones in the same manner (AutoFP8).

A quantised layer `X` has `X.weight_packed` (codes of 4 or 8 bits in words of 32, the first in the lowest bits) with
`X.weight_shape`, or `X.weight` in int8 or float8; `X.weight_scale` of each row, group or block, or one of the matrix;
and, where codes are not symmetric, `X.weight_zero_point`. A number is (code - zero) * scale. Scales of activations are
left out: only weights are quantised here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Final

import torch
from torch import Tensor

from keye.config.quantization import CompressedTensors
from keye.ops.quantized import QuantFormat, QuantKind
from keye.weights.float8 import FLOAT8
from keye.weights.packed import Minima, Packed, PackedTensor, as_stored, read_rows, unpack_bytes, unpack_halves
from keye.weights.safetensors import StoredTensor
from keye.weights.source import TensorSource, WeightsError

#: Tensors beside the codes of a weight, and those of activations and of stored keys and values.
_LEFT_OUT: Final = re.compile(
    r"\.(weight_(packed|shape|scale|zero_point)|(input|output|[kvq])_(global_)?(scale|zero_point))$"
)


def join_compressed(tensors: Mapping[str, StoredTensor], config: CompressedTensors) -> dict[str, TensorSource]:
    """The tensors of a checkpoint, those of each quantised layer as one under the name of its weight. `WeightsError`
    for what does not fit together."""
    joined: dict[str, TensorSource] = {name: t for name, t in tensors.items() if not _LEFT_OUT.search(name)}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            joined[f"{layer}.weight"] = PackedTensor.of(_of_words(layer, tensors, config))
        elif leaf == "weight" and tensor.dtype in ("I8", FLOAT8):
            joined[name] = PackedTensor.of(_of_codes(layer, tensors, config))
    return joined


def _of_words(layer: str, tensors: Mapping[str, StoredTensor], config: CompressedTensors) -> Packed:
    """A layer whose codes are packed in words."""
    words, declared = tensors[f"{layer}.weight_packed"], tensors.get(f"{layer}.weight_shape")
    if f"{layer}.weight_g_idx" in tensors:
        raise WeightsError(f"{layer}.weight_g_idx says that inputs were reordered by activation (actorder group), "
                           "which keye does not read: quantise without it, or use the bfloat16 release")  # fmt: skip
    is_declared = declared is not None and declared.shape == (2,) and declared.dtype in ("I64", "I32")
    if words.dtype != "I32" or len(words.shape) != 2 or declared is None or not is_declared:
        raise WeightsError(f"{words.name} is {words.dtype} {list(words.shape)} without a weight_shape of two numbers; "
                           "fetch the checkpoint again")  # fmt: skip
    M, K = declared.read().tolist()
    bits = next((bits for bits in config.bits if -(-K * bits // 32) == words.shape[1]), None)
    if bits is None or words.shape[0] != M or K < 1:
        wanted = " or ".join(map(str, config.bits))
        raise WeightsError(f"{words.name} is {list(words.shape)}, which is not {M} x {K} numbers of {wanted} bits")
    scales, zeros = _scales_of(layer, tensors), tensors.get(f"{layer}.weight_zero_point")
    minima: Minima | None = None
    if zeros is not None:
        packed_rows = -(-M * bits // 32)
        if zeros.dtype != "I32" or zeros.shape != (packed_rows, *scales.shape[1:]):
            raise WeightsError(f"{zeros.name} is {zeros.dtype} {list(zeros.shape)}, which does not fit {scales.name} "
                               f"{list(scales.shape)}; fetch the checkpoint again")  # fmt: skip
        minima = partial(_minima_of_words, zeros, bits)
    form = _format(layer, "int4" if bits == 4 else "int8", scales, (M, K), config, has_zeros=zeros is not None)
    unpack = unpack_halves if bits == 4 else unpack_bytes
    return Packed(f"{layer}.weight", (M, K), form, words, scales, unpack, minima)


def _of_codes(layer: str, tensors: Mapping[str, StoredTensor], config: CompressedTensors) -> Packed:
    """A layer with a code in each byte, int8 or float8."""
    codes, scales = tensors[f"{layer}.weight"], _scales_of(layer, tensors)
    zeros = tensors.get(f"{layer}.weight_zero_point")
    if len(codes.shape) != 2:
        raise WeightsError(
            f"{codes.name} is {codes.dtype} {list(codes.shape)}; of quantised weights keye reads matrices"
        )
    M, K = codes.shape
    if zeros is not None and (zeros.dtype != "I8" or zeros.shape != scales.shape):
        if codes.dtype == FLOAT8:  # float8 has no zero points; some files hold zeros for them
            zeros = None
        else:
            raise WeightsError(f"{zeros.name} is {zeros.dtype} {list(zeros.shape)}, which does not fit {scales.name}")
    if codes.dtype == FLOAT8:
        return Packed(codes.name, (M, K), _format(layer, "fp8", scales, (M, K), config), codes, scales, as_stored)
    form = _format(layer, "int8", scales, (M, K), config, has_zeros=zeros is not None)
    minima = None if zeros is None else partial(_minima_of_codes, zeros)
    return Packed(codes.name, (M, K), form, codes, scales, as_stored, minima)


def _scales_of(layer: str, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    scales = tensors.get(f"{layer}.weight_scale")
    if scales is None or scales.dtype not in ("BF16", "F16", "F32") or len(scales.shape) > 2:
        what = "no weight_scale" if scales is None else f"a weight_scale {scales.dtype} {list(scales.shape)}"
        raise WeightsError(f"{layer} has quantised weights and {what}; fetch the checkpoint again")
    return scales


def _format(
    layer: str, kind: QuantKind, scales: StoredTensor, shape: tuple[int, int], config: CompressedTensors, *,
    has_zeros: bool = False,
) -> QuantFormat:  # fmt: skip
    """The format that keeps a matrix [M, K] bit for bit; minima are exact in float32 for scales of 16 bits."""
    (M, K), stored = shape, scales.shape
    if has_zeros and scales.dtype == "F32":
        raise WeightsError(f"{scales.name} is F32 beside zero points; of those keye reads scales of 16 bits")
    group, rows = None, 1
    if torch.Size(stored).numel() > 1 and stored not in ((M,), (M, 1)):
        row_count, column_count = stored if len(stored) == 2 else (0, 0)
        blocks = [(1, size) for size in config.groups] + list(config.blocks)
        if column_count and K % column_count == 0:
            blocks.append((1, K // column_count))
        fitting = [(r, c) for r, c in blocks if (row_count, column_count) == (-(-M // r), -(-K // c))]
        if not fitting:
            raise WeightsError(f"{scales.name} is {list(stored)}, which does not fit {layer}.weight [{M}, {K}]")
        rows, group = fitting[0]
    dtype = torch.bfloat16 if scales.dtype == "BF16" and not has_zeros and rows == 1 else torch.float32
    return QuantFormat(kind, group, has_minimum=has_zeros, rows=rows, scale_dtype=dtype)


def _minima_of_words(zeros: StoredTensor, bits: int, scales: Tensor, rows: slice) -> Tensor:
    """Of zero points that are packed along the rows: all are unpacked, since a word holds those of several rows."""
    stored = zeros.read()
    columns = (stored.unsqueeze(1) if stored.dim() == 1 else stored).t().contiguous().view(torch.uint8)
    if bits == 4:
        columns = torch.stack((columns & 15, columns >> 4), dim=-1).flatten(1)
    values = columns.t()[rows].float()  # plus 8 or 128, as codes are
    return -(values if bits == 4 else values - 128) * scales.float()


def _minima_of_codes(zeros: StoredTensor, scales: Tensor, rows: slice) -> Tensor:
    return -read_rows(zeros, rows).float() * scales.float()
