"""The compiled core against the reference: equal sets, outputs equal up to rounding, in every variant."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from keye.ops.backend import REFERENCE, Stretch
from keye.ops.cpu.backend import CpuBackend
from keye.ops.cpu.trial import Problem
from keye.ops.kv_blocks import RowKind
from keye.ops.reference import round_queries

FEW = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
SEEDS = st.integers(0, 2**32 - 1)
#: Outputs of values of about 1; bfloat16 keeps 8 bits.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class Step:
    """Random queries of a step. `integers` draws small integers, whose scores are exact and often equal."""

    def __init__(
        self, total: int, heads: int, dim: int, index: tuple[int, int], dtype: torch.dtype, seed: int, integers: bool
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.q = torch.randn(total, heads, dim, generator=generator).to(dtype)
        shape = (total, *index)
        numbers = torch.randint(-2, 3, shape, generator=generator).float()
        self.indexer_q = (numbers if integers else torch.randn(shape, generator=generator)).to(dtype)
        gates = torch.randint(-2, 3, shape[:2], generator=generator).float()
        self.gate = gates if integers else torch.randn(shape[:2], generator=generator)

    def sparse(self, backend: object, stretches: list[Stretch], topk: int) -> Tensor:
        out = torch.zeros_like(self.q)
        backend.sparse(self.q, self.indexer_q, self.gate, stretches, topk, out)  # type: ignore[attr-defined]
        return out

    def dense(self, backend: object, stretches: list[Stretch]) -> Tensor:
        out = torch.zeros_like(self.q)
        backend.dense(self.q, stretches, out)  # type: ignore[attr-defined]
        return out

    def sets(self, backend: object, stretch: Stretch, topk: int) -> Tensor:
        selected = backend.select(self.indexer_q, self.gate, stretch, topk)  # type: ignore[attr-defined]
        return torch.cat([positions for _, positions in selected])


def near(ours: Tensor, wanted: Tensor) -> bool:
    return float((ours.float() - wanted.float()).abs().max()) <= TOLERANCE[ours.dtype]


def problem(length: int, dtype: torch.dtype, seed: int = 0, **shape: object) -> Problem:
    sizes = {"groups": 2, "dim": 64, "indexer_dim": 64} | shape
    return Problem(length, dtype=dtype, generator=torch.Generator().manual_seed(seed), **sizes)  # type: ignore[arg-type]


@FEW
@given(
    seed=SEEDS,
    ratio=st.sampled_from([1, 2, 3, 4, 8, 16]),
    dim=st.sampled_from([16, 48, 64, 128, 256]),
    index=st.sampled_from([(1, 32), (4, 64), (5, 128), (16, 64)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    length=st.integers(1, 700),
    topk=st.integers(1, 300),
)
def test_sets_and_outputs_are_those_of_the_reference(backend, seed, ratio, dim, index, dtype, length, topk):
    stored = problem(length, dtype, seed, dim=dim, indexer_dim=index[1], integers=True)
    n = 1 + seed % min(length, 70)
    step = Step(n, 2 * ratio, dim, index, dtype, seed, integers=True)
    stretch = stored.stretch(0, n)
    assert torch.equal(step.sets(backend, stretch, topk), step.sets(REFERENCE, stretch, topk))
    assert near(step.sparse(backend, [stretch], topk), step.sparse(REFERENCE, [stretch], topk))
    assert near(step.dense(backend, [stretch]), step.dense(REFERENCE, [stretch]))


@FEW
@given(seed=SEEDS, length=st.integers(1, 900), topk=st.integers(1, 400))
def test_sets_of_random_scores_differ_only_within_rounding(backend, seed, length, topk):
    stored, n = problem(length, torch.float32, seed), 1 + seed % min(length, 50)
    step = Step(n, 4, 64, (4, 64), torch.float32, seed, integers=False)
    stretch = stored.stretch(0, n)
    ours, wanted = step.sets(backend, stretch, topk), step.sets(REFERENCE, stretch, topk)
    keys = stored.indexer_keys(0, length)
    scores = (step.gate.unsqueeze(-1) * (step.indexer_q @ keys.T).relu()).sum(1)
    for row, (a, b) in enumerate(zip(ours.tolist(), wanted.tolist(), strict=True)):
        assert a == sorted(a, key=lambda p: (p < 0, p))
        only_ours, only_wanted = set(a) - set(b), set(b) - set(a)
        assert len(only_ours) == len(only_wanted)
        for p, r in zip(sorted(only_ours), sorted(only_wanted), strict=True):
            assert scores[row, p].item() == pytest.approx(scores[row, r].item(), abs=1e-3)


def test_2048_of_many_keys_are_selected_like_the_reference_does(best_backend):
    stored, step = problem(9000, torch.bfloat16, 3, integers=True), Step(3, 8, 64, (16, 64), torch.bfloat16, 3, True)
    stretch = stored.stretch(0, 3)
    assert torch.equal(step.sets(best_backend, stretch, 2048), step.sets(REFERENCE, stretch, 2048))


def test_a_prompt_in_chunks_selects_the_same_sets_to_the_last_bit(backend):
    stored, step = problem(500, torch.float32, 1), Step(500, 4, 64, (3, 64), torch.float32, 1, integers=False)
    total = step.sets(backend, stored.stretch(0, 500), 37)
    for cuts in ([1, 2, 33, 100, 364], [250, 250]):
        parts, first = [], 0
        for n in cuts:
            part = Stretch(first, first + n, first, stored.rows, stored.indexer_keys, stored.blocks)
            parts.append(step.sets(backend, part, 37))
            first += n
        assert torch.equal(torch.cat(parts), total)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 37])
def test_rows_of_every_number_format(backend, kind: RowKind, dtype, queries):
    stored = problem(300, dtype, 5, kind=kind, dim=128)
    step = Step(queries, 8, 128, (4, 64), dtype, 5, integers=True)
    stretch = stored.stretch(0, queries)
    positions = torch.arange(0, 300 - queries, 3).expand(queries, -1)
    ours, wanted = torch.zeros_like(step.q), torch.zeros_like(step.q)
    backend.attend(step.q, [(0, positions)], stretch, ours)
    REFERENCE.attend(step.q, [(0, positions)], stretch, wanted)
    assert near(ours, wanted)
    assert near(step.dense(backend, [stretch]), step.dense(REFERENCE, [stretch]))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "fp8", "int8"])
def test_indexer_keys_of_every_number_format(backend, kind: RowKind):
    stored = problem(400, torch.float32, 6, indexer_kind=kind, integers=True)
    step = Step(40, 4, 64, (4, 64), torch.float32, 6, integers=True)
    stretch = stored.stretch(0, 40)
    ours, wanted = step.sets(backend, stretch, 50), step.sets(REFERENCE, stretch, 50)
    assert torch.equal(ours, wanted)


@FEW
@given(seed=SEEDS, index=st.sampled_from([(1, 32), (5, 128), (16, 64), (3, 48)]), length=st.integers(1, 700))
def test_int8_keys_meet_queries_rounded_to_int8(backend, seed, index, length):
    generator = torch.Generator().manual_seed(seed)
    stored = problem(length, torch.float32, seed, indexer_dim=index[1], indexer_kind="int8")
    # Codes that reach 127 have a power of two as their scale: scores of both backends are then exact.
    codes = torch.randint(-127, 128, (length, 1, index[1]), generator=generator).float()
    codes[..., 0] = 127
    form, scales = stored.blocks["indexer_k"].format, 2.0 ** torch.randint(-9, 3, (length, 1, 1), generator=generator)
    stored.memory["indexer_k"].view(-1, form.row_bytes)[:length] = form.encode(codes * scales)
    step = Step(1 + seed % min(length, 40), 4, 64, index, torch.float32, seed, integers=False)
    step.gate = torch.randint(-2, 3, step.gate.shape, generator=generator).float()
    stretch = stored.stretch(0, len(step.gate))
    ours, wanted = step.sets(backend, stretch, 60), step.sets(REFERENCE, stretch, 60)
    rounded = round_queries(step.indexer_q)
    assert torch.equal(rounded, round_queries(rounded)) and not torch.equal(rounded, step.indexer_q)
    keys = stored.indexer_keys(0, length).double()
    scores = (step.gate.unsqueeze(-1) * (rounded.double() @ keys.T).relu()).sum(1)
    for row, (a, b) in enumerate(zip(ours.tolist(), wanted.tolist(), strict=True)):
        for p, r in zip(sorted(set(a) - set(b)), sorted(set(b) - set(a)), strict=True):
            assert scores[row, p].item() == pytest.approx(scores[row, r].item(), rel=1e-5, abs=1e-5)
    exact = exact_topk(scores, stretch.first, 60)
    share = sum(len(set(a) & e) for a, e in zip(ours.tolist(), exact, strict=True)) / max(1, sum(map(len, exact)))
    assert share > 0.98


def exact_topk(scores: Tensor, first: int, topk: int) -> list[set[int]]:
    """The positions that have the greatest scores, the earlier of equals."""
    return [
        set(sorted(range(first + i + 1), key=lambda p, row=row: (-row[p], p))[:topk])
        for i, row in enumerate(scores.tolist())
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_queries_are_codes_times_powers_of_two(dtype):
    x = torch.randn(9, 4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0], x[1, 0, 0] = 0, 2**-13
    rounded, largest = round_queries(x).float(), x.float().abs().amax(-1, keepdim=True)
    step = torch.exp2(torch.ceil(torch.log2((largest / 127).clamp_min(2.0**-100))))
    assert torch.equal(rounded / step, (rounded / step).round()) and (rounded / step).abs().max() <= 127
    assert ((rounded - x.float()).abs() <= step / 2).all()


def test_several_sequences_in_one_call(backend):
    lengths, queries = (130, 700, 64, 65), (1, 33, 64, 2)
    stored = [problem(length, torch.float32, seed, integers=True) for seed, length in enumerate(lengths)]
    step, stretches, start = Step(100, 8, 64, (4, 64), torch.float32, 7, integers=True), [], 0
    for item, n in zip(stored, queries, strict=True):
        stretches.append(item.stretch(start, n))
        start += n
    assert near(step.sparse(backend, stretches, 40), step.sparse(REFERENCE, stretches, 40))
    assert near(step.dense(backend, stretches), step.dense(REFERENCE, stretches))


def test_a_mask_over_all_keys_is_the_same_function(backend):
    stored, step = problem(600, torch.float32, 8), Step(90, 8, 64, (4, 64), torch.float32, 8, integers=False)
    stretch = stored.stretch(0, 90)
    selected = [(0, step.sets(backend, stretch, 100))]
    union, masked = torch.zeros_like(step.q), torch.zeros_like(step.q)
    backend.attend(step.q, selected, stretch, union, kernel="union")
    backend.attend(step.q, selected, stretch, masked, kernel="masked")
    assert near(masked, union)


def test_counts_grow_by_one_at_every_selected_key(backend):
    stored, step = (
        problem(300, torch.float32, 9, integers=True),
        Step(50, 4, 64, (4, 64), torch.float32, 9, integers=True),
    )
    counts = torch.ones(400, dtype=torch.int64)
    stretch = stored.stretch(0, 50, counts=counts)
    step.sparse(backend, [stretch], 20)
    sets = step.sets(REFERENCE, stretch, 20)
    assert torch.equal(counts, 1 + torch.bincount(sets[sets >= 0], minlength=400))


def test_a_query_without_keys_gives_zeros(backend):
    stored, step = problem(100, torch.bfloat16, 10), Step(3, 4, 64, (4, 64), torch.bfloat16, 10, integers=False)
    positions = torch.tensor([[-1, -1, -1], [5, 9, -1], [-1, -1, -1]])
    out = torch.full_like(step.q, 7)
    backend.attend(step.q, [(0, positions)], stored.stretch(0, 3), out)
    assert (out[0] == 0).all() and (out[2] == 0).all() and (out[1] != 0).any()


def test_scores_that_are_no_numbers_are_the_smallest(backend):
    stored, step = problem(200, torch.float32, 11), Step(2, 4, 64, (4, 64), torch.float32, 11, integers=False)
    step.gate[0] = float("nan")
    sets = step.sets(backend, stored.stretch(0, 2), 10)
    assert sets[0].tolist() == list(range(10))
    assert (sets[1] >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fixed_results_do_not_depend_on_neighbours(backend, dtype):
    stored, step = problem(500, dtype, 12), Step(64, 8, 64, (4, 64), dtype, 12, integers=False)
    together = stored.stretch(0, 64, fixed=True)
    alone = [
        Stretch(i, i + 1, 436 + i, stored.rows, stored.indexer_keys, stored.blocks, fixed=True) for i in range(0, 64, 9)
    ]
    rows = [stretch.start for stretch in alone]
    assert torch.equal(step.sparse(backend, [together], 50)[rows], step.sparse(backend, alone, 50)[rows])
    assert torch.equal(step.dense(backend, [together])[rows], step.dense(backend, alone)[rows])


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_sets_decoded_in_tiles_do_not_depend_on_neighbours(backend, kind: RowKind):
    stored = problem(2500, torch.bfloat16, 13, kind=kind, groups=1)
    step = Step(8, 2, 64, (1, 32), torch.bfloat16, 13, integers=False)
    generator = torch.Generator().manual_seed(13)
    sets = torch.stack([torch.randperm(2400, generator=generator)[:777].sort().values for _ in range(8)])
    together, alone = torch.zeros_like(step.q), torch.zeros_like(step.q)
    backend.attend(step.q, [(0, sets)], stored.stretch(0, 8, fixed=True), together)
    for i in range(8):
        part = Stretch(i, i + 1, 2492 + i, stored.rows, blocks=stored.blocks, fixed=True)
        backend.attend(step.q, [(0, sets[i : i + 1])], part, alone)
    assert torch.equal(together, alone)


def test_rows_in_a_mapped_file(best_backend, tmp_path):
    stored, step = problem(5000, torch.bfloat16, 15), Step(4, 8, 64, (4, 64), torch.bfloat16, 15, integers=False)
    blocks, maps = dict(stored.blocks), []
    for name in ("k", "v"):
        path, rows, memory = tmp_path / name, stored.blocks[name], stored.memory[name]
        path.write_bytes(memory.numpy().tobytes())
        maps.append(torch.from_file(str(path), shared=False, size=memory.numel(), dtype=torch.uint8))
        addresses = rows.addresses - memory.data_ptr() + maps[-1].data_ptr()
        blocks[name] = replace(rows, addresses=addresses, mapped=True)
    stretch = stored.stretch(0, 4)
    from_file = replace(stretch, blocks=blocks)
    assert torch.equal(step.sparse(best_backend, [from_file], 300), step.sparse(best_backend, [stretch], 300))


def test_two_threads_give_what_one_gives(backend):
    stored, step = problem(900, torch.float32, 14), Step(300, 32, 64, (16, 64), torch.float32, 14, integers=False)
    stretch = stored.stretch(0, 300)
    item = step.sparse(backend, [stretch], 100)
    torch.set_num_threads(2)
    assert torch.equal(step.sparse(backend, [stretch], 100), item)


@pytest.mark.parametrize("queries", [1, 3])
def test_threads_share_the_keys_of_a_single_query(best_backend, queries):
    stored = problem(90_000, torch.float32, 16, groups=2, dim=16, indexer_dim=32, integers=True)
    counts = torch.zeros(90_000, dtype=torch.int64)
    step, stretch = Step(queries, 4, 16, (32, 32), torch.float32, 16, True), stored.stretch(0, queries, counts=counts)
    item = step.sparse(best_backend, [stretch], 500)
    torch.set_num_threads(3)
    assert torch.equal(step.sparse(best_backend, [stretch], 500), item)
    assert int(counts.max()) <= 2 * queries and int(counts.sum()) == 2 * queries * 500


def test_what_the_core_does_not_take(best_backend: CpuBackend):
    stored, step = problem(100, torch.float32), Step(1, 4, 64, (4, 64), torch.float32, 0, integers=False)
    stretch = stored.stretch(0, 1)
    assert best_backend.takes(step.q, stretch)
    assert not best_backend.takes(step.q.double(), stretch)
    assert not best_backend.takes(step.q[..., :63], stretch)
    assert not best_backend.takes(step.q, Stretch(0, 1, 99, stored.rows, stored.indexer_keys))
    latent = {"latent": stored.blocks["k"], "rope_k": stored.blocks["v"]}
    assert not best_backend.takes(step.q, replace(stretch, blocks=latent)), "rows of other names"
