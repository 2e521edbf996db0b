"""Cases of the Triton kernels against the reference. `test_triton.py` runs them with TRITON_INTERPRET=1, and
`make gpu` on a card with KEYE_TEST_DEVICE=cuda."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from keye.ops import reference
from keye.ops.backend import REFERENCE, Backend, Kernel, Stretch
from keye.ops.kv_blocks import KV_BLOCK, BlockRows, RowFormat, RowKind
from keye.ops.quantized import QuantFormat, QuantTensor
from keye.ops.registry import backends, find_grouped_matmul, multiply_quantized
from keye.ops.triton import experts, selection
from keye.ops.triton.backend import TritonBackend

BACKEND = TritonBackend()
DEVICE = torch.device(os.environ.get("KEYE_TEST_DEVICE", "cpu"))
#: Largest difference of outputs of normal inputs by dtype; two for a result at the edge of a rounding step.
NEAR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with DEVICE:
        yield


@dataclass(frozen=True)
class Case:
    """A step of several sequences: `lengths` tokens of which `news` are new, in pools of shuffled KV blocks."""

    lengths: tuple[int, ...]
    news: tuple[int, ...]
    heads: int = 8
    groups: int = 2
    dim: int = 32
    indexer_heads: int = 4
    indexer_dim: int = 32
    topk: int = 16
    rows: RowKind = "float32"
    indexer_rows: RowKind = "float32"
    dtype: torch.dtype = torch.float32
    integers: bool = False
    fixed: bool = False


@dataclass(frozen=True)
class Step:
    q: Tensor
    indexer_q: Tensor
    gate: Tensor
    stretches: list[Stretch]


def draw(case: Case, generator: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers, or small integers: their scores are exact in any order and often equal."""
    if case.integers:
        return torch.randint(-1, 2, shape, generator=generator, device="cpu").to(DEVICE, case.dtype)
    return torch.randn(shape, generator=generator, device="cpu").to(DEVICE, case.dtype)


