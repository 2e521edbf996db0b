"""On-policy distillation: the student's own replies, taught by the teacher's probabilities."""

import json

import pytest
import torch

from keye.config import ConfigError, load_model_config
from keye.models.load import load_model, save_model
from keye.train.losses import overlap_loss
from keye.train.optim import mark_trainable
from keye.train.recipe import move_batch
from keye.train.recipes.family.config import DataConfig
from keye.train.recipes.family.distill import Distillation
from keye.train.recipes.nano.initialise import fresh_model
from tests.support.family import all_steps, family_stage, learn, talk, tiny_network, write_rows
from tests.support.tiny import tiny_config, tiny_folder, tiny_raw


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student's folder beside that of a teacher who has learnt to answer."""
    root = tmp_path_factory.mktemp("distill")
    folder, teacher = tiny_folder(root / "student", weights=False), tiny_network()
    tiny_folder(root / "teacher", weights=False)
    data = write_rows(folder / "data.jsonl", [talk(f"What is {n}?", ("red", "blue")[n % 2]) for n in range(4)])
    learn(teacher, family_stage(data, max_tokens=256), folder, steps=25)
    save_model(teacher, root / "teacher", dtype=torch.float32)
    return folder


@pytest.fixture
def student(folder):
    """The teacher, damaged."""
    model, _ = load_model(folder.parent / "teacher", tiny_config(), dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("model.layers.") and parameter.ndim > 1:
                parameter += 0.8 * parameter.std() * torch.randn_like(parameter)
    return model


def a_stage(folder, form, **fields):
    teacher = fields.pop("teacher", folder.parent / "teacher")
    distill = {"teacher": teacher, "form": form, "topk": 8, "least_mass": fields.pop("least_mass", 0.0)}
    sampling = {"replies": 4, "max_tokens": 4}
    return family_stage(
        folder / "data.jsonl", objective="distill", distill=distill, sampling=sampling, balance=0.0, batch=4, **fields
    )


def test_overlap_over_all_tokens_is_the_gradient_of_the_divergence():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 12, generator=generator).requires_grad_()
    teacher = torch.randn(5, 12, generator=generator).log_softmax(-1)
    log_probs = logits.log_softmax(-1)
    losses, mass = overlap_loss(log_probs, teacher, torch.ones(5, 12, dtype=torch.bool))
    (own,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    divergence = (log_probs.exp() * (log_probs - teacher)).sum()
    (expected,) = torch.autograd.grad(divergence, logits)
    torch.testing.assert_close(own, expected)
    torch.testing.assert_close(mass, torch.ones(5))


def test_sampled_tokens_have_that_gradient_in_expectation():
    """Enumerated over a vocabulary of 12; the sum without gradient times log p of the sample has none."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(12, generator=generator).requires_grad_()
    teacher = torch.randn(12, generator=generator).log_softmax(-1)
    log_probs = logits.log_softmax(-1)
    probs = log_probs.detach().exp()
    sampled = -(probs * (teacher - log_probs.detach()) * log_probs).sum()
    literal = -(probs * (probs * (teacher - log_probs.detach())).sum() * log_probs).sum()
    divergence = (log_probs.exp() * (log_probs - teacher)).sum()
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (sampled, divergence, literal)]
    torch.testing.assert_close(gradients[0], gradients[1])
    assert float(gradients[2].norm()) < 1e-6 < float(gradients[1].norm())


@pytest.mark.parametrize(("form", "least_mass"), [("sampled", 0.0), ("topk", 0.9)])
def test_the_student_comes_closer_to_its_teacher(folder, student, form, least_mass):
    stage = a_stage(folder, form, least_mass=least_mass)
    optimizer = torch.optim.AdamW([each.parameter for each in mark_trainable(student, stage)], lr=3e-3)
    objective = Distillation(stage, student, folder)
    torch.manual_seed(0)
    divergences = []
    for _ in range(10):
        (step,) = all_steps(stage, folder)
        optimizer.zero_grad()
        for micro in step.micro:
            objective.loss(student, move_batch(micro, torch.device("cpu")), step.count).backward()
        optimizer.step()
        divergences.append(objective.figures.take()["kl_to_teacher"])
    assert sum(divergences[-3:]) < 0.5 * sum(divergences[:3])
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())


def test_a_teacher_that_reads_other_tokens_is_named(folder, tmp_path):

    other = tiny_folder(tmp_path / "other", weights=False)
    (other / "config.json").write_text(json.dumps({**tiny_raw(), "vocab_size": 4096}))
    stage = a_stage(folder, "topk", teacher=other)
    with pytest.raises(ConfigError, match="another tokenizer than the student"):
        Distillation(stage, tiny_network(), folder)


def test_a_teacher_that_attends_densely_teaches_a_sparse_student(folder, student, tmp_path):
    dense = tiny_folder(tmp_path / "dense", weights=False)
    raw = {name: value for name, value in tiny_raw().items() if name != "sa_config"}
    (dense / "config.json").write_text(json.dumps(raw))
    save_model(fresh_model(load_model_config(dense), 0), dense, dtype=torch.float32)
    stage = a_stage(folder, "topk", teacher=dense, attention="sparse")
    objective = Distillation(stage, student, folder)
    (step,) = all_steps(stage, folder)
    assert bool(objective.loss(student, move_batch(step.micro[0], torch.device("cpu")), step.count).isfinite())


def test_prompts_are_divided_into_as_many_parts_everywhere(folder):
    rows = [talk(f"What is {n}?", "red") for n in range(19)]
    data = write_rows(folder / "many.jsonl", rows)
    stage = a_stage(folder, "topk").model_copy(update={"data": (DataConfig(path=str(data)),), "batch": 19})
    shares = [all_steps(stage, folder, rank=rank, size=2)[0] for rank in range(2)]
    assert [len(share.micro) for share in shares] == [2, 2]
    assert sum(float(micro.weights.sum()) for share in shares for micro in share.micro) == shares[0].count == 19
