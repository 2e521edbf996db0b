"""Pairs of replies in packs: log-probabilities, the reference, the losses over them."""

import math

import pytest
import torch

from keye.errors import KeyeError
from keye.train.optim import mark_trainable
from keye.train.recipe import move_batch
from keye.train.recipes.family.config import FamilyConfig
from keye.train.recipes.family.preference import PreferenceObjective, compute_reference
from keye.train.recipes.family.recipe import FamilyRecipe
from tests.support.family import all_steps, family_stage, first_micro, talk, tiny_network, write_rows
from tests.support.tiny import tiny_folder

ROWS = [talk(f"What is {n}?", f"red circle {n}", rejected_response=f"blue star {n} and {n}") for n in range(4)]


@pytest.fixture
def folder(tmp_path):
    folder = tiny_folder(tmp_path / "model", weights=False)
    write_rows(folder / "data.jsonl", ROWS)
    return folder


def a_stage(folder, **fields):
    return family_stage(folder / "data.jsonl", **{"objective": "mpo", "balance": 0.0} | fields)


def test_replies_in_a_pack_are_as_likely_as_alone(folder):
    model = tiny_network()
    compute_reference(a_stage(folder), model, folder)
    together, _ = first_micro(a_stage(folder, max_tokens=256), folder)
    assert len(together.places) == 4
    sums = PreferenceObjective(a_stage(folder), model).reply_log_probs(model, together.packed).sums
    torch.testing.assert_close(together.reference, sums.detach(), rtol=1e-4, atol=1e-4)
    for row in range(4):
        for column, text in enumerate((f"red circle {row}", f"blue star {row} and {row}")):
            plain = write_rows(folder / "one.jsonl", [talk(f"What is {row}?", text)])
            micro, _ = first_micro(family_stage(plain), folder)
            objective = PreferenceObjective(a_stage(folder), model)
            hidden, _ = objective.forward(model, micro)
            rows = micro.labels >= 0
            alone = model.logits(hidden)[rows].log_softmax(-1).gather(1, micro.labels[rows][:, None]).sum()
            place = next(i for i, p in enumerate(together.places) if p.endswith(f":{row + 1}"))
            assert float(sums[place, column].detach()) == pytest.approx(float(alone.detach()), rel=1e-4)


@pytest.mark.parametrize(("objective", "value"), [("dpo", math.log(2)), ("mpo", 0.8 * math.log(2) + 0.4 * math.log(2))])
def test_the_losses_begin_at_indifference(folder, objective, value):
    model, stage = tiny_network(), a_stage(folder, objective=objective, preference={"next_token": 0.0})
    compute_reference(stage, model, folder)
    micro, count = first_micro(stage, folder)
    loss = PreferenceObjective(stage, model).loss(model, micro, count)
    assert float(loss.detach()) * count / float(micro.weights.sum()) == pytest.approx(value, rel=1e-4)


def test_training_prefers_the_better_reply(folder):
    model, stage = tiny_network(), a_stage(folder, max_tokens=256)
    compute_reference(stage, model, folder)
    optimizer = torch.optim.AdamW([each.parameter for each in mark_trainable(model, stage)], lr=3e-3)
    objective = PreferenceObjective(stage, model)
    micro, count = first_micro(stage, folder)
    for _ in range(12):
        optimizer.zero_grad()
        objective.loss(model, micro, count).backward()
        optimizer.step()
    objective.figures.take()
    objective.loss(model, micro, count)
    figures = objective.figures.take()
    assert figures["accuracy"] == 1.0 and figures["margin"] > 0


def test_a_resumed_stage_keeps_the_reference_of_its_beginning(folder):
    stage, before = a_stage(folder), None
    for seed, resumed in ((0, False), (1, True)):  # a resumed run has other weights by then
        recipe, model = FamilyRecipe(), tiny_network(seed)
        recipe.begin_run(model, FamilyConfig(model=folder, output=folder, stages=(stage,)))
        recipe.begin_stage(stage, model, folder, seed=0, resumed=resumed)
        reference = first_micro(stage, folder)[0].reference
        assert before is None or torch.equal(reference, before)
        before = reference


def test_any_division_of_the_pairs_has_the_same_gradient(folder):
    results = []
    for batch, max_tokens in ((1, 256), (8, 48)):
        stage, model = a_stage(folder, objective="dpo", batch=batch, max_tokens=max_tokens), tiny_network()
        mark_trainable(model, stage)
        compute_reference(stage, tiny_network(1), folder)
        objective = PreferenceObjective(stage, model)
        (step,) = all_steps(stage, folder)
        for micro in step.micro:
            objective.loss(model, move_batch(micro, torch.device("cpu")), step.count).backward()
        results.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_a_sample_without_a_loser_is_left_out(folder):
    write_rows(folder / "data.jsonl", [*ROWS, talk("What?", "red")])
    compute_reference(a_stage(folder), tiny_network(), folder)
    steps = all_steps(a_stage(folder), folder)
    assert sum(step.figures["samples"] for step in steps) == 4


def test_pairs_that_the_reference_has_not_seen_are_named(folder):
    compute_reference(a_stage(folder), tiny_network(), folder)
    write_rows(folder / "data.jsonl", [*ROWS, talk("What is 9?", "a", rejected_response="b")])
    assert sum(step.figures["skipped"] for step in all_steps(a_stage(folder), folder)[-1:]) == 1
    (folder / "reference-s.jsonl").write_text("{")
    with pytest.raises(KeyeError, match="cannot be read"):
        all_steps(a_stage(folder), folder)
