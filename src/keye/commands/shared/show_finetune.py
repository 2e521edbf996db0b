"""How a fine-tuning looks: its check, its progress, and what to do with the result. Results go to standard output,
progress to standard error."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from keye.commands.shared.inputs import stderr
from keye.commands.shared.show import stdout, time_left
from keye.errors import is_number
from keye.train.finetune.check import Check
from keye.train.finetune.measure import Measured, Run, SampleText, Spread
from keye.train.finetune.run import Outcome
from keye.train.recipes.family.config import FamilyConfig
from keye.train.report import AnsweredSample
from keye.units import format_bytes, format_count, one_line, plural, printable

#: Faults, and pieces of a long text, that are printed.
_MOST_FAULTS: Final = 20
_FIRST_RUNS, _LAST_RUNS = 7, 5
#: Letters of a question or an answer.
_MOST_LETTERS: Final = 300
#: Around what is learnt, where there are no colours.
_MARKS: Final = ("\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}")


def print_check(check: Check, run: FamilyConfig) -> None:
    """Everything that a check found out."""
    console = stdout()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    for name, text in (*_data_rows(check), *_sample_rows(check.measured), *_part_rows(check, run), *_cost_rows(check)):
        table.add_row(name, Text(one_line(text)))
    console.print(table)
    for fault in check.data.faults[:_MOST_FAULTS]:
        console.print(Text(one_line(str(fault))), soft_wrap=True)
    if (more := check.data.bad_rows - _MOST_FAULTS) > 0:
        console.print(f"and {more:,} more")
    for sample in check.measured.texts:
        print_text(sample, console)
    print_verdict(check, console)


def print_verdict(check: Check, console: Console) -> None:
    """Warnings and problems, a line each."""
    for kind, sentences, style in (("warning", check.warnings, "yellow"), ("problem", check.problems, "bold red")):
        for sentence in sentences:
            console.print(Text(f"{kind}: ", style=style) + Text(one_line(sentence)), soft_wrap=True)


def print_text(sample: SampleText, console: Console) -> None:
    """A sample as the model reads it: what it learns in green, or between brackets where there are no colours."""
    console.print()
    console.print(Text(f"{one_line(sample.place)}, what is learnt is marked:", style="dim"), soft_wrap=True)
    text, has_color = Text(), console.color_system is not None
    runs = list(sample.runs)
    if (left := len(runs) - _FIRST_RUNS - _LAST_RUNS) > 1:
        runs[_FIRST_RUNS:-_LAST_RUNS] = [Run(f" ... {left} more pieces ... ", False)]
    for run in runs:
        piece = printable(run.text)
        text.append(f"{_MARKS[0]}{piece}{_MARKS[1]}" if run.learnt and not has_color else piece,
                    style="bold green" if run.learnt else "")  # fmt: skip
    console.print(text, soft_wrap=True)


def _data_rows(check: Check) -> list[tuple[str, str]]:
    data = check.data
    faults = data.bad_rows
    opened = (
        f", {plural(data.media_checked, 'medium').replace('mediums', 'media')} opened" if data.media_checked else ""
    )
    kinds = [(kind, f"{plural(rows, 'row')} of {path}") for path, kind, rows in data.formats]
    notes = [("note", f"{sentence}: {plural(count, 'row')}") for sentence, count in data.notes.items()]
    return [
        *kinds,
        ("data", f"{plural(data.rows, 'row')}{opened}: {plural(faults, 'fault') if faults else 'no faults'}"),
        *notes,
    ]


def _sample_rows(measured: Measured) -> list[tuple[str, str]]:
    out = [("samples", f"{measured.samples:,} laid out")]
    for name, spread, unit in (("tokens", measured.tokens, ""), ("learnt", measured.learnt, ""),
                               ("visual", measured.visual, ""), ("frames", measured.frames, ""),
                               ("spacing", measured.spacing, " s")):  # fmt: skip
        if spread is not None:
            out.append((name, _spread(spread, unit)))
    out += [("note", f"{sentence}: {plural(count, 'sample')}") for sentence, count in measured.notes.items()]
    times = measured.times
    if times.compared or times.without:
        words = f"{times.compared:,} compared with the times in the files: {times.different:,} differ"
        out.append(("times", words + (f"; {plural(times.without, 'video')} without any" if times.without else "")))
    return out


def _spread(spread: Spread, unit: str) -> str:
    least, median, p95, most = (
        f"{value:,.4g}{unit}" for value in (spread.least, spread.median, spread.p95, spread.most)
    )
    return f"min {least}, median {median}, p95 {p95}, max {most}"


def _part_rows(check: Check, run: FamilyConfig) -> list[tuple[str, str]]:
    verb = "trained" if run.lora is None else "adapted"
    out = []
    for part in check.parts:
        amount = f"{part.adapted:,} of {part.layers:,} {'tensors' if run.lora is None else 'layers'}"
        changing = f", {format_count(part.numbers)} numbers" if part.adapted else ""
        out.append((f"{part.part} {verb}", amount + changing))
    return out


def _cost_rows(check: Check) -> list[tuple[str, str]]:
    cost = check.cost
    if cost is None:
        return []
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in cost.memory.items() if size)
    free = "" if cost.free is None else f", {format_bytes(cost.free)} free"
    minutes = plural(math.ceil(cost.seconds / 60), "minute")
    hours = f"{cost.seconds / 3600:.1f} hours" if cost.seconds >= 5400 else minutes
    return [("memory", f"about {format_bytes(cost.total)} ({parts}){free}"),
            ("time", f"about {hours} for {plural(cost.packs, 'pack')} in {plural(cost.steps, 'step')}")]  # fmt: skip


class TrainingProgress:
    """A line for each record of the log, above a bar with the time left (on a terminal)."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=stderr(), transient=True)
        self.bar = self.progress.add_task("training", total=1.0, visible=False)

    def __enter__(self) -> TrainingProgress:
        if self.progress.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show_phase(self, phase: str) -> None:
        """What happens outside training."""
        self.progress.console.print(Text(phase, style="dim"))

    def __call__(self, figures: Mapping[str, Any]) -> None:
        left, minutes = figures.get("seconds_left"), figures.get("minutes")
        if is_number(left) and is_number(minutes):
            done = 60 * minutes / max(1e-9, 60 * minutes + left)  # type: ignore[operator]
            self.progress.update(self.bar, completed=done, visible=True)
        self.progress.console.print(Text(_record(figures)), soft_wrap=True)


