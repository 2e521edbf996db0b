"""What it saves that questions about one video meet it in one place: items a second of a run with keye-nano.

    python -m benchmarks.eval_reuse --videos 3 --questions 10 --frames 64

Writes FrameForge videos and asks as many questions about each, twice through `keye.evals.run.run_task` with the engine
of this process: once as they are, and once where each question has a copy of its video of its own, whose bytes differ,
so that nothing can be used again. Model, questions, frames and concurrency are the same. The engine has answered one
question before the clock starts. Prints items a second of both, their ratio, CPU seconds, the share of prompt tokens
that came from the cache, and how many of the replies are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import keye
from keye.api import Keye
from keye.batch.workers import EngineWorker
from keye.data.frameforge import make_clip, questions, write_mp4
from keye.evals.run import PREDICTIONS_NAME, ModelFacts, RunOptions, read_replies, run_task
from keye.evals.settings import RunSettings
from keye.evals.task import EvalItem, ItemScore, Task, TaskSettings
from keye.scoring.metrics import text_matches
from keye.server.batch_engine import local_app

#: A box that players skip; it makes the bytes of a copy its own.
_FREE = b"free"


@dataclass(frozen=True, kw_only=True)
class ClipTask(Task):
    """Items in `items.jsonl`: {"id", "video", "question", "answer"}."""

    def read(self, folder: Path, settings: TaskSettings) -> Iterator[EvalItem]:
        for line in (folder / "items.jsonl").read_text().splitlines():
            row = json.loads(line)
            content = (
                {"type": "video", "video": str(folder / row["video"])},
                {"type": "text", "text": row["question"]},
            )
            yield EvalItem(row["id"], row["video"], content, {"answer": row["answer"]})

    def score(self, document: Any, prediction: str) -> ItemScore:
        return ItemScore(float(text_matches(prediction, document["answer"])), prediction)


TASK = ClipTask(name="clips", title="Clips", measures="reuse", source="", licence="none", media="video")


def write_data(folder: Path, videos: Sequence[int], count: int, frames: int, *, copies: bool) -> Path:
    """Videos and `count` questions about each; with `copies` each question has a file of its own."""
    folder.mkdir()
    rows = []
    for seed in videos:
        clip = make_clip(seed, frames=frames, objects=4, split="test", start=0.0, step=1.0)
        path = folder / f"{seed}.mp4"
        write_mp4(clip, path, (448, 448))
        draw, drawn = random.Random(seed), {}
        while len(drawn) < count:  # texts that differ
            drawn.update({question.text: question for question in questions(clip, draw, 12)})
        for number, question in enumerate(list(drawn.values())[:count]):
            name = path.name
            if copies:
                name = f"{seed}-{number}.mp4"
                tail = f"{seed}-{number}".encode()
                box = (len(tail) + 8).to_bytes(4, "big") + _FREE + tail
                (folder / name).write_bytes(path.read_bytes() + box)
            rows.append({"id": f"{seed}-{number}", "video": name, "question": question.text, "answer": question.answer})
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def measure(model: Keye, data: Path, output: Path, frames: int, slots: int) -> dict[str, Any]:
    """One run over the data with empty caches."""
    model.clear_caches()
    options = RunOptions(lambda: [EngineWorker(local_app(model, slots), slots=slots)], ModelFacts(model.name))
    begin, cpu = time.perf_counter(), time.process_time()
    result = run_task(TASK, data, RunSettings(media={"nframes": frames}, sampling={"max_tokens": 24}), output, options)
    seconds = time.perf_counter() - begin
    prompt = result["tokens"]["prompt"]["mean"] * result["items"]
    return {
        "items": result["items"], "seconds": round(seconds, 2), "cpu_seconds": round(time.process_time() - cpu, 2),
        "items_per_second": round(result["items"] / seconds, 3), "value": result["scorers"]["strict"]["value"],
        "prompt_tokens": result["tokens"]["prompt"]["mean"], "cached": round(result["cached_tokens"] / prompt, 3),
        "failed": result["shares"]["failed"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=3)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=8)
    arguments = parser.parse_args()
    model = keye.load("nano")
    with tempfile.TemporaryDirectory(prefix="keye-eval-reuse-") as name:
        folder, seeds = Path(name), range(arguments.videos)
        warm = write_data(folder / "warm", [99], 2, arguments.frames, copies=False)
        measure(model, warm, folder / "out-warm", arguments.frames, arguments.concurrency)
        runs = {}
        for label, copies in (("reuse", False), ("none", True)):
            data = write_data(folder / label, seeds, arguments.questions, arguments.frames, copies=copies)
            runs[label] = measure(model, data, folder / f"out-{label}", arguments.frames, arguments.concurrency)
        replies = [read_replies(folder / f"out-{label}" / TASK.name / PREDICTIONS_NAME) for label in runs]
    same = sum(replies[0][name].prediction == replies[1][name].prediction for name in replies[0])
    ratio = runs["reuse"]["items_per_second"] / runs["none"]["items_per_second"]
    cpu_ratio = runs["none"]["cpu_seconds"] / runs["reuse"]["cpu_seconds"]
    ratios = {"ratio": round(ratio, 2), "cpu_ratio": round(cpu_ratio, 2), "same_replies": same}
    print(json.dumps({**vars(arguments), **ratios, **runs}))


if __name__ == "__main__":
    main()
