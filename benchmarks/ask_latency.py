"""How long a question takes: `model.ask` on a 32-frame clip in a loaded process, and the whole `keye ask` command.

Makes its own clip with FrameForge, prints JSON (seconds, medians and extremes). Run:
    python benchmarks/ask_latency.py [--model nano] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import keye
from keye.data.frameforge import make_clip, questions, write_mp4


def seconds_of(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median, fastest and slowest wall time of `run`; one call before is not counted."""
    run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return {"median": round(statistics.median(times), 3), "min": round(min(times), 3), "max": round(max(times), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "clip.mp4"
        clip = make_clip(11, frames=32, split="test", start=0.0, step=0.5)
        write_mp4(clip, video)
        question = questions(clip, random.Random(0), 1, tasks=["ground"])[0].text
        model = keye.load(arguments.model)
        answer = model.ask(video, question)
        command = [sys.executable, "-c", "from keye.cli import main; main()",
                   "ask", "--model", arguments.model, "--json", str(video), question]  # fmt: skip
        result = {
            "ask_loaded_s": seconds_of(lambda: model.ask(video, question), arguments.repeats),
            "command_s": seconds_of(
                lambda: subprocess.run(command, check=True, capture_output=True), arguments.repeats
            ),
            "frames": answer.plan[0]["frames"],
            "prompt_tokens": answer.usage.prompt_tokens,
            "completion_tokens": answer.usage.completion_tokens,
            "seconds_by_phase": dict(answer.seconds),
            "threads": torch.get_num_threads(),
            "machine": platform.processor() or platform.machine(),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
