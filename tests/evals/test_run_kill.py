"""A run is killed: each item has one record, and the score is that of a run that was not disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from keye.evals.run import ModelFacts, RunOptions, run_task
from keye.evals.settings import RunSettings
from tests.evals.fake_task import TASK, FakeWorker, number_of, reply, right, write_data

ROOT = Path(__file__).parents[2]
#: Runs the task, and kills itself while it answers the question of this number.
_VICTIM = """
import os, signal, sys
from pathlib import Path
from tests.evals.test_run_kill import ask
ask(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
"""


def ask(data: Path, out: Path, deadly: int | None = None) -> dict:
    worker = FakeWorker(lambda item: right(item) if number_of(item) % 3 else reply("none"))
    if deadly is not None:
        usual = worker.ask

        async def ask_or_die(item):
            if len(worker.requests) == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            return await usual(item)

        worker.ask = ask_or_die
    return run_task(TASK, data, RunSettings(), out, RunOptions(lambda: [worker], ModelFacts("m")))


def test_a_killed_run_leaves_one_record_for_each_item(tmp_path: Path) -> None:
    data, out = write_data(tmp_path / "data", 40), tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    victim = [sys.executable, "-c", _VICTIM, str(data), str(out), "11"]
    assert subprocess.run(victim, env=environment).returncode == -signal.SIGKILL
    with (out / "letters" / "predictions.jsonl").open("a") as file:
        file.write('{"line_digest":"torn')  # what a kill in the middle of a write leaves
    result = ask(data, out)
    lines = [json.loads(line) for line in (out / "letters" / "predictions.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == sorted(f"q{number}" for number in range(40))
    assert 0 < result["asked"] <= 40 - 10
    assert result["scorers"] == ask(data, tmp_path / "undisturbed")["scorers"]


@pytest.mark.slow
def test_ten_kills_of_the_command() -> None:
    command = [sys.executable, "-m", "benchmarks.eval_kill", "--items", "2000", "--kills", "10"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    figures = json.loads(done.stdout)
    assert (figures["records"], figures["missing"], figures["twice"], figures["same_score"]) == (2000, 0, 0, True)
