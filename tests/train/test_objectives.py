"""The losses of each stage on a tiny model: what they change, and that packing computes what inference does."""

import pytest
import torch

from keye.cache.sequence import KVCache
from keye.models.attention import CachedStep, Span
from keye.train.optim import Optimizer, Trained, mark_trainable
from keye.train.packed import AttentionHint, TreeStep, hint_loss
from keye.train.recipes.nano.config import Mix
from keye.train.recipes.nano.evidence import TRAINED_PAIRS
from keye.train.recipes.nano.recipe import encode_frames
from tests.support.tiny import tiny_model
from tests.support.training import NANO_RECIPE, make_tensors, nano_stage, question_spans

MIX = (Mix(frames=3, clips=2, questions=5),)
STAGES = {
    "vision": nano_stage("vision", kind="vision", trains="vision", steps=2, batch=3, warmup_steps=1),
    "language": nano_stage("language", steps=2, mix=MIX, warmup_steps=1, time_binding=0.1),
    "all": nano_stage("all", steps=2, mix=MIX, warmup_steps=1, trains="all"),
    "tower": nano_stage("tower", steps=2, mix=MIX, warmup_steps=1, trains="vision"),
    "warmup": nano_stage("warmup", steps=2, mix=MIX, warmup_steps=1, trains="indexer", attention="warmup"),
    "sparse": nano_stage("sparse", steps=2, mix=MIX, warmup_steps=1, attention="sparse"),
    "sparse all": nano_stage("sparse all", steps=2, mix=MIX, warmup_steps=1, trains="all", attention="sparse"),
}


def part_of(name):
    if ".sa_indexer." in name:
        return "indexer"
    return "vision" if name.startswith(("visual.", "mlp_AR.")) else "decoder"


CHANGES = {
    "vision": {"vision"}, "language": {"decoder"}, "all": {"vision", "decoder"}, "tower": {"vision"},
    "warmup": {"indexer"}, "sparse": {"decoder", "indexer"}, "sparse all": {"vision", "decoder", "indexer"},
}  # fmt: skip


def make_optimizer(config, model, objective):
    """Of what the stage trains and of the heads, at rates at which a few steps are enough."""
    config = config.model_copy(update={"lr": 2e-2, "adam_lr": 1e-2})
    heads = [Trained(f"heads.{name}", parameter, False, 1e-2) for name, parameter in objective.heads.named_parameters()]
    return Optimizer([*mark_trainable(model, config), *heads])


@pytest.mark.parametrize("name", STAGES)
def test_two_steps_change_what_the_stage_trains_and_nothing_else(name):
    config, model = STAGES[name], tiny_model().model.bfloat16()
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    torch.manual_seed(0)
    stage = NANO_RECIPE.make_objective(config, model)
    optimizer = make_optimizer(config, model, stage)
    for step in range(2):
        loss = stage.loss(model, make_tensors(config, step), 1.0)
        assert torch.isfinite(loss)
        loss.backward()
        assert optimizer.step(1.0) > 0
    changed = {part_of(key) for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert changed == CHANGES[name]
    figures = stage.figures.take()
    expected = {"vision": "letter 1", "language": "time of frame", "warmup": "kl/3", "sparse": "kl/3"}
    assert expected.get(name, "loss") in figures
    if name in ("warmup", "sparse"):
        assert 0 < figures["recall/3"] <= 1
    assert stage.figures.take() == {}


def test_indexer_learns_from_the_kl_and_the_trunk_does_not():
    config, model = STAGES["sparse"], tiny_model().model
    mark_trainable(model, config)
    step, _ = _packed(model, make_tensors(config, 0), config.attention)
    step.kl().backward()
    learnt = [(name, p) for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())]
    touched = {part_of(name) for name, _ in learnt}
    assert touched == {"indexer"}


def _packed(model, batch, mode):
    """The packed step of a batch after its forward pass, and its hidden states [B, P + L, d]."""
    visual = encode_frames(model, batch.frames.flatten(0, 1))
    ids = torch.cat((batch.trunk_ids, batch.tail_ids), dim=1)
    positions = batch.positions.transpose(0, 1).flatten(1)
    step = TreeStep(batch.segments, model.config.text, mode)
    return step, model(model.embed(ids.flatten(), visual), positions, step).view(*ids.shape, -1)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@torch.no_grad()
