"""Scores predictions that others made, by any scorer of a task: with the task's data, whose items the rows are matched
with, or by the fields that the rows themselves have."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from keye.errors import KeyeError
from keye.evals.predictions import Layout, Prediction, read_predictions
from keye.evals.result import MISSING, Reply
from keye.evals.run import score_run
from keye.evals.task import STRICT, EvalItem, Task, TaskSettings

#: Other names of fields that documents have, and columns of options.
_OPTIONS: Final = ("candidates", "choices", "option")
_ANSWERS: Final = ("gt_answer", "target", "gt", "gold", "ground_truth", "label")
_LETTERS: Final = "ABCDEFGHIJ"
#: Longest list that is read from a cell, in characters.
_MOST_LITERAL: Final = 100_000


def rescore(
    path: Path, task: Task, scorers: Sequence[str], *, folder: Path | None = None, settings: TaskSettings | None = None,
    output: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The result of the predictions in a file, of the same form as that of a run. `folder` are the task's data: then
    all its items count, and those without a prediction are missing. `KeyeError` for a file of an unknown layout, rows
    that lack fields, a scorer that the task does not have, and two predictions of one item."""
    for scorer in scorers:
        if scorer not in task.scorers:
            raise KeyeError(f"{scorer!r} does not score {task.name}: scorers are {', '.join(task.scorers)}")
    layout, rows = read_predictions(path)
    if folder is None:
        predictions = list(rows)
        items, joined = [_item_of(task, row, layout, path) for row in predictions], "rows"
        replies = [_reply_of(row) for row in predictions]
        _check_twice(items, path)
        _try_scorers(task, items, replies, scorers, path)
    else:
        items = list(task.read(folder, settings or TaskSettings()))
        replies, joined = _match(path, items, list(rows))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    return score_run(
        task, items, replies, folder=output, scorers=scorers, model=None, settings=None,
        source={"file": path.name, "layout": layout, "matched_by": joined},
    )  # fmt: skip


def _item_of(task: Task, row: Prediction, layout: Layout, path: Path) -> EvalItem:
    """The item of a row: what keye wrote as it stands, any other as the task reads rows of its own data."""
    if layout != "keye":
        try:
            item = task.item_of(complete_document(row.document), row.number)
        except KeyeError as error:
            raise KeyeError(f"row {row.number + 1} of {path}: {error}") from None
        return replace(item, id=row.id or item.id)
    name = row.id or str(row.number)
    return EvalItem(name, row.cluster or name, (), row.document, row.labels)


def complete_document(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with `options` and `answer` under these names, where it has them under others, and lists that stand in
    cells as text read as lists."""
    document = {name: _literal(value) if isinstance(value, str) else value for name, value in row.items()}
    if "options" not in document:
        options: Any = next((document[name] for name in _OPTIONS if isinstance(document.get(name), list)), None)
        if options is None and "A" in document:
            options = [f"{letter}. {document[letter]}" for letter in _LETTERS if letter in document]
        if options is not None:
            document["options"] = options
    if "answer" not in document:
        gold = next((document[name] for name in _ANSWERS if name in document), None)
        if gold is not None:
            document["answer"] = gold
    return document


def _literal(text: str) -> Any:
    """The list in a text such as "['a', 'b']"; the text where it is none."""
    if not (text[:1] == "[" and text[-1:] == "]" and len(text) <= _MOST_LITERAL and text.count("[") <= 1000):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, list) else text


def _check_twice(items: Iterable[EvalItem], path: Path) -> None:
    twice = [name for name, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise KeyeError(f"{path} has {len(twice):,} ids twice, such as {twice[0][:80]!r}: keep one row of each")


def _try_scorers(
    task: Task, items: Sequence[EvalItem], replies: Sequence[Reply], scorers: Sequence[str], path: Path
) -> None:
    """Scores the first row, to name the field that rows lack before all are scored."""
    for item, reply in zip(items, replies, strict=True):
        if reply.prediction is not None:
            for scorer in scorers or (STRICT,):
                try:
                    task.score_with(scorer, item.document, reply.prediction)
                except LookupError as error:
                    known = ", ".join(list(item.document)[:8]) or "none"
                    lacking = error.args[0] if error.args else "a field"
                    raise KeyeError(
                        f"rows of {path} lack {lacking!r}, which {scorer} of {task.name} reads (they have {known}): "
                        "name the task's data with --data"
                    ) from None
            return


def _match(path: Path, items: Sequence[EvalItem], rows: Sequence[Prediction]) -> tuple[list[Reply], str]:
    """The reply of each item, and by what the rows were matched: their ids, or their place in the data."""
    ids = {item.id for item in items}
    by_id = [row.id for row in rows if row.id in ids]
    if by_id and len(by_id) * 2 >= len(rows):
        named, joined = [row.id for row in rows], "id"
    else:
        numbers = [_place_of(row) for row in rows]
        named = [items[number].id if 0 <= number < len(items) else None for number in numbers]
        joined = "place in the data"
        _check_golds(path, items, rows, numbers)
    unknown = sum(name not in ids for name in named)
    if unknown:
        raise KeyeError(f"{unknown:,} of {len(rows):,} rows of {path} belong to no item of the data: name its own data")
    counts = Counter(named)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise KeyeError(f"{path} has {len(twice):,} items twice, such as {str(twice[0])[:80]!r}: keep one row of each")
    replies = {name: _reply_of(row) for name, row in zip(named, rows, strict=True)}
    return [replies.get(item.id, MISSING) for item in items], joined


def _reply_of(row: Prediction) -> Reply:
    return Reply(row.text) if row.text is not None else Reply(error=row.error or "no prediction")


def _place_of(row: Prediction) -> int:
    for name in ("doc_id", "index"):
        value = row.document.get(name)
        if isinstance(value, int) or (isinstance(value, str) and value.isdecimal() and len(value) < 12):
            return int(value)
    return row.number


def _check_golds(path: Path, items: Sequence[EvalItem], rows: Sequence[Prediction], numbers: Sequence[int]) -> None:
    """`KeyeError` where the gold answers in the file are others than those of the items at the same places."""
    pairs = [
        (str(row.document["answer"]).strip(), str(items[number].document["answer"]).strip())
        for row, number in zip(rows, numbers, strict=True)
        if 0 <= number < len(items) and "answer" in row.document and "answer" in items[number].document
    ]
    equal = sum(ours == theirs for ours, theirs in pairs)
    if pairs and equal < 0.9 * len(pairs):
        raise KeyeError(
            f"gold answers in {path} and in the data agree in {equal:,} of {len(pairs):,} rows: the file is of other "
            "data, or in another order"
        )
