"""Losses of pairs against trl's trainer of preferences, on the same log-probabilities."""

from __future__ import annotations

import sys
import types
from collections import defaultdict
from importlib.machinery import ModuleSpec
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from keye.train.preferences import Pairs, bco_loss, dpo_loss
from tests.support.oracles import oracle

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trainer() -> Any:
    """trl's class; `datasets` and `pandas`, which its module imports for reading and printing, stand in name alone."""
    for name in ("datasets", "datasets.fingerprint", "pandas"):
        if name not in sys.modules:
            module = types.ModuleType(name)
            module.__file__, module.__spec__ = name, ModuleSpec(name, None)
            module.__getattr__ = lambda attribute: type(attribute, (), {})  # type: ignore[method-assign]
            sys.modules[name] = module
    return oracle("trl.trainer.dpo_trainer").DPOTrainer


def trl_loss(trainer: Any, kinds: list[str], weights: list[float], tokens: torch.Tensor, reference: Pairs) -> Any:
    """The loss of replies that are all tokens after the first, with log-probabilities `tokens` [2n, L]."""
    count, length = tokens.shape
    zeros = torch.zeros(count, length)
    outputs = types.SimpleNamespace(log_probs=tokens, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    accelerator = types.SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    own = MagicMock(
        accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, beta=0.3,
        f_divergence_type="reverse_kl", loss_types=kinds, loss_weights=weights, use_weighting=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(count, length + 1, dtype=torch.int64),
        "attention_mask": torch.ones(count, length + 1),
        "completion_mask": torch.cat((torch.zeros(count, 1), torch.ones(count, length)), 1).long(),
        "ref_chosen_logps": reference.reference_chosen, "ref_rejected_logps": reference.reference_rejected,
    }  # fmt: skip
    return trainer._compute_loss(own, lambda **_: outputs, inputs, False)


@pytest.mark.parametrize(
    ("kinds", "weights"),
    [(["sigmoid"], [1.0]), (["bco_pair"], [1.0]), (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])],
)
def test_losses_and_gradients_are_those_of_trl(trainer: Any, kinds: list[str], weights: list[float]) -> None:
    generator = torch.Generator().manual_seed(0)
    n, length = 3, 5
    tokens = (-torch.rand(2 * n, length, generator=generator)).requires_grad_()
    chosen, rejected = tokens.sum(1).chunk(2)
    pairs = Pairs(chosen, rejected, chosen.detach() - 0.2, rejected.detach() + torch.tensor([0.1, -0.4, 0.3]))
    terms = {"sigmoid": dpo_loss(pairs, 0.3), "bco_pair": bco_loss(pairs, 0.3, 0.0), "sft": -chosen / length}
    own = sum(weight * terms[kind].mean() for kind, weight in zip(kinds, weights, strict=True))
    theirs = trl_loss(trainer, kinds, weights, tokens, pairs)
    torch.testing.assert_close(own, theirs, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(loss, tokens, retain_graph=True)[0] for loss in (own, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
