"""Vision pre-training on pictures of different sizes with captions."""

import numpy as np
import pytest
import torch
from PIL import Image

from keye.train.optim import mark_trainable
from keye.train.recipe import move_batch
from keye.train.recipes.family.siglip import SiglipObjective
from tests.support.family import all_steps, family_stage, talk, tiny_network, write_rows
from tests.support.tiny import tiny_folder

SMALL = {"width": 16, "layers": 1, "heads": 2, "tokens": 8}
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("siglip") / "model", weights=False)
    rows = []
    for number, (name, color) in enumerate(COLORS.items()):
        picture = np.full((56, 56 + 28 * number, 3), color, np.uint8)
        Image.fromarray(picture).save(folder / f"{name}.png")
        rows.append(talk("<image>", name, images=[f"{name}.png"]))
    rows.append(talk("What?", "no picture"))
    write_rows(folder / "data.jsonl", rows)
    return folder


def a_stage(folder, **fields):
    return family_stage(
        folder / "data.jsonl", **{"objective": "siglip", "trains": "tower", "batch": 4, "siglip": SMALL} | fields
    )


def test_pictures_learn_their_captions(folder):
    torch.manual_seed(0)
    stage, model = a_stage(folder), tiny_network()
    objective = SiglipObjective(stage, model)
    trained = [each.parameter for each in mark_trainable(model, stage)]
    optimizer = torch.optim.AdamW([*trained, *objective.heads.parameters()], lr=3e-3)
    (step,) = all_steps(stage, folder)
    assert step.count == 4 and step.figures["skipped"] == 1
    micro = move_batch(step.micro[0], torch.device("cpu"))
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = objective.loss(model, micro, step.count)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched and all(name.startswith("visual.") for name in touched)
    assert "visual.vision_model.embeddings.position_embedding.weight" in touched


def test_processes_divide_the_pairs(folder):
    shares = [all_steps(a_stage(folder), folder, rank=rank, size=3)[0] for rank in range(3)]
    assert {share.count for share in shares} == {4.0}
    assert sum(len(share.micro[0].grids) for share in shares) == 4