def store(vectors: list[Tensor], kind: RowKind, generator: torch.Generator) -> list[tuple[BlockRows, Tensor]]:
    """Sequences [n, G, D] in one pool, garbage in unused rows; with what `RowFormat.decode` returns."""
    rows = RowFormat(kind, *vectors[0].shape[1:])
    blocks = [-(-len(v) // KV_BLOCK) for v in vectors]
    order = torch.randperm(sum(blocks) + 3, generator=generator, device="cpu").int().to(DEVICE)
    shape = (len(order), KV_BLOCK, rows.row_bytes)
    pool = torch.randint(0, 255, shape, dtype=torch.uint8, generator=generator, device="cpu").to(DEVICE)
    stored = []
    for v, table in zip(vectors, order.split([*blocks, 3]), strict=False):
        encoded = rows.encode(v)
        flat = torch.nn.functional.pad(encoded, (0, 0, 0, len(table) * KV_BLOCK - len(v)), value=127)
        pool[table.long()] = flat.view(len(table), KV_BLOCK, -1)
        stored.append((BlockRows(rows, None, pool, table), rows.decode(encoded)))
    return stored


def make(case: Case, seed: int = 0) -> Step:
    generator = torch.Generator("cpu").manual_seed(seed)

    def stored(groups: int, dim: int, kind: RowKind) -> list[tuple[BlockRows, Tensor]]:
        return store([draw(case, generator, n, groups, dim) for n in case.lengths], kind, generator)

    keys, values = (stored(case.groups, case.dim, case.rows) for _ in range(2))
    index = stored(1, case.indexer_dim, case.indexer_rows)
    stretches, start = [], 0
    for length, new, (kp, k), (vp, v), (xp, x) in zip(case.lengths, case.news, keys, values, index, strict=True):
        stretches.append(Stretch(
            start, start + new, length - new,
            rows=lambda at, k=k, v=v: (k[at], v[at]), key_tiles=lambda a, b, x=x: x[a:b, 0],
            blocks={"k": kp, "v": vp, "indexer_k": xp}, counts=torch.zeros(length, dtype=torch.int64), fixed=case.fixed,
        ))  # fmt: skip
        start += new
    q = draw(case, generator, start, case.heads, case.dim)
    indexer_q = draw(case, generator, start, case.indexer_heads, case.indexer_dim)
    return Step(q, indexer_q, draw(case, generator, start, case.indexer_heads).float(), stretches)


def sets(backend: Backend, step: Step, stretch: Stretch, topk: int) -> Tensor:
    return torch.cat([part for _, part in backend.select(step.indexer_q, step.gate, stretch, topk)])


def near(got: Tensor, want: Tensor, factor: float = 1.0) -> bool:
    return bool((got.float() - want.float()).abs().max() <= factor * NEAR[want.dtype])


def check(case: Case, seed: int = 0, factor: float = 1.0) -> None:
    """Sets are the reference's, outputs and counts follow, in sparse and dense attention."""
    step = make(case, seed)
    assert all(BACKEND.takes(step.q, stretch) for stretch in step.stretches)
    for stretch in step.stretches:
        assert torch.equal(sets(BACKEND, step, stretch, case.topk), sets(REFERENCE, step, stretch, case.topk))
    got, want = torch.empty_like(step.q), torch.empty_like(step.q)
    BACKEND.sparse(step.q, step.indexer_q, step.gate, step.stretches, case.topk, got)
    counted = [stretch.counts.clone() for stretch in step.stretches if stretch.counts is not None]
    for stretch in step.stretches:
        stretch.counts.zero_()
    REFERENCE.sparse(step.q, step.indexer_q, step.gate, step.stretches, case.topk, want)
    assert near(got, want, factor)
    assert all(torch.equal(n, s.counts) for n, s in zip(counted, step.stretches, strict=True))
    BACKEND.dense(step.q, step.stretches, got)
    REFERENCE.dense(step.q, step.stretches, want)
    assert near(got, want, factor)


@pytest.mark.parametrize("ratio", [1, 2, 4, 8, 16])
def test_heads_of_a_group(ratio: int) -> None:
    check(Case((71, 90), (9, 1), heads=ratio, groups=1))


@pytest.mark.parametrize(("heads", "dim"), [(1, 32), (4, 64), (16, 64), (3, 128)])
def test_indexers(heads: int, dim: int) -> None:
    check(Case((75,), (10,), groups=1, indexer_heads=heads, indexer_dim=dim))


@pytest.mark.parametrize("topk", [1, 3, 64, 200])
def test_ties_and_sets_larger_than_the_context(topk: int) -> None:
    check(Case((150, 30), (9, 3), groups=1, topk=topk, integers=True), seed=topk)


def test_every_score_equal() -> None:
    step = make(Case((90,), (9,), integers=True))
    step = replace(step, indexer_q=torch.zeros_like(step.indexer_q))
    assert sets(BACKEND, step, step.stretches[0], 5).tolist() == [[0, 1, 2, 3, 4]] * 9


@pytest.mark.parametrize("topk", [100, 2048])
def test_many_chunks(topk: int) -> None:
    """More keys than one program collects."""
    step = make(Case((selection.CHUNK + 700,), (9,), groups=1, dim=16, topk=topk, integers=True))
    assert torch.equal(sets(BACKEND, step, step.stretches[0], topk), sets(REFERENCE, step, step.stretches[0], topk))


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "fp8", "int8", "int4"])
def test_row_kinds(kind: RowKind) -> None:
    dtype = torch.float16 if kind == "float16" else torch.bfloat16
    index: RowKind = "fp8" if kind == "int4" else kind
    check(Case((90, 70), (9, 1), dim=128, groups=1, rows=kind, indexer_rows=index, dtype=dtype), factor=2.0)


def test_decoding_a_batch_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    select = selection.select_rows
    monkeypatch.setattr(selection, "select_rows", lambda *a: launches.append(a) or select(*a))
    case = Case((90, 70, 100), (1, 2, 1))
    step = make(case)
    BACKEND.sparse(step.q, step.indexer_q, step.gate, step.stretches, case.topk, torch.empty_like(step.q))
    assert len(launches) == 1


