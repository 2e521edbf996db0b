"""Numbers of keye-nano that a refactor must not move: logits in both attention modes, losses of every kind of stage.

New weights move them rightly; then `python tests/test_snapshots.py` writes tests/data/nano-snapshots.json again.
"""

import json
from pathlib import Path

import pytest
import torch

from keye.cache.sequence import KVCache
from keye.config import load_model_config
from keye.hub import asset
from keye.models.attention import CachedStep, Span
from keye.models.load import load_model
from keye.train.recipes.nano.batches import make_batch
from keye.train.recipes.nano.config import Mix
from keye.train.recipes.nano.recipe import encode_frames
from tests.support.training import NANO_RECIPE, make_tensors, nano_stage, question_spans

SNAPSHOTS = Path(__file__).parent / "data" / "nano-snapshots.json"
MIX = (Mix(frames=8, clips=1, questions=6),)
STAGES = {
    "vision": nano_stage("vision", kind="vision", trains="vision", steps=1, batch=2, text_chance=1.0),
    "language": nano_stage("language", steps=1, mix=MIX),
    "warm-up": nano_stage("warm-up", steps=1, mix=MIX, trains="indexer", attention="warmup"),
    "sparse": nano_stage("sparse", steps=1, mix=MIX, attention="sparse"),
}


def nano():
    folder = asset("nano")
    return load_model(folder, load_model_config(folder), dtype=torch.float32)[0].eval()


@torch.no_grad()
def measure_logits(model, mode):
    """The five largest logits after the first question about a clip of 8 frames, and the length of all of them."""
    batch = make_batch(STAGES["language"], asset("nano"), 11)
    stop = batch.answers[0].start + 1
    first = question_spans(batch, 0)[0][0]
    ids = torch.cat((torch.from_numpy(batch.trunk_ids[0]), torch.from_numpy(batch.tail_ids[0, first:stop])))
    trunk = batch.trunk_ids.shape[1]
    positions = torch.from_numpy(batch.positions[0])
    positions = torch.cat((positions[:, :trunk], positions[:, trunk + first : trunk + stop]), dim=1)
    visual = encode_frames(model, torch.from_numpy(batch.frames[0]))
    step = CachedStep([Span(0, len(ids), KVCache(model.config.text.num_hidden_layers))], model.config.text, mode=mode)
    logits = model.logits(model(model.embed(ids, visual), positions, step)[-1:])[0]
    top = logits.topk(5)
    return {"ids": top.indices.tolist(), "logits": top.values.tolist(), "length": float(logits.norm())}


@torch.no_grad()
def measure_loss(model, name):
    torch.manual_seed(0)  # the heads of the vision stage
    objective = NANO_RECIPE.make_objective(STAGES[name], model)
    return float(objective.loss(model, make_tensors(STAGES[name], 5, asset("nano")), 1.0))


@pytest.fixture(scope="module")
def model():
    return nano()


@pytest.fixture(scope="module")
def snapshots():
    return json.loads(SNAPSHOTS.read_text())


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_logits_stay(mode, model, snapshots):
    measured, wanted = measure_logits(model, mode), snapshots["logits"][mode]
    assert measured["ids"] == wanted["ids"]
    assert measured["logits"] == pytest.approx(wanted["logits"], abs=2e-3)
    assert measured["length"] == pytest.approx(wanted["length"], rel=1e-4)


@pytest.mark.parametrize("name", STAGES)
def test_losses_stay(name, model, snapshots):
    assert measure_loss(model, name) == pytest.approx(snapshots["losses"][name], abs=2e-3)


if __name__ == "__main__":
    network = nano()
    snapshots = {
        "logits": {mode: measure_logits(network, mode) for mode in ("dense", "sparse")},
        "losses": {name: measure_loss(network, name) for name in STAGES},
    }
    SNAPSHOTS.write_text(json.dumps(snapshots, indent=2) + "\n")
    print(f"wrote {SNAPSHOTS}")
