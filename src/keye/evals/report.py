"""The result of an evaluation as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

#: Characters of a constant answer that are shown.
ANSWER_WIDTH = 22


def print_report(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints what `keye.evals.tasks.frameforge.evaluate` returned: headline, scores of every task, and costs."""
    console = console or Console()
    options = result["options"]
    fewest, most = options["frames"]
    attention = options["mode"] if options["mode"] == "dense" else f"sparse, keys by {options['select']}"
    through = ", through .mp4" if options["mp4"] else ""
    console.print(f"FrameForge, split {options['split']}, {fewest} to {most} frames, {attention}{through}")
    table, grounding = Table(box=None, show_header=False), result["grounding"]
    table.add_row("accuracy", _with_error(result["accuracy"], result["accuracy_error"]), "mean over shipped tasks")
    always = f"always the whole video: {_number(result['whole_video_miou'])}, n = {grounding['n']}"
    table.add_row("mIoU", _with_error(result["miou"], result["miou_error"]), always)
    for level in (name for name in grounding if name.startswith("r1@")):
        other = f"always the whole video: {_number(grounding['whole_video_' + level])}"
        table.add_row(level.upper(), _number(grounding[level]), other)
    for part in (table, _tasks(result["tasks"]), _costs(result)):
        console.print(part)


def _tasks(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("task", no_wrap=True)
    for name in ("n", "accuracy", "±", "constant", "gain", "mIoU"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("constant answer", no_wrap=True)
    for task, row in sorted(tasks.items(), key=lambda item: (not item[1]["shipped"], item[0])):
        answer = row["majority_answer"]  # shown as plain text, since answers may look like markup
        answer = answer if len(answer) <= ANSWER_WIDTH else answer[: ANSWER_WIDTH - 1] + "…"
        table.add_row(
            task if row["shipped"] else f"({task})", str(row["n"]), _number(row["accuracy"]), _number(row["error"]),
            _number(row["majority"]), f"{row['accuracy'] - row['majority']:+.1f}", _number(row.get("miou")),
            Text(answer),
        )  # fmt: skip
    table.caption = "accuracy: exact match, for intervals R1@0.5; tasks in brackets are not shipped"
    return table


def _costs(result: Mapping[str, Any]) -> str:
    share = result["k_over_context"]
    costs = (f"{_count(result['questions'], 'question')} about {_count(result['clips'], 'clip')} in "
             f"{result['seconds']:.1f} s, {result['tokens_per_second']:.0f} tokens/s, "
             f"context {result['mean_context']:.0f} tokens")  # fmt: skip
    is_sparse = share is not None and result["options"]["mode"] == "sparse"
    return f"{costs}, k/context {share:.3f}" if is_sparse else costs


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _with_error(value: float | None, error: float | None) -> str:
    return _number(value) if value is None or error is None else f"{value:.1f} ± {error:.1f}"
