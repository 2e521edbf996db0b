"""How many frames of a long video keye-nano should look at: its budget is the same, so fewer frames have more pixels.

    python benchmarks/frame_budget.py --json

FrameForge clips of 300 s, 16:9 and square, sampled at up to so many frames, and 8 questions about each. `correct` is
the share of right answers (an interval counts from an IoU of 0.5 on).
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

import keye
from keye.data.frameforge import make_clip, questions, write_mp4
from keye.evals.tasks.frameforge import score

SECONDS, FRAMES, QUESTIONS = 300, (600, 256, 128, 64), 8
#: Sizes of the scene and of the file.
SHAPES = {"16:9": ((224, 126), (640, 360)), "square": ((112, 112), (448, 448))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object; this is the only form")
    parser.add_argument("--clips", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = keye.load("nano")
    with tempfile.TemporaryDirectory(prefix="keye-frames-") as folder:
        print(json.dumps({shape: measure(model, Path(folder), shape, options.clips) for shape in SHAPES}, indent=2))


def measure(model: keye.Keye, folder: Path, shape: str, clips: int) -> list[dict[str, Any]]:
    """One row for each number of frames."""
    rows: list[dict[str, Any]] = [{"frames": frames, "correct": 0.0} for frames in FRAMES]
    request = 0
    for seed in range(7000, 7000 + clips):
        size, file_size = SHAPES[shape]
        clip = make_clip(seed, frames=2 * SECONDS, split="test", size=size, start=0.0, step=0.5, text_chance=0)
        write_mp4(clip, folder / "clip.mp4", file_size)
        about = questions(clip, random.Random(0), QUESTIONS)
        request += len(about)
        for row in rows:
            for question in about:
                answer = model.ask(folder / "clip.mp4", question.text, media_options={"max_frames": row["frames"]})
                row["tokens_per_frame"] = answer.plan[0]["tokens_per_frame"]
                row["tokens"] = answer.plan[0]["visual_tokens"]
                row["correct"] += score(clip, question, answer.text, seed).correct
    return [{**row, "correct": round(row["correct"] / request, 3), "questions": request} for row in rows]


if __name__ == "__main__":
    main()