def _record(figures: Mapping[str, Any]) -> str:
    """Step, losses, rate, memory and time left of a record."""
    words = [f"step {figures.get('step', 0):,}"]
    for name, label in (("loss", "loss"), ("val_loss", "validation loss"), ("lr", "lr")):
        if is_number(value := figures.get(name)):
            words.append(f"{label} {value:.4g}")
        elif name in figures:
            words.append(f"{label} not finite")
    if is_number(rate := figures.get("tokens_per_second")):
        words.append(f"{rate:,.0f} tokens/s")
    if is_number(memory := figures.get("memory_bytes")):
        words.append(format_bytes(memory))  # type: ignore[arg-type]
    if is_number(left := figures.get("seconds_left")) and not math.isinf(left):  # type: ignore[arg-type]
        words.append(time_left(left))  # type: ignore[arg-type]
    return ", ".join(words)


def print_answers(answers: Sequence[AnsweredSample]) -> None:
    """Questions with the reply of the data and those of the model."""
    console = stdout()
    for entry in answers:
        console.print(Text(_shorten(entry.question)), soft_wrap=True)
        for name, text in (("in the data", entry.expected), ("before", entry.before), ("after", entry.after)):
            if text is not None:
                console.print(Text(f"  {name:12}", style="dim") + Text(_shorten(text)), soft_wrap=True)


def _shorten(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= _MOST_LETTERS else f"{line[:_MOST_LETTERS]} ..."


def print_start(check: Check, run: FamilyConfig, console: Console) -> None:
    """What a run begins with, on standard error: what changes, what it may cost, warnings."""
    for name, text in (*_part_rows(check, run), *_cost_rows(check)):
        if not text.startswith("0 of"):
            console.print(Text(f"{name}: {one_line(text)}", style="dim"), soft_wrap=True)
    print_verdict(check, console)


def print_usage(outcome: Outcome, run: FamilyConfig, model: str) -> None:
    """Where the result is and how it is used."""
    console, folder = stdout(), shlex.quote(str(outcome.folder))
    console.print(Text(f"The report is {outcome.report}."), soft_wrap=True)
    if run.lora is None:
        console.print(Text(f'keye ask VIDEO "QUESTION" --model {folder}'), soft_wrap=True)
        return
    quant = f" --quant {run.quant}" if run.quant else ""
    named = f"--model {shlex.quote(model)}{quant} --adapter {folder}"
    console.print(Text(f'keye ask VIDEO "QUESTION" {named}'), soft_wrap=True)
    console.print(Text(f"keye serve {named.removeprefix('--model ')}"), soft_wrap=True)
    console.print(Text(f"keye merge {shlex.quote(model)} --adapter {folder} -o {folder}-merged"), soft_wrap=True)
