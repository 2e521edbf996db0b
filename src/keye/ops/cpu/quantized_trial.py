"""The trial of products with quantised weights by a newly built library: small ones of every kind, compared with the
reference.
"""

from __future__ import annotations

from ctypes import CDLL
from typing import Final

import torch
from torch import Tensor

from keye.ops import quantized
from keye.ops.cpu.quantized import CpuPacked, mix_experts
from keye.ops.elementwise import swiglu
from keye.ops.quantized import QuantFormat, QuantTensor

FORMATS: Final = (
    QuantFormat("int4", 64), QuantFormat("int4", 32, has_minimum=True), QuantFormat("int8", 16), QuantFormat("int8"),
)  # fmt: skip
#: Largest difference of outputs from the reference, for values of about 1.
TOLERANCE: Final = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def check_quantized(core: CDLL) -> None:
    """Every kind of product; `AssertionError` that names the wrong one."""
    for dtype in TOLERANCE:
        for form in FORMATS:
            check_products(core, form, dtype)


def random_weight(form: QuantFormat, shape: tuple[int, ...], generator: torch.Generator) -> QuantTensor:
    """A weight of random codes, its numbers about 1 / sqrt(inputs)."""
    weight = QuantTensor.empty(form, shape)
    low, high = (0, 256) if form.kind == "int4" else (-128, 128)
    weight.codes.copy_(torch.randint(low, high, weight.codes.shape, generator=generator))
    size = (0.2 if form.kind == "int4" else 0.013) / shape[-1] ** 0.5
    weight.scales.copy_(size * (0.5 + torch.rand(weight.scales.shape, generator=generator)))
    if weight.minima is not None:
        weight.minima.copy_(size * torch.randn(weight.minima.shape, generator=generator))
    return weight


def mix_reference(gate_up: QuantTensor, down: QuantTensor, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """What `keye.ops.cpu.quantized.mix_experts` computes, by its definition."""
    out = torch.zeros(x.shape[0], down.shape[-2])
    for token, experts in enumerate(chosen.tolist()):
        for slot, expert in enumerate(experts):
            inner = swiglu(quantized.integer_matmul(x[token, None].float(), gate_up[expert]))
            out[token] += weights[token, slot].float() * quantized.integer_matmul(inner, down[expert])[0]
    return out.to(x.dtype)


def check_products(core: CDLL, form: QuantFormat, dtype: torch.dtype) -> None:
    """Products with quantised weights must be near those of the definition, and unpacking exact; `AssertionError`
    otherwise."""
    generator = torch.Generator().manual_seed(0)
    for rows, outputs, inputs in ((1, 70, 160), (9, 32, 64), (40, 96, 328)):
        weight = random_weight(form, (outputs, inputs), generator)
        packed = CpuPacked.of(core, weight)
        again = packed.unpack()
        assert torch.equal(again.codes, weight.codes), "packed codes come back changed"
        x = torch.randn(rows, inputs, generator=generator).to(dtype)
        ours, wanted = packed.matmul(x).float(), quantized.integer_matmul(x, weight).float()
        assert _near(ours, wanted, TOLERANCE[dtype]), "quantised products differ from the reference"
    gate_up, down = (random_weight(form, shape, generator) for shape in ((4, 192, 128), (4, 128, 96)))
    x, weights = torch.randn(5, 128, generator=generator).to(dtype), torch.rand(5, 2, generator=generator)
    chosen = torch.rand(5, 4, generator=generator).topk(2, dim=1).indices
    mixed = mix_experts(CpuPacked.of(core, gate_up), CpuPacked.of(core, down), x, weights, chosen)
    assert mixed is not None
    # Sums that differ in their last bits may be rounded to neighbouring codes between the two products.
    wanted = mix_reference(gate_up, down, x, weights, chosen).float()
    assert _near(mixed.float(), wanted, max(TOLERANCE[dtype], 5e-3)), "quantised experts differ from the reference"


def _near(ours: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return float((ours - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))
