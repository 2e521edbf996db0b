"""Scores predictions that others made, by any scorer of a task: with the task's data, whose items the rows are matched
with, or by the fields that the rows themselves have."""

from __future__ import annotations

import ast
import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from keye.errors import KeyeError
from keye.evals.results.predictions import Layout, Prediction, read_predictions
from keye.evals.results.result import MISSING, Reply, build_result, score_items, write_result
from keye.evals.task import EvalItem, Task, TaskSettings
from keye.units import listed

#: Other names of fields that documents have, and columns of options.
_OPTIONS: Final = ("candidates", "choices", "option")
_ANSWERS: Final = ("gt_answer", "target", "gt", "gold", "ground_truth", "label")
_LETTERS: Final = "ABCDEFGHIJ"
#: Fields by which rows about one video or picture are known.
_CLUSTERS: Final = (
    "cluster", "videoID", "video_id", "video_name", "video", "video_path", "image_path", "image_id", "image",
)  # fmt: skip
#: Fields that become labels of parts, and the longest text of one.
_LABELS: Final = (
    "duration", "domain", "category", "sub_category", "subcategory", "task_type", "question_type", "subject", "dim",
    "duration_group", "question_category", "l2_category", "level", "dataset",
)  # fmt: skip
_MOST_LABEL: Final = 80
#: Share of equal gold answers from which on two files are of the same data: formats of a few may differ.
_SAME_GOLDS: Final = 0.9
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
    with _collector_off():
        return _rescore(path, task, scorers, folder, settings or TaskSettings(), output)


@contextmanager
def _collector_off() -> Iterator[None]:
    """Rows are plain data without cycles, and many: the collector would walk them again and again, for a quarter of the
    time that all takes."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _rescore(
    path: Path, task: Task, scorers: Sequence[str], folder: Path | None, settings: TaskSettings, output: Path | None
) -> dict[str, Any]:
    layout, rows = read_predictions(path)
    predictions = list(rows)
    if folder is None:
        items, joined = _items_of(task, predictions, layout), "rows"
        replies = [_reply_of(row) for row in predictions]
        _check_twice(items, path)
    else:
        items = list(task.read(folder, settings))
        replies, joined = _match(path, items, predictions)
    try:
        scored = {name: score_items(task, items, replies, name) for name in scorers}
        source = {"file": path.name, "layout": layout, "matched_by": joined}
        result = build_result(task, items, replies, scored, source=source)
    except (LookupError, TypeError, AttributeError) as error:  # a scorer reads what the rows do not have
        if folder is not None:
            raise
        lacking = repr(error.args[0]) if isinstance(error, KeyError) else "a field of the kind"
        raise KeyeError(
            f"rows of {path} lack {lacking}, which scorers of {task.name} read (they have "
            f"{_named(items[0].document)}): name the task's data with --data"
        ) from None
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_result(output, result, scored)
    return result


def _items_of(task: Task, rows: Sequence[Prediction], layout: Layout) -> list[EvalItem]:
    """The rows as items: those of keye as they stand, others as the task reads rows of its own data or, where they lack
    some of its columns, by the fields that they have."""
    if layout == "keye":
        return [
            EvalItem(
                name := row.id or str(row.number),
                row.cluster or name,
                (),
                row.document,
                row.labels,
                has_gold=row.has_gold,
            )
            for row in rows
        ]
    documents = [complete_document(row.document) for row in rows]
    try:
        items = [task.item_of(document, row.number) for row, document in zip(rows, documents, strict=True)]
        return [
            replace(item, id=row.id or item.id, cluster=str(row.document.get("cluster") or item.cluster))
            for item, row in zip(items, rows, strict=True)
        ]
    except KeyeError:
        return [_plain_item(row, document) for row, document in zip(rows, documents, strict=True)]


def _plain_item(row: Prediction, document: Mapping[str, Any]) -> EvalItem:
    name = row.id or str(row.number)
    cluster = next((str(document[name]) for name in _CLUSTERS if document.get(name) not in (None, "")), None)
    labels = {
        field.replace("_", " "): str(value)
        for field in _LABELS
        if isinstance(value := document.get(field), str | int) and len(str(value)) <= _MOST_LABEL
    }
    return EvalItem(
        name, cluster or name, (), document, labels, has_gold=document.get("answer", True) not in (None, "")
    )


def _named(document: Mapping[str, Any]) -> str:
    names = [str(name)[:40] for name in document if name != "doc_id"]
    return listed(names, 8) if names else "none"


def complete_document(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with `options` and `answer` under these names, where it has them under others, and lists that stand in
    cells as text read as lists."""
    document = dict(row)
    for name, value in row.items():
        if isinstance(value, str) and value[:1] == "[":
            document[name] = _literal(value)
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


