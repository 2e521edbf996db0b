"""`keye train`: the stages of a TOML file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from keye.commands.shared import options

if TYPE_CHECKING:
    from keye.train.config import StageConfig


@click.command(context_settings=options.CONTEXT)
@click.argument("config", type=options.PATH)
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Resume from the last checkpoint of the output folder; --no-resume rejects a folder that holds a run.",
)
@click.option("--json", "as_json", is_flag=True, help="Print each report as one line of JSON, the output folder last.")
@click.option("--decode", metavar="ADDRESS",
              help="Have a decode service make the batches: local:N, ray or ray://HOST:PORT.")  # fmt: skip
@options.debug
def train(config: Path, resume: bool, as_json: bool, decode: str | None) -> None:
    """Train a model by the stages of a TOML file.

    An interrupted run (Ctrl-C) resumes from its last checkpoint when the command is run again. Several processes, on
    one machine or many: torchrun --nproc-per-node N -m keye train CONFIG.
    """
    from keye.config.environment import launched_place
    from keye.train.loop import train as run
    from keye.train.recipes import load_run

    settings, recipe = load_run(config)
    if (place := launched_place()) is not None and place[0] > 0:  # the first of torchrun's processes speaks for all
        run(settings, recipe, resume=resume, decode=decode)
        return
    if as_json:

        def print_figures(figures: Mapping[str, Any]) -> None:
            print(json.dumps(figures), flush=True)

        folder = run(settings, recipe, resume=resume, report=print_figures, decode=decode)
        print(json.dumps({"output": str(folder)}))
        return
    try:
        with Reports(settings.stages) as reports:
            folder = run(settings, recipe, resume=resume, report=reports, decode=decode)
    except KeyboardInterrupt:
        click.echo("keye: interrupted; run the command again to go on", err=True)
        raise
    click.echo(f"The model is in {folder}.")


class Reports:
    """Prints a line for each report, above a bar for the running stage (on a terminal). All on standard error."""

    def __init__(self, stages: Sequence[StageConfig]) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        from keye.commands.shared.inputs import stderr

        self.stages = {stage.name: stage for stage in stages}
        self.names = list(self.stages)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
        self.progress = Progress(*columns, TimeElapsedColumn(), console=stderr(), transient=True)
        self.bar = self.progress.add_task("starting", total=1.0)

    def __enter__(self) -> Reports:
        if self.progress.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def __call__(self, figures: Mapping[str, Any]) -> None:
        name = figures["stage"]
        place = self.names.index(name) + 1
        share = min(1.0, self.stages[name].share_done(figures["step"], figures["minutes"]))
        if left := figures.get("seconds_left"):  # knows of epochs too
            share = figures["minutes"] * 60 / (figures["minutes"] * 60 + left)
        self.progress.update(self.bar, completed=share, description=f"{name} ({place}/{len(self.names)})")
        self.progress.console.print(report_line(figures))


def report_line(figures: Mapping[str, Any]) -> str:
    """Stage, step, minutes and loss first, then whatever else was measured."""
    rest = {k: v for k, v in figures.items() if k not in ("stage", "step", "minutes", "loss", "seconds_left")}
    first = [f"{figures['stage']}: step {figures['step']}", f"{figures['minutes']:.1f} min"]
    if figures.get("seconds_left") is not None:
        first.append(f"{figures['seconds_left'] / 60:.1f} min left")
    if "loss" in figures:
        first.append(_named("loss", figures["loss"]))
    return ", ".join(first + [_named(name, value) for name, value in rest.items()])


def _named(name: str, value: float | None) -> str:
    return f"{name} not finite" if value is None else f"{name} {value:.4g}"