def test_packed_training_computes_what_inference_does(mode):
    """Every branch of a packed batch has the hidden states of the same tokens after the same video in a cache."""
    model, config = tiny_model(seed=3, topk=16).model, STAGES["language"]
    batch = make_tensors(config, 7)
    _, hidden = _packed(model, batch, mode)
    trunk = batch.trunk_ids.shape[1]
    positions, text = batch.positions, model.config.text
    for row in range(len(batch.frames)):
        cache = KVCache(text.num_hidden_layers)
        visual = encode_frames(model, batch.frames[row])
        x = model.embed(batch.trunk_ids[row], visual)
        out = model(x, positions[row, :, :trunk], CachedStep([Span(0, trunk, cache)], text, mode=mode))
        torch.testing.assert_close(out, hidden[row, :trunk], atol=2e-4, rtol=1e-3)
        for start, stop in question_spans(batch, row):
            places = torch.arange(start, stop)
            ids = batch.tail_ids[row][places]
            step = CachedStep([Span(0, len(ids), cache.fork())], text, mode=mode)
            out = model(model.embed(ids), positions[row][:, trunk + places], step)
            torch.testing.assert_close(out, hidden[row, trunk + places], atol=2e-4, rtol=1e-3)


def test_figures_are_means_since_the_last_take():
    stage = NANO_RECIPE.make_objective(STAGES["language"], tiny_model().model)
    for value in (1.0, 2.0, 6.0):
        stage.figures.add("x", value)
    stage.figures.add("share", 3, 4)
    assert stage.figures.take() == {"share": 0.75, "x": 3.0}


def test_helper_losses_are_learnt():
    config = nano_stage("helpers", steps=1, mix=MIX, time_binding=0.5, pointing=0.5, events=0.1)
    model = tiny_model().model
    torch.manual_seed(0)
    stage = NANO_RECIPE.make_objective(config, model)
    optimizer = make_optimizer(config, model, stage)
    batch = make_tensors(config, 1)
    kinds = {pointer.kind for pointer in batch.pointers}
    assert {"time", "first", "last", "start", "end"} <= kinds
    before, after = None, None
    looks = list[float]()
    for _ in range(12):
        torch.manual_seed(1)
        stage.loss(model, batch, 1.0).backward()
        optimizer.step(1.0)
        after = stage.figures.take()
        before = before or after
        looks.append(after["looks at first"])
    assert {f"looks at {kind}" for kind in kinds} <= set(after)
    assert {"seen", "changed", "time look-up", "time of frame", "time of frame before", "time in question"} <= set(
        after
    )
    assert max(looks) > looks[0] + 0.1
    assert after["seen"] > before["seen"] + 0.2
    assert after["loss"] < before["loss"]


def test_findings_are_learnt():
    """The tokens that know where, which way, how big and how often do so after a few steps on one batch."""
    tasks = {"place": 20.0, "direction": 20.0, "size": 40.0, "times": 40.0}
    mix = (Mix(frames=9, clips=6, questions=10),)
    config = nano_stage("findings", steps=1, mix=mix, pointing=0.5, tracking=0.5, task_weights=tasks)
    model = tiny_model().model
    torch.manual_seed(0)
    stage = NANO_RECIPE.make_objective(config, model)
    optimizer = make_optimizer(config, model, stage)
    batch = make_tensors(config, 1)
    assert {finding.kind for finding in batch.findings} == set(tasks)
    before, after = None, None
    for _ in range(16):
        stage.loss(model, batch, 1.0).backward()
        optimizer.step(1.0)
        after = stage.figures.take()
        before = before or after
    assert {f"looks at {kind}" for kind in ("seen", "place", "again", "before", "origin")} <= set(after)
    known = ("seen at 0.5 size", "seen at 0.17 place", "place", "size", "times", "answers times", "background")
    assert sum(after[name] for name in known) > sum(before[name] for name in known) + 1.0


def test_helpers_without_weights_have_no_heads_and_no_loss():
    stage, model = NANO_RECIPE.make_objective(STAGES["sparse"], tiny_model().model), tiny_model().model
    batch = make_tensors(STAGES["sparse"], 1)
    assert list(stage.heads.parameters()) == []
    assert stage.heads.hints(batch) == []
    step, _ = _packed(model, batch, "dense")
    assert float(stage.heads.loss(model, batch, step)) == 0.0


def test_pairs_that_training_never_shows_teach_nothing():
    helpers = NANO_RECIPE.make_objective(nano_stage("events", steps=1, mix=MIX, events=1.0), tiny_model().model).heads
    logits = torch.zeros(2, 1, 8, 5, requires_grad=True)
    helpers.pair_loss(logits, torch.zeros(2, 1, 8, 5, dtype=torch.bool), "seen").backward()
    assert ((logits.grad[0, 0] != 0).numpy() == TRAINED_PAIRS).all()


def test_a_hint_is_the_share_of_attention_that_the_targets_get():
    """One query, two keys in the trunk: the loss is -log of the softmax weight of the target."""
    q, k = torch.randn(5, 2, 8), torch.randn(5, 1, 8)
    hint = AttentionHint("time", 0, torch.tensor([4]), torch.tensor([1]), torch.tensor([[False, True]]), head=1)
    weights = (k[1:3, 0] @ q[4, 1] * 8**-0.5).softmax(0)
    assert torch.allclose(hint_loss(hint, q, k), -weights[1].log())
