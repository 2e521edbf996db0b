"""Every score of keye-nano's model card: runs the FrameForge evaluation in all its settings and prints JSON lines.

Each line is the result of `keye eval frameforge` with the options it echoes. Run (about 2 minutes a setting and core):
    python benchmarks/nano_card.py [--model nano] [--n 2000] [--only unseen ...] [--jobs 2] > scores.jsonl
    python benchmarks/nano_card.py --card scores.jsonl    # writes the tables of the model card from these lines
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
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
#: Clips longer than most of training.
LONG: dict[str, dict[str, Any]] = {"128 frames": {"frames": (128, 128)}}
#: What a search looks at: pieces of films over textures and photographs, in many aspect ratios. Photographs are those
#: of matplotlib, scikit-learn and scikit-image; without them other textures are drawn and the scores differ.
WINDOWS: dict[str, dict[str, Any]] = {
    "windows, 32 frames, textured": {"frames": (32, 32), "scene": "window"},
    "windows, 64 frames, textured": {"frames": (64, 64), "scene": "window"},
    "close looks, 48 to 64 frames, textured": {"frames": (48, 64), "scene": "close"},
}
#: Tasks that come up so rarely that they are asked about on their own.
RARE = {task: {"tasks": (task,)} for task in ("place", "direction", "size", "times", "cut_time")}
ALL_SETTINGS = SETTINGS | LONG | WINDOWS | RARE


def run(name: str, model: str, count: int) -> dict[str, Any]:
    """One setting in a process of its own, one thread."""
    import torch

    import keye
    from keye.evals.tasks.frameforge import EvalOptions, evaluate

    torch.set_num_threads(1)
    return {"setting": name, **evaluate(keye.load(model).runtime, EvalOptions(questions=count, **ALL_SETTINGS[name]))}


def accuracy_of(result: dict[str, Any]) -> float:
    """The headline accuracy, or that of the only task."""
    return result["tasks"][result["setting"]]["accuracy"] if result["setting"] in RARE else result["accuracy"]


def write_card(lines: Path) -> None:
    """Replaces those tables of the packaged model card, each between its marks, whose settings are all in `lines`."""
    from keye.hub import asset

    results = {item["setting"]: item for item in map(json.loads, lines.read_text().splitlines())}
    card = asset("nano") / "README.md"
    text = card.read_text()
    writers: dict[str, tuple[Iterable[str], Callable[[dict[str, Any]], str]]] = {
        "scores": (SETTINGS, partial(score_table, names=SETTINGS)), "long": (LONG, partial(score_table, names=LONG)),
        "windows": (WINDOWS, window_table), "rare": (RARE, rare_table), "tasks": (("test", "unseen"), task_table),
    }  # fmt: skip
    tables = {mark: write(results) for mark, (names, write) in writers.items() if set(names) <= set(results)}
    for mark, table in tables.items():
        before, _, rest = text.partition(f"<!-- {mark} -->\n")
        _, end, after = rest.partition(f"<!-- end of {mark} -->\n")
        assert end, f"the card has no place for the table of {mark}"
        text = f"{before}<!-- {mark} -->\n{table}{end}{after}"
    card.write_text(text)


def score_table(results: dict[str, dict[str, Any]], names: Iterable[str]) -> str:
    """A row for each setting."""
    head = "setting | questions | mIoU | whole video | R1@0.3 / 0.5 / 0.7 | accuracy | k / context"
    rows = [head, "|".join(["---"] * 7)]
    for name in names:
        item = results[name]
        recall = " / ".join(f"{item['grounding'][f'r1@{level}']:.1f}" for level in (0.3, 0.5, 0.7))
        scores = f"{item['miou']:.1f} ± {item['miou_error']:.1f} | {item['whole_video_miou']:.1f} | {recall}"
        right = f"{item['accuracy']:.1f} ± {item['accuracy_error']:.1f}"
        rows.append(f"{name} | {item['questions']} | {scores} | {right} | {item['k_over_context']}")
    return "".join(f"| {row} |\n" for row in rows)


def window_table(results: dict[str, dict[str, Any]]) -> str:
    """A row for each setting of windows."""
    rows = ["setting | questions | presence of objects / words | calibration error | mIoU | whole video | "
            "`[]` where absent", "|".join(["---"] * 7)]  # fmt: skip
    for name in WINDOWS:
        item = results[name]
        objects, words, never = (
            item["tasks"][task]["accuracy"] for task in ("presence", "presence_text", "ground_none")
        )
        located = f"{item['miou']:.1f} ± {item['miou_error']:.1f} | {item['whole_video_miou']:.1f}"
        presence = f"{objects:.1f} / {words:.1f} | {item['presence']['calibration_error']:.3f}"
        rows.append(f"{name} | {item['questions']} | {presence} | {located} | {never:.1f}")
    return "".join(f"| {row} |\n" for row in rows)


def rare_table(results: dict[str, dict[str, Any]]) -> str:
    """A row for each task that is asked about on its own."""
    rows = ["task | questions | accuracy | majority", "|".join(["---"] * 4)]
    for name in RARE:
        item = results[name]["tasks"][name]
        rows.append(f"{name} | {item['n']} | {item['accuracy']:.1f} ± {item['error']:.1f} | {item['majority']:.1f}")
    return "".join(f"| {row} |\n" for row in rows)


def task_table(results: dict[str, dict[str, Any]]) -> str:
    """A row for each task; those that do not count towards the accuracy stand in brackets."""
    test, unseen = results["test"], results["unseen"]
    rows = ["task | n | test | majority | unseen", "|".join(["---"] * 5)]
    for name, item in test["tasks"].items():
        label = name if item["shipped"] else f"({name})"
        other = unseen["tasks"].get(name, {}).get("accuracy")
        there = "-" if other is None else f"{other:.1f}"
        rows.append(f"{label} | {item['n']} | {item['accuracy']:.1f} | {item['majority']:.1f} | {there}")
    return "".join(f"| {row} |\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=list(ALL_SETTINGS), default=list(ALL_SETTINGS))
    parser.add_argument("--card", type=Path, help="write the model card's tables from this file of results instead")
    arguments = parser.parse_args()
    if arguments.card is not None:
        write_card(arguments.card)
        return
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        pending = [pool.submit(run, name, arguments.model, arguments.n) for name in arguments.only]
        for done in as_completed(pending):
            result = done.result()
            print(json.dumps(result), flush=True)
            print(f"{result['setting']}: accuracy {accuracy_of(result)}, mIoU {result['miou']}", file=sys.stderr)


if __name__ == "__main__":
    main()
