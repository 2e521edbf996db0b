"""Golden scoring data: files of JSON lines, each with what official implementations returned for one input.

Knows the layout that the README of the data states and how to compare; the scorers are found by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from keye.errors import KeyeError
from keye.scoring.official.registry import SET_KINDS, find_scorer

TOLERANCE = 1e-6
#: Remarks of the author of the data, that are in no result of an implementation.
REMARKS = ("note",)
#: The picks of these depend on the seed of Python's hashes, so that the score alone is compared.
UNSTABLE = ("mmmu", "lmms-eval-75571cf")

Line = dict[str, Any]


@dataclass(frozen=True)
class GoldenFile:
    """One file of the folder, read when it is first needed."""

    path: Path

    @cached_property
    def lines(self) -> list[Line]:
        """The file's lines in order; `KeyeError` names the line that is not an object with the fields of the layout."""
        lines = []
        for number, text in enumerate(self.path.read_text(encoding="utf-8").split("\n"), 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError as error:
                raise KeyeError(f"{self.path}, line {number}: not JSON: {error}") from None
            if not isinstance(line, dict):
                raise KeyeError(f"{self.path}, line {number}: not an object")
            lacking = [name for name in ("id", "task", "kind", "input", "official") if name not in line]
            if lacking:
                raise KeyeError(f"{self.path}, line {number}: lacks {', '.join(lacking)}")
            lines.append(line)
        return lines

    @cached_property
    def by_id(self) -> dict[str, Line]:
        return {line["id"]: line for line in self.lines}

    @property
    def implementations(self) -> list[str]:
        """Those that scored at least one line of this file, in alphabetical order."""
        return sorted({name for line in self.lines for name in line["official"]})


@dataclass
class Outcome:
    """How many results of one implementation agree, and what differs."""

    passed: int = 0
    skipped: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        return {"passed": self.passed, "failed": len(self.problems), "skipped": self.skipped}


def is_marked(result: Any) -> bool:
    """Whether the original would draw an option or call a judge, and nothing else in the result is free of that."""
    if not isinstance(result, dict) or not result:
        return False
    if result.get("random") is True or result.get("judge_needed") is True:
        return True
    return all(is_marked(part) for part in result.values())


def iter_differences(got: Any, want: Any, place: str = "") -> Iterator[str]:
    """One text for each place where two values of JSON differ; numbers may differ by `TOLERANCE`."""
    if isinstance(got, dict) and isinstance(want, dict):
        for name in sorted(got.keys() | want.keys()):
            path = f"{place}.{name}" if place else name
            if name not in want:
                yield f"{path} is {got[name]!r}, expected no such field"
            elif name not in got:
                yield f"{path} is missing, expected {want[name]!r}"
            else:
                yield from iter_differences(got[name], want[name], path)
    elif isinstance(got, list) and isinstance(want, list) and len(got) == len(want):
        for position, (left, right) in enumerate(zip(got, want, strict=True)):
            yield from iter_differences(left, right, f"{place}[{position}]")
    elif not _are_equal(got, want):
        yield f"{place or 'the result'} is {got!r}, expected {want!r}"


def _are_equal(got: Any, want: Any) -> bool:
    if isinstance(got, bool) or isinstance(want, bool) or not isinstance(want, int | float):
        return type(got) is type(want) and got == want
    if not isinstance(got, int | float):
        return False
    return (
        got == want or math.isclose(got, want, rel_tol=0, abs_tol=TOLERANCE) or (math.isnan(got) and math.isnan(want))
    )


def call_scorer(file: GoldenFile, line: Line, implementation: str) -> Any:
    """What our scorer of this name returns for a line, as JSON would store it."""
    scorer = find_scorer(line["task"], line["kind"], implementation)
    document: Mapping[str, Any] = line["input"]
    if line["kind"] not in SET_KINDS:
        return json.loads(json.dumps(scorer(document, line.get("prediction"))))
    names = document.get("items", [])
    absent = [name for name in names if name not in file.by_id]
    if absent:
        raise KeyeError(f"{file.path} lacks the items {', '.join(absent[:5])} of {line['id']}")
    items = [(file.by_id[name]["input"], file.by_id[name].get("prediction")) for name in names]
    return json.loads(json.dumps(scorer(document, items)))


def list_differences(line: Line, implementation: str, got: Any) -> list[str]:
    """Where a result differs from the recorded one, apart from what the data's README excepts."""
    want = line["official"][implementation]
    if isinstance(got, dict):
        errors = [side.get("error") for side in (got, want)]
        if all(isinstance(error, str) for error in errors):
            # The type of an exception: sentences differ between releases of Python
            got, want = ({"error": error.partition("(")[0].partition(":")[0]} for error in errors)
        got = {name: value for name, value in got.items() if name not in REMARKS}
        want = {name: value for name, value in want.items() if name not in REMARKS}
        is_open = line["kind"] == "item" and line["input"].get("question_type") == "open"
        if (line["task"], implementation) == UNSTABLE and is_open:
            got, want = ({**side, "extracted": None} for side in (got, want))
    return list(iter_differences(got, want))


def check_file(file: GoldenFile, implementation: str) -> Outcome:
    """Scores every line of a file that has a result of this implementation."""
    outcome = Outcome()
    for line in file.lines:
        if implementation not in line["official"]:
            continue
        try:
            problems = list_differences(line, implementation, call_scorer(file, line, implementation))
        except Exception as error:  # noqa: BLE001 - a scorer that raises is a difference of this line alone
            problems = [f"{type(error).__name__}: {error}"]
        if problems:
            outcome.problems.append(f"{line['id']} ({line.get('tag')}): {'; '.join(problems)}")
        elif is_marked(line["official"][implementation]):
            outcome.skipped += 1
        else:
            outcome.passed += 1
    return outcome
