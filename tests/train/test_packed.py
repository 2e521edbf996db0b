"""The training step equals inference, line by line of its trees, and its losses keep to their own weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from keye.cache.sequence import KVCache
from keye.models.attention import CachedStep, IndexerOutput, Span
from keye.models.keye import KeyeModel
from keye.train.losses import load_balance, router_z
from keye.train.packed import AttentionHint, TreeStep
from tests.support.latent import latent_model
from tests.support.tiny import tiny_model

#: Two videos; two questions about the first, one of them with two replies; padding before the second and at the end.
SEGMENTS = torch.tensor([[0, 21, -1], [21, 26, 0], [26, 29, 1], [29, 37, 1], [37, 41, 0], [44, 50, -1], [50, 52, 5]])
LENGTH = 54
DEPTHS = [0, 21, 26, 26, 21, 0, 6]


@pytest.fixture(scope="module")
def model() -> KeyeModel:
    return tiny_model(seed=3, topk=8).model


def tokens(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids [T], and positions [3, T] that count on from the segment above."""
    ids = torch.randint(20, 90, (LENGTH,), generator=torch.Generator().manual_seed(seed))
    positions = torch.zeros(LENGTH, dtype=torch.int64)
    for (start, stop, _), depth in zip(SEGMENTS.tolist(), DEPTHS, strict=True):
        positions[start:stop] = depth + torch.arange(stop - start)
    return ids, positions.expand(3, -1)


def line_of(segment: int) -> Tensor:
    """The tokens that the last one of a segment sees."""
    start, stop, above = SEGMENTS[segment].tolist()
    own = torch.arange(start, stop)
    return own if above < 0 else torch.cat((line_of(above), own))


def run(model: KeyeModel, mode: Any = "dense", ids: Tensor | None = None, **options: Any) -> tuple[Tensor, TreeStep]:
    step = TreeStep(SEGMENTS, model.config.text, mode, **options)
    every, positions = tokens()
    return model(model.embed(every if ids is None else ids), positions, step), step


@pytest.mark.parametrize("mode", ["dense", "warmup", "sparse"])
@torch.no_grad()
def test_every_line_equals_its_own_prompt(model: KeyeModel, mode: Any) -> None:
    ids, positions = tokens()
    hidden, _ = run(model, mode)
    text, cached = model.config.text, "sparse" if mode == "sparse" else "dense"
    for segment in range(len(SEGMENTS)):
        line = line_of(segment)
        step = CachedStep([Span(0, len(line), KVCache(text.num_hidden_layers))], text, mode=cached)  # type: ignore[arg-type]
        alone = model(model.embed(ids[line]), positions[:, line], step)
        torch.testing.assert_close(hidden[line], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["dense", "warmup", "sparse"])
@torch.no_grad()
def test_nothing_leaks_between_branches(model: KeyeModel, mode: str) -> None:
    before, _ = run(model, mode)
    for segment in (2, 3, 4, 5, 6):
        ids, _ = tokens()
        start, stop, _ = SEGMENTS[segment].tolist()
        ids[start:stop] = ids[start:stop] % 60 + 100
        after, _ = run(model, mode, ids)
        below = [s for s in range(len(SEGMENTS)) if start in line_of(s)]
        others = [s for s in range(len(SEGMENTS)) if s not in below]
        seen = torch.cat([torch.arange(*SEGMENTS[s, :2].tolist()) for s in others])
        most = 1e-5 if mode == "sparse" else 0.0  # sums over chosen keys may have another order
        assert float((after[seen] - before[seen]).abs().max()) <= most
        assert float((after[start:stop] - before[start:stop]).abs().min(1).values.max()) > 0.0


@pytest.mark.parametrize("mode", ["dense", "warmup", "sparse"])
def test_no_gradient_leaks_between_branches(model: KeyeModel, mode: Any) -> None:
    ids, positions = tokens()
    for segment in (2, 3, 4, 5, 6):
        x = model.embed(ids).detach().requires_grad_()
        hidden = model(x, positions, TreeStep(SEGMENTS, model.config.text, mode))
        line = line_of(segment)
        (gradient,) = torch.autograd.grad(hidden[line[-1]].square().sum(), x)
        outside = torch.ones(LENGTH, dtype=torch.bool).index_fill(0, line, False)
        assert float(gradient[outside].abs().max()) == 0.0 < float(gradient[line].abs().max())


def test_padding_changes_nothing(model: KeyeModel) -> None:
    ids, _ = tokens()
    inside = torch.cat([torch.arange(start, stop) for start, stop, _ in SEGMENTS.tolist()])
    outside = torch.ones(LENGTH, dtype=torch.bool).index_fill(0, inside, False)
    results = []
    for filler in (3, 77):
        hidden, step = run(model, "sparse", torch.where(outside, filler, ids))
        results.append((hidden[inside], step.kl(), step.balance(), step.z()))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("mode", ["warmup", "sparse"])
def test_indexer_loss_teaches_only_the_indexer(mode: str) -> None:
    model = tiny_model(topk=8).model.train()
    _, step = run(model, mode)
    step.kl().backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert touched == {n for n, _ in model.named_parameters() if ".sa_indexer." in n}


