"""Kills a training run at random moments and compares what it ends with to a run that was left alone.

A tiny model of two layers with experts and an indexer learns texts through the family's recipe, with a checkpoint every
two steps, so that many kills meet one being written. SIGKILL goes to the process that was started; those that it
started end with it. Each time, the run is started again. Prints JSON: kills, where they fell, and how many tensors
differ. Run:
    python benchmarks/train_kill.py [--processes 2] [--kills 10] [--steps 60]
With --exits 20 it counts instead how many of 20 short runs by torchrun, with weights divided among the processes
(FSDP2), end with status 0.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import load_file

from keye.config.toml import to_toml
from keye.train.checkpoint import FOLDER
from keye.train.config import ParallelSettings
from keye.train.output import LOG_FILE
from keye.train.recipes.family.config import DataConfig, FamilyConfig, FamilyStage

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support.family import talk, write_rows
from tests.support.tiny import tiny_folder


def write_run(folder: Path, output: str, arguments: argparse.Namespace, *, shard: bool = False) -> Path:
    """The file of a run."""
    stage = FamilyStage(name="learn", steps=arguments.steps, trains="all", attention="sparse", max_tokens=64, batch=2,
                        lr=1e-3, data=(DataConfig(path=str(folder / "rows.jsonl")),))  # fmt: skip
    run = FamilyConfig(model=folder / "model", output=folder / output, stages=(stage,), fresh=True, fused=False,
                       processes=arguments.processes, save_steps=2, save_minutes=0.05, log_seconds=0.0,
                       parallel=ParallelSettings(shard=shard))  # fmt: skip
    path = folder / f"{output}.toml"
    path.write_text(to_toml(run))
    return path


def start(path: Path) -> subprocess.Popen[bytes]:
    """`keye train` with a file."""
    command = [sys.executable, "-m", "keye", "train", str(path)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def count_exits(arguments: argparse.Namespace) -> None:
    """Runs by torchrun that end well."""
    with tempfile.TemporaryDirectory(prefix="keye-exits-") as name:
        folder, good, messages = Path(name), 0, []
        prepare(folder)
        for number in range(arguments.exits):
            path = write_run(folder, f"run {number}", argparse.Namespace(steps=3, processes=1), shard=True)
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.processes}"]
            command = [sys.executable, *launcher, "-m", "keye", "train", str(path)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            good += run.returncode == 0
            if run.returncode:
                messages.append(run.stderr[-2000:])
        print(json.dumps({"processes": arguments.processes, "runs": arguments.exits, "status_0": good}, indent=2))
        print("\n".join(messages), file=sys.stderr)


def prepare(folder: Path) -> None:
    """A model without weights, and texts."""
    tiny_folder(folder / "model", weights=False)
    write_rows(folder / "rows.jsonl", [talk(f"What is {n}? " * (1 + n % 5), f"red circle {n}") for n in range(90)])


def count_steps(output: Path) -> int:
    """The number of the last step in the log."""
    log = output / LOG_FILE
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return max((line["step"] for line in lines if "step" in line), default=0)


def wait_for_step(run: subprocess.Popen[bytes], output: Path, step: int) -> bool:
    """Whether the run, which logs every step, gets to a step before it ends."""
    while run.poll() is None:
        if count_steps(output) >= step:
            return True
        time.sleep(0.02)
    return False


def where(output: Path) -> str:
    """What a killed run had last: its newest checkpoint, and whether another was being written."""
    names = sorted(path.name for path in (output / FOLDER).glob("*"))
    return ", ".join(names[-2:]) or "no checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exits", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.exits:
        count_exits(arguments)
        return
    with tempfile.TemporaryDirectory(prefix="keye-kill-") as name:
        folder, rng = Path(name), random.Random(arguments.seed)
        prepare(folder)
        assert start(write_run(folder, "straight", arguments)).wait() == 0
        places: list[str] = []
        differ, runs, is_open = 0, 0, True
        expected = load_file(folder / "straight" / "model.safetensors")
        while len(places) < arguments.kills or is_open:
            path = write_run(folder, f"killed {runs}", arguments)
            output = path.with_suffix("")
            run = start(path)
            if len(places) < arguments.kills and wait_for_step(run, output, count_steps(output) + rng.randint(1, 9)):
                time.sleep(rng.uniform(0, 0.3))  # somewhere in a step, or while its checkpoint is written
                os.kill(run.pid, signal.SIGKILL)
                run.wait()
                places.append(where(output))
                is_open = True
                continue
            assert run.wait() == 0, "the run failed"
            tensors, runs, is_open = load_file(output / "model.safetensors"), runs + 1, False
            differ += sum(not torch.equal(tensor, tensors[name]) for name, tensor in expected.items())
        print(json.dumps({"processes": arguments.processes, "runs": runs, "kills": len(places),
                          "tensors": len(expected), "differ": differ, "killed_at": places}, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
