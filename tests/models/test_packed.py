"""The training step equals inference, branch by branch, and its two losses keep to their own weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from keye.models.keye import KeyeModel
from keye.train import packed
from keye.train.packed import PackedStep

TRUNK, WINDOW, TAIL = 21, 10, 20
#: Two sequences of two windows: branches of 6, 4 and 5 tokens; of 9 and 8 tokens. Padding ends a window.
BRANCH = torch.tensor([[0] * 6 + [1] * 4 + [2] * 5 + [-1] * 5, [0] * 9 + [-1] + [1] * 8 + [-1] * 2])


def packed_inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids [B, N] and positions [3, B, N]: every branch counts on from the end of its trunk."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 90, (2, TRUNK + TAIL), generator=generator)
    positions = torch.zeros(2, TRUNK + TAIL, dtype=torch.int64)
    positions[:, :TRUNK] = torch.arange(TRUNK)
    for b in range(2):
        for branch in BRANCH[b].unique().tolist():
            members = (BRANCH[b] == branch).nonzero().flatten()
            positions[b, TRUNK + members] = TRUNK + torch.arange(len(members))
    return ids, positions.expand(3, -1, -1)


def run_packed(model: KeyeModel, mode: Any, **options: Any) -> tuple[Tensor, PackedStep]:
    ids, positions = packed_inputs()
    step = PackedStep(BRANCH, TRUNK, window=WINDOW, mode=mode, topk=model.config.text.sparse.topk, **options)
    hidden = model(model.embed(ids.flatten()), positions.flatten(1), step)
    return model.logits(hidden).unflatten(0, ids.shape), step


@pytest.mark.parametrize("trunk_block", [packed.TRUNK_BLOCK, 8])
@pytest.mark.parametrize(("mode", "cached"), [("dense", "dense"), ("warmup", "dense"), ("sparse", "sparse")])
def test_branches_equal_their_own_prompts(
    mode: str, cached: str, trunk_block: int, make_model: Any, make_prompt: Any, run_chunks: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(packed, "TRUNK_BLOCK", trunk_block)
    model = make_model()
    ids, positions = packed_inputs()
    with torch.no_grad():
        logits, _ = run_packed(model, mode)
    for b in range(2):
        for branch in range(int(BRANCH[b].max()) + 1):
            remaining = torch.cat((torch.arange(TRUNK), TRUNK + (BRANCH[b] == branch).nonzero().flatten()))
            prompt = make_prompt(0, len(remaining))
            prompt.ids, prompt.positions = ids[b, remaining], positions[:, b, remaining]
            alone = run_chunks(model, prompt, [len(remaining)], cached)
            torch.testing.assert_close(logits[b, remaining], alone, rtol=0, atol=1e-4)


def test_padding_changes_nothing(make_model: Any) -> None:
    model = make_model()
    ids, positions = packed_inputs()
    outputs = []
    for filler in (3, 77):
        filled = ids.clone()
        filled[:, TRUNK:][BRANCH < 0] = filler
        step = PackedStep(BRANCH, TRUNK, window=WINDOW, mode="sparse", topk=8)
        with torch.no_grad():
            hidden = model(model.embed(filled.flatten()), positions.flatten(1), step)
        outputs.append(hidden.unflatten(0, ids.shape))
        assert torch.isfinite(hidden).all()
    real = torch.cat((torch.ones(2, TRUNK, dtype=torch.bool), BRANCH >= 0), dim=1)
    torch.testing.assert_close(outputs[0][real], outputs[1][real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["warmup", "sparse"])
def test_indexer_loss_teaches_only_the_indexer(mode: str, make_model: Any) -> None:
    model = make_model().train()
    _, step = run_packed(model, mode)
    step.indexer_kl().backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert touched == {n for n, _ in model.named_parameters() if ".sa_indexer." in n}


@pytest.mark.parametrize("mode", ["dense", "warmup", "sparse"])
def test_next_token_loss_leaves_the_indexer_alone(mode: str, make_model: Any) -> None:
    model = make_model().train()
    logits, _ = run_packed(model, mode)
    logits[:, :-1].flatten(0, 1).log_softmax(-1).mean().backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert not any(".sa_indexer." in n for n in touched)
    trunk = {n for n, _ in model.named_parameters() if n.startswith(("model.", "lm_head")) and ".sa_indexer." not in n}
    assert touched == trunk


def test_indexer_loss_is_zero_for_a_perfect_indexer_and_positive_otherwise(make_model: Any) -> None:
    """With keys that all look alike, attention and indexer are both uniform over the causal past."""
    model = make_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.sa_indexer.q_proj.weight.zero_()
        _, step = run_packed(model, "warmup")
        assert abs(float(step.indexer_kl())) < 1e-5
        _, other = run_packed(make_model(), "warmup")
    assert float(other.indexer_kl()) > 1e-3


def test_balance_loss_is_one_when_routing_is_even(make_model: Any) -> None:
    step = PackedStep(BRANCH, TRUNK, window=WINDOW)
    chosen = torch.arange(16).view(8, 2) % 4
    step.observe_router(0, torch.zeros(8, 4), chosen)
    assert float(step.balance_loss()) == pytest.approx(1.0)
    step.observe_router(1, torch.tensor([[9.0, 0, 0, 0]]).expand(8, 4), torch.zeros(8, 2, dtype=torch.int64))
    assert float(step.balance_loss()) > 2.0


def test_watched_layers_are_kept(make_model: Any) -> None:
    with torch.no_grad():
        _, step = run_packed(make_model(), "dense", watch=(1,))
    assert list(step.hidden) == [1]
    assert step.hidden[1].shape == (2 * (TRUNK + TAIL), 48)


def test_a_step_without_questions(make_model: Any, make_prompt: Any, run_chunks: Any) -> None:
    """A tail of no tokens is a batch of plain sequences."""
    model, prompts = make_model(), [make_prompt(seed, 30) for seed in range(2)]
    for mode in ("dense", "sparse"):
        step = PackedStep(torch.zeros(2, 0, dtype=torch.int64), 30, window=1, mode=mode, topk=8)  # type: ignore[arg-type]
        ids, positions = torch.cat([p.ids for p in prompts]), torch.cat([p.positions for p in prompts], dim=1)
        with torch.no_grad():
            logits = model.logits(model(model.embed(ids), positions, step)).unflatten(0, (2, 30))
        for b, prompt in enumerate(prompts):
            torch.testing.assert_close(logits[b], run_chunks(model, prompt, [30], mode), rtol=0, atol=1e-4)