def _match(path: Path, items: Sequence[EvalItem], rows: Sequence[Prediction]) -> tuple[list[Reply], str]:
    """The reply of each item, and by what the rows were matched: their ids, or their places in the data."""
    ids = {item.id: number for number, item in enumerate(items)}
    known = sum(row.id in ids for row in rows)
    if known and known * 2 >= len(rows):
        places, joined = [ids.get(row.id or "", -1) for row in rows], "id"
        _check_golds(path, items, rows, places)
    else:
        places, joined = _places(path, items, rows), "place in the data"
    unknown = sum(not 0 <= place < len(items) for place in places)
    if unknown:
        raise KeyeError(f"{unknown:,} of {len(rows):,} rows of {path} belong to no item of the data: name its own data")
    twice = [place for place, count in Counter(places).items() if count > 1]
    if twice:
        name = items[twice[0]].id[:80]
        raise KeyeError(f"{path} has {len(twice):,} items twice, such as {name!r}: keep one row of each")
    replies = {place: _reply_of(row) for place, row in zip(places, rows, strict=True)}
    return [replies.get(number, MISSING) for number in range(len(items))], joined


def _places(path: Path, items: Sequence[EvalItem], rows: Sequence[Prediction]) -> list[int]:
    """The place of each row in the data: as the row numbers itself, from 0 or from 1, or as it stands in the file; the
    first whose gold answers are those of the data."""
    numbers = [_number_of(row) for row in rows]
    if all(number is None for number in numbers):
        named = sum(row.id is not None for row in rows)
        if named and not any("answer" in row.document for row in rows):
            # Neither ids nor gold answers say that these are replies to these questions.
            raise KeyeError(
                f"{named:,} of {len(rows):,} rows of {path} have ids that no item of the data has, and no gold answers "
                "to be matched by: name the data that they belong to"
            )
        numbers = [row.number for row in rows]
    own = [-1 if number is None else number for number in numbers]
    for places in (own, [number - 1 for number in own], [row.number for row in rows]):
        if all(0 <= place < len(items) for place in places) and _share_of_golds(items, rows, places) >= _SAME_GOLDS:
            return places
    _check_golds(path, items, rows, own)
    return own


def _number_of(row: Prediction) -> int | None:
    for name in ("doc_id", "index"):
        value = row.document.get(name)
        if isinstance(value, int | float) or (isinstance(value, str) and value.isdecimal() and len(value) < 12):
            return int(value)
    return None


def _reply_of(row: Prediction) -> Reply:
    return Reply(row.text) if row.text is not None else Reply(error=row.error or "no prediction")


def _share_of_golds(items: Sequence[EvalItem], rows: Sequence[Prediction], places: Sequence[int]) -> float:
    """Of the rows that have a gold answer, the share in which it is that of the item; 1 where none has."""
    pairs = [
        (_plain(row.document["answer"]), _plain(items[place].document["answer"]))
        for row, place in zip(rows, places, strict=True)
        if 0 <= place < len(items) and "answer" in row.document and "answer" in items[place].document
    ]
    return sum(ours == theirs for ours, theirs in pairs) / len(pairs) if pairs else 1.0


def _plain(value: object) -> str:
    return str(value).strip().casefold()


def _check_golds(path: Path, items: Sequence[EvalItem], rows: Sequence[Prediction], places: Sequence[int]) -> None:
    """`KeyeError` where the gold answers in the file are others than those of the items."""
    share = _share_of_golds(items, rows, places)
    if share < _SAME_GOLDS:
        raise KeyeError(
            f"gold answers in {path} and in the data agree in {share:.0%} of the rows: the file is of other "
            "data, or in another order"
        )