@pytest.mark.parametrize("mode", ["dense", "warmup", "sparse"])
def test_next_token_loss_leaves_the_indexer_alone(mode: str) -> None:
    model = tiny_model(topk=8).model.train()
    hidden, _ = run(model, mode)
    model.logits(hidden).log_softmax(-1).mean().backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    trunk = {n for n, _ in model.named_parameters() if n.startswith(("model.", "lm_head")) and ".sa_indexer." not in n}
    assert touched == trunk


def visible() -> Tensor:
    """bool [T, T]: which keys each token sees."""
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for segment, (start, stop, _) in enumerate(SEGMENTS.tolist()):
        line = line_of(segment)
        for token in range(start, stop):
            mask[token, line[line <= token]] = True
    return mask


@pytest.mark.parametrize("mode", ["warmup", "sparse"])
def test_losses_equal_their_definitions(mode: Any) -> None:
    """KL, hints, balance and z against plain matrices of all tokens."""
    config, generator = tiny_model(topk=8).model.config.text, torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = drawn(LENGTH, 2, 32), drawn(LENGTH, 1, 32), drawn(LENGTH, 1, 32)
    index = drawn(LENGTH, 2, 16).abs(), drawn(LENGTH, 16).abs(), drawn(LENGTH, 2)  # no two scores are equal
    targets = torch.zeros(2, 21, dtype=torch.bool)
    targets[0, 3:6] = targets[1, 20] = True
    hint = AttentionHint("time", 1, torch.tensor([28, 40]), torch.tensor([0, 0]), targets, head=1)
    step = TreeStep(SEGMENTS, config, mode, hints=[hint])
    out = step.attend(1, q, k, v, IndexerOutput(*index))
    mask = visible()
    scores = torch.einsum("tj,tjs->ts", index[2], torch.einsum("tji,si->tjs", index[0], index[1]).relu())
    if mode == "sparse":
        best = scores.masked_fill(~mask, -torch.inf).topk(8).indices
        mask = mask & torch.zeros_like(mask).scatter_(1, best, True)
    logits = torch.einsum("thd,sd->hts", q, k[:, 0]) * 32**-0.5
    probs = logits.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num()
    torch.testing.assert_close(out, torch.einsum("hts,sd->thd", probs, v[:, 0]))
    inside, teacher = mask.any(1), probs.mean(0)
    student = scores.masked_fill(~mask, -torch.inf)[inside].log_softmax(-1)
    kl = (teacher[inside] * (teacher[inside].clamp_min(1e-30).log() - student)).nan_to_num().sum(-1)
    torch.testing.assert_close(step.kl(), kl.mean(), rtol=1e-5, atol=1e-6)
    share = torch.stack([logits[1, 28, :21].softmax(-1)[3:6].sum(), logits[1, 40, :21].softmax(-1)[20]])
    torch.testing.assert_close(step.hint_losses["time"], -share.log().mean())


def test_router_losses_of_two_processes_add_up_to_those_of_one() -> None:
    config, generator = tiny_model().model.config.text, torch.Generator().manual_seed(1)
    logits = [torch.randn(10, 4, generator=generator) for _ in range(2)]
    chosen = [each.topk(2).indices for each in logits]
    together = TreeStep(torch.tensor([[0, 20, -1]]), config)
    together.observe_router(0, torch.cat(logits), torch.cat(chosen))
    torch.testing.assert_close(together.balance(), load_balance(torch.cat(logits), torch.cat(chosen)))
    torch.testing.assert_close(together.z(), router_z(torch.cat(logits)))
    parts = [TreeStep(torch.tensor([[0, 10, -1]]), config) for _ in range(2)]
    for part, each, experts in zip(parts, logits, chosen, strict=True):
        part.observe_router(0, each, experts)
    counts = parts[0].expert_counts() + parts[1].expert_counts()
    torch.testing.assert_close(sum(part.balance(counts, 20) for part in parts), together.balance())
    torch.testing.assert_close(sum(part.z(20) for part in parts), together.z())


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_computing_layers_again_changes_nothing(mode: str) -> None:
    results = []
    for recompute in (False, True):
        model = tiny_model(topk=8).model.train()
        model.model.recompute = recompute
        hidden, step = run(model, mode, watch=(0,))
        loss = hidden.square().mean() + step.balance() + step.z() + step.hidden[0].square().mean()
        if mode == "sparse":
            loss = loss + step.kl()
        loss.backward()
        assert len(step.routers) == 2 and len(step.indexer) == (2 if mode == "sparse" else 0)
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_latent_attention_is_trained_over_trees() -> None:
    model = latent_model()
    hidden, _ = run(model)
    ids, positions = tokens()
    for segment in (3, 6):
        line = line_of(segment)
        step = TreeStep(torch.tensor([[0, len(line), -1]]), model.config.text)
        alone = model(model.embed(ids[line]), positions[:, line], step)
        torch.testing.assert_close(hidden[line], alone, rtol=1e-4, atol=1e-4)
