"""What gradients of the family's objectives reach, and that the losses are those of naive versions."""

import pytest
import torch

from keye.train.optim import mark_trainable
from keye.train.recipe import move_batch
from keye.train.recipes.family.objectives import NextToken
from keye.train.tree import IGNORE
from tests.support.family import all_steps, family_stage, first_micro, talk, tiny_network, write_rows
from tests.support.tiny import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("family") / "model", weights=False)
    write_rows(folder / "data.jsonl", [talk(f"What is {n}?", f"red circle {n}", weight=1 + n % 2) for n in range(6)])
    return folder


def gradients(folder, **fields):
    stage = family_stage(folder / "data.jsonl", **fields)
    model = tiny_network()
    trained = {each.name for each in mark_trainable(model, stage)}
    objective = NextToken(stage, model)
    micro, count = first_micro(stage, folder)
    loss = objective.loss(model, micro, count)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(grads) <= trained
    return loss.detach(), {name: grad for name, grad in grads.items() if bool(grad.any())}, objective.figures.take()


def is_indexer(name):
    return ".sa_indexer." in name


def test_the_loss_is_the_weighted_mean_cross_entropy(folder):
    loss, _, figures = gradients(folder, balance=0.0, router_z=0.0)
    stage = family_stage(folder / "data.jsonl")
    micro, count = first_micro(stage, folder)
    model = tiny_network()
    hidden, _ = NextToken(stage, model).forward(model, micro)
    log_probs = model.logits(hidden).log_softmax(-1).detach()
    naive = sum(
        -float(micro.weights[row] * log_probs[row, label])
        for row, label in enumerate(micro.labels.tolist()) if label != IGNORE
    ) / float(micro.weights.sum())  # fmt: skip
    assert float(loss) == pytest.approx(naive, rel=1e-5)
    assert figures["loss"] == pytest.approx(naive, rel=1e-5)
    assert count == float(micro.weights.sum())


def test_next_tokens_never_train_the_indexer(folder):
    _, with_kl, _ = gradients(folder, attention="sparse")
    _, without, _ = gradients(folder, attention="sparse", indexer_kl=0.0)
    assert any(map(is_indexer, with_kl))
    assert not any(map(is_indexer, without))


def test_the_indexer_loss_never_trains_the_trunk(folder):
    _, with_kl, _ = gradients(folder, attention="sparse")
    _, without, _ = gradients(folder, attention="sparse", indexer_kl=0.0)
    trunk = {name for name in with_kl if not is_indexer(name)}
    assert trunk == without.keys()
    assert all(torch.equal(with_kl[name], without[name]) for name in trunk)


def test_the_warm_up_trains_indexers_alone(folder):
    _, grads, figures = gradients(folder, attention="warmup", trains="indexer")
    assert grads and all(map(is_indexer, grads))
    assert "kl" in figures and "loss" not in figures


@pytest.mark.parametrize("trains", ["decoder", "head", "embeddings", "experts", "router", ["attention", "norms"]])
def test_frozen_parts_get_no_gradient(folder, trains):
    _, grads, _ = gradients(folder, trains=trains)
    assert grads


@pytest.mark.parametrize("size", [1, 2])
def test_any_division_of_a_step_has_the_same_gradient(folder, size):
    """Gradients of micro-batches and processes add up to that of the tokens together."""
    sums = []
    for batch, max_tokens, ranks in ((1, 256, 1), (4, 64, size)):
        stage = family_stage(folder / "data.jsonl", batch=batch, max_tokens=max_tokens, balance=0.0)
        model, total = tiny_network(), 0.0
        mark_trainable(model, stage)
        objective = NextToken(stage, model)
        for rank in range(ranks):
            (step,) = all_steps(stage, folder, rank=rank, size=ranks)
            for micro in step.micro:
                loss = objective.loss(model, move_batch(micro, torch.device("cpu")), step.count)
                loss.backward()
                total += float(loss.detach())
        sums.append((total, model.model.layers[0].self_attn.q_proj.weight.grad.clone()))
    assert sums[0][0] == pytest.approx(sums[1][0], rel=1e-5)
    torch.testing.assert_close(sums[0][1], sums[1][1], rtol=1e-4, atol=1e-6)


def test_experts_are_balanced_by_what_all_processes_chose_in_the_last_step(folder):
    stage = family_stage(folder / "data.jsonl", batch=4, max_tokens=64, balance=1.0)
    sums = []
    for ranks in (1, 2, 3):
        model = tiny_network()
        mark_trainable(model, stage)
        objectives = [NextToken(stage, model) for _ in range(ranks)]
        for _ in range(2):
            model.zero_grad()
            counts = []
            for rank, objective in enumerate(objectives):
                (step,) = all_steps(stage, folder, rank=rank, size=ranks)
                for micro in step.micro:
                    objective.loss(model, move_batch(micro, torch.device("cpu")), step.count).backward()
                objective.finish_step(lambda tensors, counts=counts: counts.append(tensors[0]))
            for objective in objectives:  # what the sum over processes gives each
                objective.heads.expert_counts.copy_(sum(counts))
        sums.append(model.model.layers[1].mlp.gate.weight.grad.clone())
    for other in sums[1:]:
        torch.testing.assert_close(sums[0], other, rtol=1e-4, atol=1e-6)
