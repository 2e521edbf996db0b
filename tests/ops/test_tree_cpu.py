"""Attention in training by the compiled core against the definition, in every variant."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keye.ops import tree_tiles
from keye.ops.cpu import train
from keye.ops.tree import select_keys
from keye.ops.tree_tiles import Needs, Operands
from tests.ops.tree_cases import make_operands, make_tree

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
    assert train.takes(operands)
    torch.set_num_threads(threads)
    sets = select_keys(operands.q, operands.k, *operands[3:], tree.segments, topk)
    wanted, wanted_kl = tree_tiles.forward(operands, tree.segments, sets, teach=True)
    ours, kl = train.forward(core, operands, sets, teach=True)
    for name, a, b in zip(ours._fields, ours, wanted, strict=True):
        compare(name, a, b, dtype)
    assert float(kl) == pytest.approx(float(wanted_kl), rel=1e-3 if dtype != torch.float32 else 1e-5, abs=1e-3)
    upstream, slope = torch.randn(wanted.out.shape, generator=torch.Generator().manual_seed(seed)).to(dtype), 0.3
    for needs in (BOTH, Needs(attention=True, indexer=False), Needs(attention=False, indexer=True)):
        used = operands if needs.indexer else Operands(*operands[:3])
        gradients = zip(
            Operands._fields, train.backward(core, used, sets, ours, upstream, torch.tensor(slope), needs),
            tree_tiles.backward(used, tree.segments, sets, wanted, upstream, torch.tensor(slope), needs), strict=True,
        )  # fmt: skip
        for name, a, b in gradients:
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                compare(f"gradient of {name}", a, b, dtype)
