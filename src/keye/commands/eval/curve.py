"""`keye eval curve`: scores over frames, and sparse against dense attention."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from keye.commands.eval.run import prompting, sampling
from keye.commands.shared import options
from keye.errors import KeyeError


@click.command(context_settings=options.CONTEXT)
@click.argument("task", metavar="TASK")
@click.option("-o", "--output", type=options.PATH, required=True, metavar="DIR",
              help="Folder of results; what it holds already is not asked again.")  # fmt: skip
@click.option(
    "--frame-grid",
    "grid",
    metavar="N,N...",
    help="Most frames of a video, one run each, such as 64,128,256,512.  [default: those of the task]",
)
@click.option(
    "--modes",
    metavar="MODE[,MODE]",
    help="sparse, dense or both: with both, the items are compared in pairs.  [default: the model's]",
)
@click.option(
    "--margin",
    type=options.Positive(),
    default=1.0,
    show_default=True,
    metavar="POINTS",
    help="Sparse attention is lossless where the interval of the difference lies within this.",
)
@click.option("--clips", type=options.COUNT, metavar="N", help="Videos of each kind, of tasks that generate them.")
@click.option("--data", type=options.PATH, metavar="DIR", help="Folder of the data.  [default: as keye eval]")
@click.option("--limit", type=options.COUNT, metavar="N", help="Only the first N items.")
@click.option("--model", help="The model, or with --server what the servers call it.  [default: nano, the server's]")
@click.option("--server", "servers", metavar="URL[,URL...]", help="Ask these OpenAI-compatible servers instead.")
@click.option("--key", metavar="ENV", help="Environment variable that holds the servers' key.  [default: KEYE_API_KEY]")
@prompting
@sampling
@options.asking
@options.decode
@options.running_device
@options.adapter
@options.template
@options.storing
@options.as_json
@options.debug
def curve(
    task: str, output: Path, grid: str | None, modes: str | None, margin: float, clips: int | None,
    data: Path | None, as_json: bool, **arguments: Any,
) -> int:  # fmt: skip
    """Run a task with few and with many frames, or with both kinds of attention, and plot the scores.

    Writes curve.json, charts as SVG files and report.html. After a kill the same command goes on with what is left.

    \b
    keye eval curve needle_video -o curves/needle
    keye eval curve frame_groups --frame-grid 16,32,64,128,256 --modes sparse,dense -o curves/frames
    keye eval curve videomme_v2 --model 2.0 --frame-grid 64,128,256,512 --data ~/data -o curves/videomme
    """
    from keye.commands import batch
    from keye.commands.eval.run import TaskWorkers, settings_of
    from keye.commands.shared import inputs, show
    from keye.config.environment import eval_folder
    from keye.evals.curves import Grid, run_curve
    from keye.evals.run import RunOptions
    from keye.evals.settings import data_folder
    from keye.evals.task import find_task

    arguments = {**arguments, "attention": None, "allow_private_urls": False}
    batch.check_workers(arguments)
    chosen = with_clips(find_task(task), clips)
    points = Grid(parse_counts(grid), parse_modes(modes), margin)
    with inputs.open_decoder(arguments["decode"]) as decoder:
        workers = TaskWorkers(arguments, decoder)
        with show.progress_bar(chosen.name, notes=True) as advance:
            work = RunOptions(workers, workers.facts(), progress=advance)
            folder = data_folder(chosen, data or eval_folder())
            result = run_curve(chosen, folder, points, settings_of(arguments), output, work, inputs.note)
    if as_json:
        show.print_json({**result, "output": str(output)})
    else:
        print_curve(result, output)
    return 0 if result["complete"] else 2


def parse_counts(text: str | None) -> tuple[int, ...]:
    """The numbers of "64,128"; empty for None."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise KeyeError(f"--frame-grid is {text!r}; give numbers such as 64,128,256,512") from None


def parse_modes(text: str | None) -> tuple[str | None, ...]:
    """The kinds of attention of "sparse,dense"; (None,) for None."""
    if text is None:
        return (None,)
    modes = tuple(part.strip() for part in text.split(","))
    if unknown := [mode for mode in modes if mode not in ("sparse", "dense")]:
        raise KeyeError(f"--modes holds {unknown[0]!r}; give sparse, dense or sparse,dense")
    return modes


def with_clips(task: Any, clips: int | None) -> Any:
    """The task with another number of videos; `KeyeError` for one that generates none."""
    from dataclasses import replace

    from keye.evals.tasks.generated import GeneratedTask

    if clips is None:
        return task
    if not isinstance(task, GeneratedTask):
        raise KeyeError(f"{task.name} has videos of its own: leave --clips out, or take fewer items with --limit")
    return replace(task, clips=clips)


def print_curve(curve: Mapping[str, Any], output: Path) -> None:
    """A row for each point, and below what pairs of runs say."""
    from rich.table import Table

    from keye.commands.shared.show import stdout

    console, rows = stdout(), Table(box=None, pad_edge=False)
    measures = list(dict.fromkeys(name for point in curve["points"] for name in point["measures"]))
    for name in ("frames", "attention", *measures, "tokens"):
        rows.add_column(name, justify="right", no_wrap=True)
    for point in curve["points"]:
        values = [_words(point["measures"].get(name)) for name in measures]
        tokens = "-" if point["prompt_tokens"] is None else f"{point['prompt_tokens']:,.0f}"
        rows.add_row(str(point["frames"] or "-"), point["attention"] or "-", *values, tokens)
    console.print(rows)
    for point in curve["points"]:
        if point["failed"]:
            name = "-".join(str(part) for part in (point["attention"], point["frames"]) if part is not None)
            failed = round(point["failed"] * point["items"])
            console.print(f"{name}: {failed:,} of {point['items']:,} items failed, counted as wrong", soft_wrap=True)
    for pair in curve["lossless"]:
        figures = pair["scorers"]["strict"]
        low, high = figures["interval"] or (float("nan"), float("nan"))
        frames = f"{pair['frames']} frames: " if pair["frames"] else ""
        same = 100 * (pair["same_replies"] or 0)
        console.print(
            f"{frames}sparse minus dense {figures['difference']:+.2f} [{low:+.2f}, {high:+.2f}] points, "
            f"{same:.1f} % of replies equal: {pair['verdict']}", soft_wrap=True,
        )  # fmt: skip
    console.print(f"charts and report: {output}", soft_wrap=True)


def _words(measure: Mapping[str, Any] | None) -> str:
    if measure is None or measure["value"] is None:
        return "-"
    interval = measure["interval"]
    return f"{measure['value']:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")
