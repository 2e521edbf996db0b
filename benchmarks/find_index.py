"""Reading a film into a search index, and putting a question to all its windows: keye-nano, a two-hour FrameForge film.

    python benchmarks/find_index.py --json

Writes the film (or takes `--video FILE`), builds its index in an empty file, opens it and scores three questions on all
windows, the first with nothing of the file compared with its checksums yet. Wall and CPU seconds; those of the index
include the decode worker. `left` is the time that was predicted before anything was read. `windows_per_second` is the
median of the repeats. Nothing is looked at closely here: `benchmarks/find.py` measures searches.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import keye
from keye import Keye
from keye.data.frameforge import plan_film, write_film
from keye.engine.media import as_medium
from keye.moments import FindProgress
from keye.sessions.search.build import build_search_index
from keye.sessions.search.scoring import score_windows
from keye.sessions.search.search_index import SearchIndex, open_search_index

QUESTIONS = [f"is there a {name} in the video?" for name in ("red circle", "blue square", "green star")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object; this is the only form")
    parser.add_argument("--minutes", type=float, default=120, help="length of the film that is written")
    parser.add_argument("--video", type=Path, help="a film that is there already")
    parser.add_argument("--window-frames", type=int, help="frames of a window; the model's own by default")
    parser.add_argument("--spacing", type=float, help="seconds between frames")
    parser.add_argument("--no-scenes", action="store_true", help="decode no more than the frames that are sampled")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="keye-find-") as folder:
        video = options.video or Path(folder) / "film.mp4"
        if options.video is None:
            write_film(plan_film(1, minutes=options.minutes, needles=8), video)
        print(json.dumps(measure(video, Path(folder) / "film.keye", options), indent=2))


def measure(video: Path, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Builds the index and asks."""
    model = keye.load("nano")
    predicted: list[float | None] = []

    def build() -> None:
        for event in build_search_index(
            model.engine, as_medium(video), path, spacing=options.spacing, window_frames=options.window_frames,
            scenes=not options.no_scenes,
        ):  # fmt: skip
            if isinstance(event, FindProgress) and not predicted:
                predicted.append(event.seconds_left)

    built = timed(build)
    opened: list[SearchIndex] = []
    opening = timed(lambda: opened.append(open_search_index(model.runtime, path)))
    (index,) = opened
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(1 + options.repeats)]
    answers = [timed(partial(score, model, index, question)) for question in questions]
    count = len(index.windows)
    return {
        "duration": round(index.duration, 1), "megabytes": round(video.stat().st_size / 1e6, 1),
        "spacings": index.head.plan["spacings"], "window_frames": index.head.plan["frames"], "windows": count,
        "frames": index.frames, "tokens": index.tokens, "index_megabytes": round(path.stat().st_size / 1e6, 1),
        "cuts": len(index.cuts), "left": predicted[0] and round(predicted[0], 1), "index": built, "open": opening,
        "first_question": answers[0],
        "question": {
            name: round(statistics.median(times[name] for times in answers[1:]), 3) for name in ("wall", "cpu")
        },
        "windows_per_second": round(count / statistics.median(times["wall"] for times in answers[1:])),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def score(model: Keye, index: SearchIndex, question: str) -> None:
    """Puts a question to all windows."""
    for _ in score_windows(model.engine, [(index, window.number) for window in index.windows], question):
        pass


def timed(run: Callable[[], object]) -> dict[str, float]:
    """Wall seconds, and CPU seconds of this process and of those that it has waited for."""

    def cpu() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    begin, used = time.perf_counter(), cpu()
    run()
    return {"wall": round(time.perf_counter() - begin, 3), "cpu": round(cpu() - used, 3)}


if __name__ == "__main__":
    main()
