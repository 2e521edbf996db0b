"""What compressed-tensors and MLX themselves write is read to the numbers that they read, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from keye.weights.open import open_weights
from keye.weights.source import copy_all
from tests.support.oracles import oracle

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

GROUPS = {"num_bits": 4, "strategy": "group", "group_size": 32}
FLOAT = {"num_bits": 8, "type": "float"}
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4-group": ("pack-quantized", GROUPS),
    "int4-group-asymmetric": ("pack-quantized", {**GROUPS, "symmetric": False}),
    "int4-channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "int8-packed-asymmetric": ("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "int8-channel": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8-asymmetric": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "fp8-tensor": ("float-quantized", {**FLOAT, "strategy": "tensor"}),
    "fp8-channel": ("float-quantized", {**FLOAT, "strategy": "channel"}),
    "fp8-block": ("naive-quantized", {**FLOAT, "strategy": "block", "block_structure": [16, 32]}),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("columns", [64, 96])
def test_what_compressed_tensors_writes_is_read_bit_for_bit(name: str, columns: int, tmp_path: Path) -> None:
    compressors, library = oracle("compressed_tensors.compressors"), oracle("compressed_tensors.quantization")
    form, weights = SCHEMES[name]
    args = library.QuantizationArgs(**weights)
    scheme = library.QuantizationScheme(targets=["Linear"], weights=args, format=form)
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(40, columns, generator=generator).bfloat16()
    shape = {"group": (40, columns // 32), "channel": (40, 1), "tensor": (1,), "block": (3, columns // 32)}[
        weights["strategy"]
    ]
    scale = (torch.rand(shape, generator=generator) * 0.2 + 0.01).bfloat16()
    state = {"weight": weight, "weight_scale": scale}
    if weights.get("symmetric", True) is False:
        half = 1 << (weights["num_bits"] - 1)
        state["weight_zero_point"] = torch.randint(-half, half, shape, generator=generator).to(torch.int8)
    compressor = compressors.BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    section = {"quant_method": "compressed-tensors", "format": form,
               "config_groups": {"group_0": scheme.model_dump(mode="json")}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    save_file({f"x.{leaf}": tensor.contiguous() for leaf, tensor in stored.items()}, tmp_path / "model.safetensors")
    (source,) = open_weights(tmp_path).values()
    out = torch.empty(source.shape, dtype=torch.bfloat16)
    copy_all(source.pieces(out))
    assert torch.equal(out, expected)
    assert torch.equal(source.quantized().dequantize(torch.bfloat16), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_what_mlx_writes_is_read_bit_for_bit(bits: int, group: int, tmp_path: Path) -> None:
    """In float32: MLX itself rounds each product to the format of the scales."""
    mx = oracle("mlx.core")
    weight = np.random.default_rng(bits * group).normal(size=(24, 256)).astype(np.float32)
    words, scales, biases = mx.quantize(mx.array(weight).astype(mx.bfloat16), group_size=group, bits=bits)
    wide = [part.astype(mx.float32) for part in (scales, biases)]
    expected = torch.from_numpy(np.array(mx.dequantize(words, *wide, group_size=group, bits=bits)))
    sizes = {"group_size": group, "bits": bits}
    (tmp_path / "config.json").write_text(json.dumps({"quantization": sizes}))
    mx.save_safetensors(
        str(tmp_path / "model.safetensors"),
        {"language_model.lm_head.weight": words, "language_model.lm_head.scales": scales,
         "language_model.lm_head.biases": biases},
    )  # fmt: skip
    source = open_weights(tmp_path)["lm_head.weight"]
    out = torch.empty(source.shape)
    copy_all(source.pieces(out))
    assert torch.equal(out, expected)
    assert torch.equal(source.quantized().dequantize(), expected)
