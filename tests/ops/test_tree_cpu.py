"""Attention in training by the compiled core against the definition, in every variant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keye.ops import tree_tiles
from keye.ops.backend import Stretch
from keye.ops.cpu import train
from keye.ops.cpu.backend import CpuBackend
from keye.ops.kv_blocks import KV_BLOCK, BlockRows, RowFormat
from keye.ops.tree import select_keys
from keye.ops.tree_tiles import Needs, Operands, Segment
from tests.ops.tree_cases import Tree, make_operands, make_tree

FEW = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
#: Relative to the largest number of a tensor.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
BOTH = Needs(attention=True, indexer=True)


def compare(name, ours, wanted, dtype):
    assert ours.dtype == wanted.dtype, name
    finite = wanted.isfinite()
    assert torch.equal(ours.isfinite(), finite), name
    ours, wanted = ours[finite].float(), wanted[finite].float()
    bound = TOLERANCE[dtype] * max(3.0, float(wanted.abs().max()))  # numbers that all are 0 were sums of larger ones
    assert float((ours - wanted).abs().max()) <= bound, name


@FEW
@given(
    seed=st.integers(0, 2**32 - 1),
    heads=st.sampled_from([(2, 2), (4, 2), (8, 2), (6, 1), (16, 1)]),
    dim=st.sampled_from([32, 64, 96]),
    indexer=st.sampled_from([(1, 32), (3, 32), (8, 64), (16, 32)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    topk=st.integers(1, 150),
    threads=st.sampled_from([1, 2]),
)
def test_sparse_attention_is_the_definition(backend, seed, heads, dim, indexer, dtype, topk, threads):
    tree = make_tree(seed, trunk=300, branch=40)
    operands = make_operands(tree, seed, dtype, *heads, dim=dim, indexer=indexer)
    operands = Operands(*(x.detach() for x in operands))
    core = backend.library()
    assert train.takes(operands, torch.zeros(0))
    torch.set_num_threads(threads)
    sets = select_keys(operands.q, operands.k, *operands[3:], tree.segments, topk)
    wanted, wanted_kl = tree_tiles.forward(operands, tree.segments, sets, teach=True)
    ours, kl = train.forward(core, operands, tree.segments, sets, teach=True)
    for name, a, b in zip(ours._fields, ours, wanted, strict=True):
        compare(name, a, b, dtype)
    assert float(kl) == pytest.approx(float(wanted_kl), rel=1e-3 if dtype != torch.float32 else 1e-5, abs=1e-3)
    upstream, slope = torch.randn(wanted.out.shape, generator=torch.Generator().manual_seed(seed)).to(dtype), 0.3
    for needs in (BOTH, Needs(attention=True, indexer=False), Needs(attention=False, indexer=True)):
        used = operands if needs.indexer else Operands(*operands[:3])
        rest = (upstream, torch.tensor(slope), needs)
        gradients = train.backward(core, used, tree.segments, sets, ours, *rest)
        expected = tree_tiles.backward(used, tree.segments, sets, wanted, *rest)
        for name, a, b in zip(Operands._fields, gradients, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                compare(f"gradient of {name}", a, b, dtype)


@FEW
@given(
    seed=st.integers(0, 2**32 - 1),
    heads=st.sampled_from([(2, 2), (4, 2), (8, 1), (3, 3), (32, 1)]),
    dim=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    threads=st.sampled_from([1, 2]),
)
def test_dense_attention_is_the_definition(backend, seed, heads, dim, dtype, threads):
    tree = make_tree(seed, trunk=500, branch=40)
    operands = make_operands(tree, seed, dtype, *heads, dim=dim)
    operands = Operands(*(x.detach() for x in operands[:3]))
    core, needs = backend.library(), Needs(attention=True, indexer=False)
    assert train.takes(operands, None)
    torch.set_num_threads(threads)
    wanted, _ = tree_tiles.forward(operands, tree.segments, None, teach=False)
    ours, _ = train.forward(core, operands, tree.segments, None, teach=False)
    compare("out", ours.out, wanted.out, dtype)
    compare("lse", ours.lse, wanted.lse, dtype)
    generator, zero = torch.Generator().manual_seed(seed), torch.zeros(())
    upstream = torch.randn(wanted.out.shape, generator=generator).to(dtype)
    gradients = train.backward(core, operands, tree.segments, None, ours, upstream, zero, needs)
    expected = tree_tiles.backward(operands, tree.segments, None, wanted, upstream, zero, needs)
    for name, a, b in zip("qkv", gradients, expected, strict=False):
        compare(f"gradient of {name}", a, b, dtype)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_those_of_inference_to_the_last_bit(best_backend, mode, dtype):
    """A video with questions, each against its own sequence in KV blocks."""
    trunk, branch, topk = 430, 37, 64
    video = (3, 3 + trunk)  # rows of keys are numbered apart from those of queries
    segments = [Segment(0, trunk, (video,), 0)]
    for i in range(4):
        start = video[1] + i * branch
        segments.append(Segment(start - 3, start - 3 + branch, (video, (start, start + branch)), trunk))
    tree = Tree(tuple(segments), segments[-1].stop, segments[-1].stop + 3)
    operands = Operands(*(x.detach() for x in make_operands(tree, 0, dtype, 4, 2, dim=64, indexer=(4, 32))))
    core = best_backend.library()
    backend = CpuBackend(Path(core._name))
    sets = select_keys(operands.q, operands.k, *operands[3:], tree.segments, topk) if mode == "sparse" else None
    used = operands if mode == "sparse" else Operands(*operands[:3])
    out = train.forward(core, used, tree.segments, sets, teach=mode == "sparse")[0].out
    for segment in segments[1:]:
        rows = segment.rows(0, segment.length, out.device)
        parts = {"k": operands.k, "v": operands.v, "indexer_k": operands.indexer_k[:, None]}
        blocks, n = {name: stored(x[rows]) for name, x in parts.items()}, len(rows)
        memory = [own for _, own in blocks.values()]
        stretch = Stretch(0, n, 0, None, None, {name: rows for name, (rows, _) in blocks.items()})
        queries = torch.cat((torch.arange(trunk), torch.arange(segment.start, segment.stop)))
        wanted = torch.empty(n, 4, 64, dtype=dtype)
        if mode == "dense":
            backend.dense(operands.q[queries], [stretch], wanted)
        else:
            q, indexer_q, gate = (x[queries] for x in (operands.q, operands.indexer_q, operands.gate))
            backend.sparse(q, indexer_q, gate, [stretch], topk, wanted)
        del memory
        last = n - n % 32 if n % 32 < 4 else n  # inference takes a few last queries apart
        assert torch.equal(out[queries][:last], wanted[:last])


def stored(x):
    """Rows [N, heads, dim] in KV blocks, and the memory that they are in."""
    form = RowFormat("float32" if x.dtype == torch.float32 else "bfloat16", *x.shape[1:])
    memory = torch.zeros(-(-len(x) // KV_BLOCK), KV_BLOCK, form.row_bytes, dtype=torch.uint8)
    memory.view(-1, form.row_bytes)[: len(x)] = form.encode(x)
    return BlockRows(form, memory.data_ptr() + torch.arange(len(memory)) * form.block_bytes), memory
