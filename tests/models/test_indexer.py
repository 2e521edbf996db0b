"""The indexer gives training and inference the same numbers: a last bit of difference would select other keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from keye.models.attention import Indexer
from keye.ops import registry
from tests.support.tiny import tiny_model


@pytest.mark.parametrize("width", [64, registry.NATIVE_WIDTH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_and_inference_give_the_same_numbers(width: int, dtype: torch.dtype) -> None:
    text = tiny_model().model.config.text
    assert text.sparse is not None
    torch.manual_seed(0)
    with torch.random.fork_rng():
        indexer = Indexer(replace(text, hidden_size=width, sparse=replace(text.sparse, indexer_head_dim=32))).to(dtype)
    x, (cos, sin) = torch.randn(50, width).to(dtype), torch.randn(2, 50, 16)
    for module in indexer.modules():
        module.elementwise = registry.find_elementwise(x.device, width)  # type: ignore[assignment]
    trained = indexer.train()(x, cos, sin)
    with torch.no_grad():
        used = indexer.eval()(x, cos, sin)
    assert trained.q.requires_grad and trained.k.requires_grad and trained.gate.requires_grad
    for ours, wanted in zip(trained, used, strict=True):
        assert torch.equal(ours, wanted)
