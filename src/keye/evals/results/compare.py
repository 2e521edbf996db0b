"""Compares two results of one task item by item: the difference of their scores with its interval, items of one
cluster going together, and which items only one of them got right."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keye.errors import KeyeError
from keye.evals.results.result import SCORES_NAME, Z95, read_result
from keye.scoring.metrics import clustered_error

#: Facts of a run of which a comparison says that they differ.
_FACTS: Final = ("settings", "digests")
#: Items that a comparison names on each side.
_MOST_NAMED: Final = 20


@dataclass(frozen=True)
class Run:
    """A result with the scores of its items by id."""

    result: Mapping[str, Any]
    items: Mapping[str, Mapping[str, Any]]


def read_run(folder: Path) -> Run:
    """What `keye eval` wrote about one task. `KeyeError` where the folder has no such result."""
    result = read_result(folder)
    path = (folder if folder.is_dir() else folder.parent) / SCORES_NAME
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return Run(result, {row["id"]: row for row in rows})
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise KeyeError(f"{path} is missing or broken: run keye eval again, which asks nothing twice") from None


def list_runs(folder: Path) -> dict[str, Path]:
    """The tasks whose results are in a folder, and where; one that is itself the folder of a task is its only one."""
    places = [folder] if (folder / SCORES_NAME).is_file() or folder.is_file() else sorted(folder.glob("*/result.json"))
    runs = {str(read_result(place)["task"]): place if place.is_dir() else place.parent for place in places}
    if not runs:
        raise KeyeError(f"{folder} has no results: name the folder that keye eval wrote with -o")
    return runs


def compare(first: Run, second: Run) -> dict[str, Any]:
    """The difference of two runs, second minus first, by every scorer that both have. Items that only one of them has
    are counted and left out; items that failed on either side count as wrong, as they do in the results.

    Each scorer: `first` and `second`, the mean scores of the common items (0 to 100); `difference` with the 95 %
    `interval` of paired differences (None for a single cluster) and `significant`, whether that leaves 0 out;
    `headline`, the values of both results, by a `metric` that may be another than the mean; items where one side is
    better."""
    ours, theirs = first.result, second.result
    if ours["task"] != theirs["task"]:
        raise KeyeError(f"one result is of {ours['task']} and the other of {theirs['task']}: compare one task")
    common = [name for name, row in first.items.items() if name in second.items and row.get("has_gold", True)]
    if not common:
        raise KeyeError("the two results have no item in common: compare runs on the same data")
    scorers = [name for name in ours["scorers"] if name in theirs["scorers"]]
    return {
        "task": ours["task"], "first": ours.get("model"), "second": theirs.get("model"), "items": len(common),
        "only_first": len(first.items.keys() - second.items.keys()),
        "only_second": len(second.items.keys() - first.items.keys()),
        "failed": [sum(run.items[name].get("error") is not None for name in common) for run in (first, second)],
        "differs": _differing(ours, theirs),
        "scorers": {name: _compare_scores(name, first, second, common) for name in scorers},
    }  # fmt: skip


def _compare_scores(scorer: str, first: Run, second: Run, common: Sequence[str]) -> dict[str, Any]:
    left = [first.items[name]["scores"][scorer] for name in common]
    right = [second.items[name]["scores"][scorer] for name in common]
    clusters = [first.items[name]["cluster"] for name in common]
    changes = [b - a for a, b in zip(left, right, strict=True)]
    difference = 100 * math.fsum(changes) / len(changes)
    error = 100 * clustered_error([list(zip(clusters, changes, strict=True))])
    interval = None if math.isnan(error) else [difference - Z95 * error, difference + Z95 * error]
    better = {
        side: [name for name, change in zip(common, changes, strict=True) if sign * change > 1e-12]
        for side, sign in (("second", 1), ("first", -1))
    }
    return {
        "first": 100 * math.fsum(left) / len(left), "second": 100 * math.fsum(right) / len(right),
        "difference": difference, "interval": interval,
        "significant": None if interval is None else not interval[0] <= 0 <= interval[1],
        "metric": first.result["scorers"][scorer]["metric"],
        "headline": [run.result["scorers"][scorer]["value"] for run in (first, second)],
        "second_better": len(better["second"]), "first_better": len(better["first"]),
        "equal": len(common) - len(better["second"]) - len(better["first"]),
        "second_better_items": better["second"][:_MOST_NAMED], "first_better_items": better["first"][:_MOST_NAMED],
    }  # fmt: skip


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Names of settings and digests in which the runs differ, besides the model."""
    names = []
    for fact in _FACTS:
        ours, theirs = first.get(fact) or {}, second.get(fact) or {}
        names += [f"{fact}.{name}" for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    return [name for name in names if name != "digests.weights"]
