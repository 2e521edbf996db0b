"""Cases of the Triton kernels of training against the definition. `test_triton.py` runs them with TRITON_INTERPRET=1,
and `make gpu` on a card with KEYE_TEST_DEVICE=cuda."""

from __future__ import annotations

import os

import pytest
import torch

from keye.ops import tree_tiles
from keye.ops.tree import select_keys
from keye.ops.tree_tiles import Needs, Operands
from keye.ops.triton import train
from tests.ops.tree_cases import make_operands, make_tree

DEVICE = torch.device(os.environ.get("KEYE_TEST_DEVICE", "cpu"))
NEAR = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize(("dtype", "heads"), [(torch.float32, (4, 2)), (torch.bfloat16, (3, 1))])
def test_training_is_the_definition(dtype, heads):
    tree = make_tree(3, trees=1, trunk=20, branch=5)
    operands = make_operands(tree, 3, dtype, *heads, dim=32, indexer=(3, 16))
    operands = Operands(*(x.detach().to(DEVICE) for x in operands))
    sets = select_keys(operands.q, operands.k, *operands[3:], tree.segments, 11)
    assert train.takes(operands, sets)
    wanted, wanted_kl = tree_tiles.forward(operands, tree.segments, sets, teach=True)
    ours, kl = train.forward(operands, tree.segments, sets, teach=True)
    upstream = torch.randn(wanted.out.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    rest = (upstream, torch.tensor(0.3, device=DEVICE), Needs(attention=True, indexer=True))
    pairs = [*zip(ours, wanted, strict=True), (kl, wanted_kl)]
    pairs += zip(
        train.backward(operands, tree.segments, sets, ours, *rest),
        tree_tiles.backward(operands, tree.segments, sets, wanted, *rest), strict=True,
    )  # fmt: skip
    for a, b in pairs:
        assert a.dtype == b.dtype
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite)
        bound = NEAR[dtype] * max(3.0, float(b[finite].abs().max()))
        assert float((a[finite].float() - b[finite].float()).abs().max()) <= bound
