"""Results of benchmarks as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from keye.commands.shared.show import stdout
from keye.units import plural

#: Characters of a line where standard output is not a terminal.
_WIDTH: Final = 160
#: Points up to which a headline is the mean of the items.
_SAME: Final = 0.005


def print_results(results: Sequence[Mapping[str, Any]]) -> None:
    """A row for each scorer of each task, and below what has to be known to read it. Columns that say nothing are left
    out."""
    rows = []
    for result in results:
        for number, (scorer, figures) in enumerate(result["scorers"].items()):
            rows.append({
                "task": result["task"] if not number else "", "scorer": scorer, "metric": figures["metric"],
                "value": _value(figures), "95 %": _interval(figures["interval"]), "n": f"{figures['n']:,}",
                "unparsed": _percent(figures["unparsed"]), "random": _percent(figures["random"]),
                "judge needed": _percent(figures["judge_needed"]),
            })  # fmt: skip
    console = _console()
    console.print(_table(rows, texts=("task", "scorer", "metric")))
    for result in results:
        for line in _lines(result):
            console.print(f"{result['task']}: {line}", soft_wrap=True)


def _console() -> Console:
    """A console for results; a file or pipe has room for all columns."""
    console = stdout()
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)
    return console


def _table(rows: Sequence[Mapping[str, str]], texts: Sequence[str]) -> Table:
    """The rows without columns that are empty in all of them. Numbers are never cut; names of `texts` are folded."""
    table = Table(box=None, pad_edge=False)
    names = [name for name in (rows[0] if rows else ()) if any(row[name] not in ("", "-") for row in rows)]
    for name in names:
        if name in texts:
            table.add_column(name, overflow="fold")
        else:
            width = max(len(name), *(len(row[name]) for row in rows))
            table.add_column(name, justify="right", no_wrap=True, min_width=width)
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def _lines(result: Mapping[str, Any]) -> list[str]:
    shares = result["shares"]
    lines = []
    if result["withheld"]:
        lines.append(f"no score: {result['withheld']}")
    if shares["failed"] or shares["missing"]:
        failed, missing = round(shares["failed"] * result["items"]), round(shares["missing"] * result["items"])
        lines.append(f"{plural(failed, 'failed item')} and {plural(missing, 'missing item')}, counted as wrong")
    if shares["judged"]:
        lines.append(f"{_percent(shares['judged'])} judged")
    costs = [f"{plural(result['items'], 'item')} in {plural(result['clusters'], 'cluster')}"]
    if result["frames"]:
        costs.append(f"{result['frames']['mean']:,.1f} frames")
    if result["tokens"]["prompt"]:
        costs.append(f"{result['tokens']['prompt']['mean']:,.0f} prompt tokens")
    if result["tokens"]["reply"]:
        costs.append(f"{result['tokens']['reply']['mean']:,.0f} generated")
    lines.append(", ".join(costs))
    notes = dict.fromkeys(note for figures in result["scorers"].values() for note in figures["notes"])
    return [*lines, *notes]


def print_comparison(data: Mapping[str, Any]) -> None:
    """The difference by every scorer, and what differs besides the model."""
    rows = [
        {
            "scorer": scorer, "first": f"{row['first']:.2f}", "second": f"{row['second']:.2f}",
            "difference": f"{row['difference']:+.2f}", "95 %": _interval(row["interval"], signed=True),
            "first better": f"{row['first_better']:,}", "second better": f"{row['second_better']:,}",
            "equal": f"{row['equal']:,}",
        }
        for scorer, row in data["scorers"].items()
    ]  # fmt: skip
    console = _console()
    console.print(f"{data['task']}: {plural(data['items'], 'item')} in both results")
    console.print(_table(rows, texts=("scorer",)))
    for scorer, row in data["scorers"].items():
        ours, theirs = row["headline"]
        if (
            ours is not None
            and theirs is not None
            and max(abs(ours - row["first"]), abs(theirs - row["second"])) > _SAME
        ):
            console.print(
                f"{row['metric']} by {scorer}, all items of each: {ours:.2f} and {theirs:.2f}", soft_wrap=True
            )
    only = data["only_first"] + data["only_second"]
    if only:
        console.print(
            f"left out: {data['only_first']:,} items of the first alone, {data['only_second']:,} of the second"
        )
    if any(data["failed"]):
        console.print(
            f"failed, counted as wrong: {data['failed'][0]:,} of the first, {data['failed'][1]:,} of the second"
        )
    if data["differs"]:
        console.print(f"besides the model these differ: {', '.join(data['differs'])}", soft_wrap=True)


def _value(figures: Mapping[str, Any]) -> str:
    if figures["value"] is not None:
        return f"{figures['value']:.2f}"
    return "-" if figures["lower_bound"] is None else f">= {figures['lower_bound']:.2f}"


def _interval(interval: Sequence[float] | None, *, signed: bool = False) -> str:
    if interval is None:
        return "-"
    low, high = (f"{value:+.2f}" if signed else f"{value:.2f}" for value in interval)
    return f"{low} to {high}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share else "-"
