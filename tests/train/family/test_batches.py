"""Batches of the family's recipe: packed by tokens, divided among processes, resumed, without what cannot be learnt."""

import json

import numpy as np
import pytest
import torch

from keye.errors import KeyeError
from keye.train.layout import LengthError
from keye.train.recipes.family.batches import SKIPPED_FILE
from tests.support.family import all_steps, family_stage, talk, write_rows
from tests.support.tiny import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("family") / "model", weights=False)


@pytest.fixture(scope="module")
def data(folder):
    rows = [talk("What is shown?" * (1 + number % 4), f"red circle {number % 7}") for number in range(24)]
    return write_rows(folder / "data.jsonl", rows)


def learnt(steps):
    return sorted(
        tuple(micro.token_ids[start:stop].tolist())
        for step in steps for micro in step.micro if micro.weights.any()
        for start, stop, _ in micro.segments.tolist()
    )  # fmt: skip


def test_packs_hold_at_most_so_many_tokens_and_every_sample_once(folder, data):
    steps = all_steps(family_stage(data, max_tokens=64, batch=2), folder)
    assert all(len(micro.token_ids) <= 64 for step in steps for micro in step.micro)
    assert all(sum(len(m.token_ids) for m in step.micro) <= 128 for step in steps)
    assert sum(step.figures["samples"] for step in steps) == 24
    assert [step.count for step in steps] == [sum(m.weights.sum() for m in step.micro) for step in steps]
    shares = [step.share for step in steps]
    assert shares[0] == 0 and shares == sorted(shares) and shares[-1] < 1


def test_without_packing_a_batch_counts_samples(folder, data):
    steps = all_steps(family_stage(data, batch=5, packing=False), folder)
    assert [len(step.micro) for step in steps] == [5, 5, 5, 5, 4]


@pytest.mark.parametrize("size", [2, 3])
def test_processes_divide_the_same_steps(folder, data, size):
    stage = family_stage(data, max_tokens=48, batch=4)
    alone = all_steps(stage, folder)
    shares = [all_steps(stage, folder, rank=rank, size=size) for rank in range(size)]
    for steps in zip(alone, *shares, strict=True):
        first, *own = steps
        assert {step.count for step in own} == {first.count}
        assert [step.state for step in own] == [first.state] * size
        assert len({len(step.micro) for step in own}) == 1
        assert learnt(own) == learnt([first])


def test_a_resumed_stage_goes_on_with_the_next_sample(folder, data):
    stage = family_stage(data, max_tokens=64, batch=2)
    steps = all_steps(stage, folder)
    state = json.loads(json.dumps(steps[1].state))
    after = all_steps(stage, folder, state=state)
    assert len(after) == len(steps) - 2
    for left, right in zip(steps[2:], after, strict=True):
        for a, b in zip(left.micro, right.micro, strict=True):
            np.testing.assert_array_equal(a.token_ids, b.token_ids)


def test_what_cannot_be_learnt_is_left_out_and_written_down(folder, tmp_path):
    rows = [talk("What?", "red"), talk("See <image>", "red", images=["missing.png"]), talk("What?", "x " * 200),
            talk("Why?", "blue", mode="think")]  # fmt: skip
    data = write_rows(tmp_path / "mixed.jsonl", rows)
    (folder / SKIPPED_FILE).unlink(missing_ok=True)
    steps = all_steps(family_stage(data, too_long="drop"), folder)
    assert sum(step.figures["samples"] for step in steps) == 1
    skipped = [json.loads(line) for line in (folder / SKIPPED_FILE).read_text().splitlines()]
    assert sorted(entry["place"].rpartition(":")[2] for entry in skipped) == ["2", "3", "4"]
    reasons = " ".join(entry["reason"] for entry in skipped)
    assert "missing.png" in reasons and "tokens" in reasons and "needs reasoning" in reasons


def test_a_sample_that_is_too_long_is_an_error_with_numbers(folder, tmp_path):
    data = write_rows(tmp_path / "long.jsonl", [talk("What?", "x " * 200)])
    with pytest.raises(LengthError, match=r"long.jsonl:1: the sample takes .* tokens"):
        all_steps(family_stage(data), folder)


def test_data_of_which_nothing_can_be_learnt_end_the_run(folder, tmp_path):
    data = write_rows(tmp_path / "bad.jsonl", [talk("Why?", "blue", mode="think") for _ in range(300)])
    with pytest.raises(KeyeError, match="200 samples one after another cannot be learnt"):
        all_steps(family_stage(data), folder)


def test_media_options_of_the_stage_hold_where_the_sample_sets_none(folder, tmp_path):
    from PIL import Image

    Image.fromarray(np.full((112, 112, 3), 200, np.uint8)).save(tmp_path / "a.png")
    rows = [talk("<image>What?", "red", images=[str(tmp_path / "a.png")])]
    data = write_rows(tmp_path / "image.jsonl", rows)
    sizes = []
    for media in ({}, {"max_pixels": 56 * 56, "min_pixels": 28 * 28}):
        (step,) = all_steps(family_stage(data, media=media), folder)
        sizes.append(int(np.prod(step.micro[0].grids[0])))
    assert sizes[1] < sizes[0]
    assert torch.from_numpy(step.micro[0].pixels).isfinite().all()