def test_chunked_is_unchunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in slices and in one piece: the same sets."""
    step = make(Case((140,), (40,)))
    total = sets(BACKEND, step, step.stretches[0], 16)
    monkeypatch.setattr(selection, "SCRATCH_BYTES", 1)
    assert torch.equal(sets(BACKEND, step, step.stretches[0], 16), total)


def test_fixed_results_do_not_depend_on_the_neighbours() -> None:
    case = Case((90, 70, 75), (9, 1, 2), fixed=True)
    step = make(case)
    together, alone = torch.empty_like(step.q), torch.empty_like(step.q)
    for compute in (
        lambda part, out: BACKEND.sparse(step.q, step.indexer_q, step.gate, part, case.topk, out),
        lambda part, out: BACKEND.dense(step.q, part, out),
    ):
        compute(step.stretches, together)
        for stretch in step.stretches:
            compute([stretch], alone)
        assert torch.equal(together, alone)


@pytest.mark.parametrize("kernel", ["union", "masked"])
def test_either_kernel_over_given_sets(kernel: Kernel) -> None:
    step = make(Case((80,), (9,)))
    got, want = torch.empty_like(step.q), torch.empty_like(step.q)
    BACKEND.attend(step.q, reference.select_recent(9, 71, 16), step.stretches[0], got, kernel)
    REFERENCE.attend(step.q, reference.select_recent(9, 71, 16), step.stretches[0], want)
    assert near(got, want)


def test_scratch_memory_is_bounded() -> None:
    for length in (4096, 32768, 131072, 262144):
        queries = selection.most_queries(length, 2048, 8)
        assert queries * selection.Room.of(length, 2048).nbytes <= selection.SCRATCH_BYTES


def test_what_is_left_to_the_reference() -> None:
    step = make(Case((80,), (9,)))
    stretch = step.stretches[0]
    assert not BACKEND.takes(step.q.double(), stretch)
    assert not BACKEND.takes(step.q.clone().requires_grad_(), stretch)
    assert not BACKEND.takes(step.q, replace(stretch, blocks=None))


def test_products_of_experts() -> None:
    x, weights, sizes = torch.randn(70, 48), torch.randn(5, 48, 80), [0, 33, 1, 0, 36]
    want = torch.cat([part @ weight for part, weight in zip(x.split(sizes), weights, strict=True)])
    assert torch.allclose(experts.grouped_matmul(x, weights, sizes), want, atol=1e-4)
    with backends.using("triton"):
        assert find_grouped_matmul(x, weights) is None, "gradients are on"
        with torch.no_grad():
            product = find_grouped_matmul(x, weights)
            assert product is not None
            assert torch.allclose(product(x, weights, sizes), want, atol=1e-4)


_FLOAT32_SCALES = {"scale_dtype": torch.float32}


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        (QuantFormat("int4", 32), torch.bfloat16), (QuantFormat("int4", 64, has_minimum=True), torch.float32),
        (QuantFormat("int4"), torch.float32), (QuantFormat("int8"), torch.bfloat16),
        (QuantFormat("int8", 16, has_minimum=True, **_FLOAT32_SCALES), torch.float32),
        (QuantFormat("fp8", 16, rows=32, **_FLOAT32_SCALES), torch.bfloat16),
    ],
    ids=str,
)  # fmt: skip
def test_products_with_quantised_weights(form: QuantFormat, dtype: torch.dtype) -> None:
    sizes = [0, 17, 1]
    weight, x = QuantTensor.empty(form, (3, 40, 77), DEVICE), torch.randn(18, 77).to(dtype)
    weight.codes.view(torch.uint8).copy_(torch.randint(0, 120, weight.codes.shape))
    scale = {"int4": 0.03, "int8": 0.002, "fp8": 0.01}[form.kind]
    weight.scales.copy_(scale * (0.5 + torch.rand(weight.scales.shape)))
    if weight.minima is not None:
        weight.minima.copy_(scale * torch.randn(weight.minima.shape))
    with backends.using("triton"), torch.no_grad():
        ours = multiply_quantized(x, weight, sizes), multiply_quantized(x, weight[1])
        assert multiply_quantized(x[:0], weight[1]).shape == (0, 40)
    numbers = weight.dequantize(dtype).float()
    wanted = torch.cat([x[:17].float() @ numbers[1].T, x[17:].float() @ numbers[2].T]), x.float() @ numbers[1].T
    for mine, theirs in zip(ours, wanted, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.float(), theirs, rtol=NEAR[dtype], atol=NEAR[dtype])
