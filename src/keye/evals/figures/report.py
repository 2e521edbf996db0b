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


def print_needle_report(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints what `keye.evals.tasks.needle.evaluate` returned, its baselines beside it."""
    console = console or Console()
    options, present, absent, costs = (result[name] for name in ("options", "present", "absent", "costs"))
    console.print(f"{_count(result['films'], 'film')} of {options['minutes']:g} minutes, split {options['split']}, "
                  f"events of {options['event']:g} s")  # fmt: skip
    table = Table(box=None, pad_edge=False)
    table.add_column("events that happen", no_wrap=True)
    names = ("hit@1", "hit@5", "r1@0.5", "miou")
    for name in names:
        table.add_column("mIoU" if name == "miou" else name.capitalize(), justify="right", no_wrap=True)
    table.add_row("search", *(_with_error(present[name]["value"], present[name]["error"]) for name in names))
    for label, row in _needle_baselines(result).items():
        table.add_row(label, *(_number(row.get(name)) for name in names))
    table.caption = f"n = {present['n']}; a hit is within 5 s"
    console.print(table)
    alarms = absent["false_alarms"]
    console.print(f"events that never happen: {_with_error(alarms['value'], alarms['error'])} % reported, n = "
                  f"{absent['n']}; of those that happen {_number(present['answered']['value'])} %")  # fmt: skip
    for name, text in (("presence", "presence"), ("chance", "first moment")):
        if (error := result["calibration"][name]["error"]) is not None:
            console.print(f"calibration error of the probability, {text}: {error:.3f}")
    further, tokens = costs["further"], costs["query_tokens"]["median"]
    console.print(f"a further question: {_number(further['wall'])} s, {_number(further['cpu'])} CPU seconds, "
                  f"{tokens:,.0f} tokens; index: {costs['index_tokens']:,.0f} tokens")  # fmt: skip


def _needle_baselines(result: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Rows below that of a search."""
    if (baselines := result.get("baselines")) is None:
        return {}
    ceilings = {
        f"perfect, 1 frame / {float(spacing):g} s": {"hit@1": 100 * item["seen"], "hit@5": 100 * item["seen"],
                                                 "r1@0.5": 100 * item["recall"], "miou": 100 * item["miou"]}
        for spacing, item in baselines["perfect_one_pass"].items()
    }  # fmt: skip
    one_pass = {name: figure["value"] for name, figure in baselines["one_pass"]["present"].items() if name != "n"}
    return {"one pass": one_pass, **ceilings, "random": baselines["random"]}


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
