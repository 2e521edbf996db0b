"""Every score of keye-nano's model card: runs the FrameForge evaluation in all its settings and prints JSON lines.

Each line is the result of `keye eval frameforge` with the options it echoes. Run (about 4 minutes a setting and core):
    python benchmarks/nano_card.py [--model nano] [--n 2000] [--only unseen ...] [--jobs 2]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SETTINGS: dict[str, dict[str, Any]] = {
    "test": {},
    "test, dense": {"mode": "dense"},
    "unseen": {"split": "unseen"},
    "test, mp4": {"mp4": True},
    "32 frames": {"frames": (32, 32)},
    "32 frames, dense": {"frames": (32, 32), "mode": "dense"},
    "32 frames, random keys": {"frames": (32, 32), "select": "random"},
    "32 frames, recent keys": {"frames": (32, 32), "select": "recent"},
    "64 frames": {"frames": (64, 64)},
    "64 frames, dense": {"frames": (64, 64), "mode": "dense"},
}


def run(name: str, model: str, count: int) -> dict[str, Any]:
    """One setting in a process of its own, one thread."""
    import torch

    import keye
    from keye.evals.frameforge import EvalOptions, evaluate

    torch.set_num_threads(1)
    return {"setting": name, **evaluate(keye.load(model), EvalOptions(questions=count, **SETTINGS[name]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        pending = [pool.submit(run, name, arguments.model, arguments.n) for name in arguments.only]
        for done in as_completed(pending):
            result = done.result()
            print(json.dumps(result), flush=True)
            print(f"{result['setting']}: accuracy {result['accuracy']}, mIoU {result['miou']}", file=sys.stderr)


if __name__ == "__main__":
    main()
