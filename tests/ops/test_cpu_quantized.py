"""Products with packed quantised weights against their definition, in every variant of the compiled core."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from keye.ops import registry
from keye.ops.cpu import quantized as cpu
from keye.ops.cpu.quantized import CpuPacked, mix_experts
from keye.ops.cpu.quantized_trial import mix_reference, random_weight
from keye.ops.quantized import QuantFormat, QuantTensor, integer_matmul

FORMATS = (
    QuantFormat("int4", 64), QuantFormat("int4", 32), QuantFormat("int4", 128), QuantFormat("int4"),
    QuantFormat("int4", 64, has_minimum=True), QuantFormat("int4", 32, has_minimum=True, scale_dtype=torch.float32),
    QuantFormat("int8"), QuantFormat("int8", 64), QuantFormat("int8", 96), QuantFormat("int8", 32, has_minimum=True),
    QuantFormat("int8", 32, scale_dtype=torch.float32), QuantFormat("int8", 16, scale_dtype=torch.float32),
    QuantFormat("int4", 16), QuantFormat("int4", 48, has_minimum=True),
)  # fmt: skip
FEW = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
#: Of outputs of about 1: rounding of sums, and one step of what is stored.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_near(ours: Tensor, wanted: Tensor, tolerance: float | None = None) -> None:
    assert ours.dtype == wanted.dtype and ours.shape == wanted.shape
    scale = max(1.0, float(wanted.abs().max()))
    assert float((ours.double() - wanted.double()).abs().max()) <= scale * (tolerance or TOLERANCE[ours.dtype])


def pack(backend, weight: QuantTensor) -> CpuPacked:
    return CpuPacked.of(backend.library(), weight)


@FEW
@given(
    seed=st.integers(0, 2**32 - 1),
    form=st.sampled_from(FORMATS),
    rows=st.integers(1, 30),
    outputs=st.integers(1, 100),
    inputs=st.integers(1, 300),
    dtype=st.sampled_from(list(TOLERANCE)),
    with_bias=st.booleans(),
    threads=st.sampled_from([1, 3]),
)
def test_products_are_those_of_the_definition(
    backend, seed, form, rows, outputs, inputs, dtype, with_bias, threads
) -> None:
    random = generator(seed)
    weight = random_weight(form, (outputs, inputs), random)
    x = torch.randn(rows, inputs, generator=random).to(dtype)
    bias = torch.randn(outputs, generator=random) if with_bias else None
    torch.set_num_threads(threads)
    wanted = integer_matmul(x.double(), weight) + (0 if bias is None else bias.double())
    assert_near(pack(backend, weight).matmul(x, bias), wanted.to(dtype))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_packing_loses_nothing(backend, form: QuantFormat) -> None:
    weight = random_weight(form, (2, 45, 200), generator(0))
    again = pack(backend, weight).unpack()
    assert torch.equal(again.codes, weight.codes) and torch.equal(again.scales, weight.scales)
    assert weight.minima is None or (again.minima is not None and torch.equal(again.minima, weight.minima))


def test_the_largest_codes_do_not_overflow(backend) -> None:
    for form, codes in ((QuantFormat("int8"), (-128, 127)), (QuantFormat("int4"), (0x00, 0xFF))):
        for code in codes:
            weight = QuantTensor.empty(form, (32, 4096))
            weight.codes.fill_(code)
            weight.scales.fill_(1)
            for sign in (1.0, -1.0):
                x = torch.full((2, 4096), sign)
                assert_near(pack(backend, weight).matmul(x), integer_matmul(x, weight))


def test_rows_of_experts_meet_their_weights(backend) -> None:
    random, sizes = generator(1), [4, 0, 230, 1, 0]
    weight = random_weight(QuantFormat("int4", 64), (5, 70, 128), random)
    x = torch.randn(sum(sizes), 128, generator=random)
    wanted = torch.cat([integer_matmul(part, weight[e]) for e, part in enumerate(x.split(sizes)) if len(part)])
    packed = pack(backend, weight)
    assert_near(packed.grouped_matmul(x, sizes), wanted)
    torch.set_num_threads(4)
    assert_near(packed.grouped_matmul(x, sizes), wanted)
    assert packed.grouped_matmul(x[:0], [0] * 5).shape == (0, 70)


@pytest.mark.parametrize("form", [QuantFormat("int4", 64), QuantFormat("int8"), QuantFormat("int4", 32, True)], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_experts_of_every_token_are_mixed(backend, form: QuantFormat, tokens: int) -> None:
    random = generator(tokens)
    gate_up, down = random_weight(form, (6, 192, 160), random), random_weight(form, (6, 80, 96), random)
    down = random_weight(form, (6, 160, 96), random)
    x = torch.randn(tokens, 160, generator=random)
    weights = torch.rand(tokens, 3, generator=random)
    chosen = torch.rand(tokens, 6, generator=random).topk(3).indices
    packed = pack(backend, gate_up), pack(backend, down)
    mixed = mix_experts(*packed, x, weights, chosen)
    assert mixed is not None
    # Rounding of the first sums may move a code of what is between the products to the next one.
    assert_near(mixed, mix_reference(gate_up, down, x, weights, chosen), 5e-3)
    torch.set_num_threads(3)
    by_threads = mix_experts(*packed, x, weights, chosen)
    assert by_threads is not None and torch.equal(by_threads, mixed)


def test_a_token_does_not_depend_on_its_neighbours(best_backend) -> None:
    random = generator(2)
    gate_up, down = (
        pack(best_backend, random_weight(QuantFormat("int4", 64), shape, random))
        for shape in ((8, 128, 256), (8, 256, 64))
    )
    x, weights = torch.randn(33, 256, generator=random), torch.rand(33, 2, generator=random)
    chosen = torch.rand(33, 8, generator=random).topk(2).indices
    together = mix_experts(gate_up, down, x, weights, chosen)
    assert together is not None
    for t in (0, 7, 32):
        part = slice(t, t + 1)
        assert torch.equal(mix_experts(gate_up, down, x[part], weights[part], chosen[part]), together[part])
    assert torch.equal(gate_up.matmul(x[:1]), gate_up.matmul(x)[:1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_stay_visible(backend, bad: float) -> None:
    weight = random_weight(QuantFormat("int4", 64), (40, 128), generator(3))
    x = torch.randn(3, 128, generator=generator(3))
    x[1, 70] = bad
    out = pack(backend, weight).matmul(x)
    assert out[1].isnan().all() and out[::2].isfinite().all()


def test_weights_are_packed_where_kernels_take_them(best_backend, monkeypatch) -> None:
    monkeypatch.setitem(registry.backends._ready, "cpu", best_backend)
    with registry.backends.using("cpu"):
        assert registry.pack_weight(random_weight(QuantFormat("int8"), (8, 64), generator(0))) is not None
        assert registry.pack_weight(random_weight(QuantFormat("int8", 24), (8, 64), generator(0))) is None
    with registry.backends.using("reference"):
        assert registry.pack_weight(random_weight(QuantFormat("int8"), (8, 64), generator(0))) is None
    assert not cpu.takes(QuantFormat("fp8"))


def test_float32_scales_of_half_precision_take_half_the_memory(best_backend) -> None:
    form = QuantFormat("int8", 32, scale_dtype=torch.float32)
    weight = random_weight(form, (32, 64), generator(0))
    wide = pack(best_backend, weight).nbytes
    weight.scales.copy_(weight.scales.half().float())
    assert pack(best_backend, weight).nbytes == wide - 2 * weight.scales.numel()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_what_is_not_finite_stays_so_in_its_row_alone(backend, form: QuantFormat, bad: float) -> None:
    random = generator(5)
    packed, x = pack(backend, random_weight(form, (40, 130), random)), torch.randn(3, 130, generator=random)
    clean = packed.matmul(x)
    x[1, 129] = bad
    out = packed.matmul(x)
    assert not torch.isfinite(out[1]).any() and torch.equal(out[[0, 2]], clean[[0, 2]])
