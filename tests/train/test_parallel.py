"""Several processes train one model: gradients are summed, Muon's work is divided, everybody ends with the same."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from keye.train.optim import Optimizer, Trained, orthogonalise
from keye.train.parallel import Group, processes
from keye.train.recipes.nano.config import Mix
from tests.support.training import a_run, nano_stage, train_nano


def _work(group: Group, folder: Path) -> dict[str, torch.Tensor]:
    gradient = torch.full((3, 2), float(group.rank))
    scalar = torch.tensor(10.0 * group.rank)
    group.sum([gradient, scalar])
    stack = torch.arange(5 * 4 * 4, dtype=torch.float32).view(5, 4, 4).sin()
    done = {
        "gradient": gradient,
        "scalar": scalar,
        "divided": group.divide(stack, orthogonalise).float(),
        "whole": orthogonalise(stack).float(),
        "partly": _step_with_some_gradients(group),
        "agreed": torch.tensor(group.agree(0.25 + group.rank)[0]),
    }
    save_file(done, folder / f"{group.rank}.safetensors")
    return done


def _step_with_some_gradients(group: Group) -> torch.Tensor:
    """One step of three parameters, each of which has a gradient in one process only; returns all, and the norm."""
    trained = [
        Trained(name, torch.nn.Parameter(torch.ones(size)), False, 0.1)
        for name, size in zip("abc", (2, 3, 2), strict=True)
    ]
    for each in trained[group.rank :: 2]:
        each.parameter.grad = torch.full_like(each.parameter, 4.0)
    norm = Optimizer(trained, group=group, clip=100.0).step(1.0)
    return torch.cat([*(each.parameter.detach() for each in trained), torch.tensor([norm / 100])])


class _Follow:
    """What the other process runs; picklable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, group: Group) -> None:
        _work(group, self.folder)


def test_one_process_needs_no_others(tmp_path):
    with processes(1, "cpu", _Follow(tmp_path)) as group:
        done = _work(group, tmp_path)
    assert group.size == 1
    assert done["scalar"] == 0.0 and done["agreed"] == 0.25
    assert torch.equal(done["divided"], done["whole"])


def test_helpers_end_with_the_process_that_started_them():
    """The helper would run for ten minutes; it holds the output open, so the output ends only when the helper has."""
    code = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from keye.process import end_with_parent
pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent)
pool.submit(os.getpid).result()
pool.submit(time.sleep, 600)
print("started", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as main:
        assert main.stdout.readline() == "started\n"
        main.kill()
        assert main.communicate(timeout=60)[0] == ""


@pytest.mark.slow
def test_two_processes_sum_divide_and_agree(tmp_path):
    with processes(2, "cpu", _Follow(tmp_path)) as group:
        mine = _work(group, tmp_path)
    other = load_file(tmp_path / "1.safetensors")
    for done in (mine, other):
        assert torch.equal(done["gradient"], torch.full((3, 2), 1.0)) and done["scalar"] == 10.0
        assert torch.allclose(done["divided"], done["whole"], atol=2e-2)
        assert done["agreed"] == 0.25
        assert (done["partly"][:-1] < 0.95).all() and done["partly"][-1] == pytest.approx(0.04 * 7**0.5)
    assert torch.equal(mine["divided"], other["divided"]) and torch.equal(mine["partly"], other["partly"])


@pytest.mark.slow
def test_two_processes_train_to_the_same_weights_each_time(tmp_path):
    stage = nano_stage("dense", steps=4, mix=(Mix(frames=2, clips=2, questions=3),), warmup_steps=1)
    weights = []
    for name in ("one", "two"):
        train_nano(a_run(tmp_path, name, stage, processes=2))
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
