"""Results of benchmarks as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from keye.commands.shared.show import stdout
from keye.units import plural


def print_results(results: Sequence[Mapping[str, Any]]) -> None:
    """A row for each scorer of each task, and below what has to be known to read it."""
    console = stdout()
    table = Table(box=None, pad_edge=False)
    for name in ("task", "scorer", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("value", "95 %", "n", "unparsed", "random", "judge"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        for number, (scorer, figures) in enumerate(result["scorers"].items()):
            table.add_row(
                result["task"] if not number else "", scorer, figures["metric"], _value(figures),
                _interval(figures["interval"]), f"{figures['n']:,}", _percent(figures["unparsed"]),
                _percent(figures["random"]), _percent(figures["judge_needed"]),
            )  # fmt: skip
    console.print(table)
    for result in results:
        for line in _lines(result):
            console.print(f"{result['task']}: {line}", soft_wrap=True)


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
    console = stdout()
    table = Table(box=None, pad_edge=False)
    table.add_column("scorer", no_wrap=True)
    for name in ("first", "second", "difference", "95 %", "first better", "second better", "equal"):
        table.add_column(name, justify="right", no_wrap=True)
    for scorer, row in data["scorers"].items():
        table.add_row(
            scorer, f"{row['first']:.2f}", f"{row['second']:.2f}", f"{row['difference']:+.2f}",
            _interval(row["interval"], signed=True), f"{row['first_better']:,}", f"{row['second_better']:,}",
            f"{row['equal']:,}",
        )  # fmt: skip
    console.print(f"{data['task']}: {plural(data['items'], 'item')} in both results")
    console.print(table)
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
