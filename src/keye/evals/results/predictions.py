"""Files of predictions that others made, and ours in their form: samples of lmms-eval (JSON lines), tables of
VLMEvalKit (.tsv, .csv, .xlsx), plain JSON lines, and `predictions.jsonl` of `keye eval`.

Knows how rows are written, not what they mean: a task makes documents of them.
"""

from __future__ import annotations

import csv
import json
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from keye.errors import KeyeError, missing_package
from keye.units import GIB, MIB, format_bytes

Layout = Literal["keye", "lmms-eval", "vlmevalkit", "lines"]

#: Longest line and cell, largest file, largest table when unpacked, in bytes; and most rows.
_MOST_LINE: Final = 16 * MIB
_MOST_FILE: Final = 8 * GIB
_MOST_TABLE: Final = 1 * GIB
_MOST_ROWS: Final = 5_000_000
_IDS: Final = ("id", "custom_id", "question_id", "index", "doc_id", "qid", "pid")
_PREDICTIONS: Final = ("prediction", "pred", "response", "output", "answer_pred", "model_answer", "text")
#: Fields of a sample of lmms-eval that are no fields of its document.
_SAMPLE_FIELDS: Final = frozenset({
    "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash", "input",
    "input_media",
})  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """One row: `number` counts from 0; `id` is its own, where it has one; `text` is None where the row says that there
    was no reply, and `error` why. `document` are all other fields that it brings, `labels`, `cluster` and `has_gold`
    what keye wrote beside them."""

    number: int
    id: str | None
    text: str | None
    document: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    cluster: str | None = None
    has_gold: bool = True


def read_predictions(path: Path) -> tuple[Layout, Iterator[Prediction]]:
    """The layout of a file and its rows, read as they are taken. `KeyeError` in one sentence for a file that cannot be
    read, is of an unknown layout, or has a broken line."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise KeyeError(f"{path} cannot be read ({error.strerror}): name a file of predictions") from None
    if not path.is_file() or size > _MOST_FILE:
        raise KeyeError(f"{path} is not a file of up to {format_bytes(_MOST_FILE)}: name a file of predictions")
    rows = _table_rows(path) if path.suffix.lower() in (".tsv", ".csv", ".xlsx") else _line_rows(path)
    first = next(rows, None)
    if first is None:
        raise KeyeError(f"{path} has no rows: name a file of predictions")
    layout = _layout(path, first)
    return layout, _predictions(layout, first, rows)


def _layout(path: Path, row: Mapping[str, Any]) -> Layout:
    if path.suffix.lower() in (".tsv", ".csv", ".xlsx"):
        if "prediction" in row:
            return "vlmevalkit"
        raise KeyeError(
            f"{path} lacks the column prediction: a table of VLMEvalKit has index, answer and prediction; this one has "
            f"{_named(row)}"
        )
    if "line_digest" in row and "prediction" in row:
        return "keye"
    if "filtered_resps" in row or "resps" in row:
        if "doc" in row or "doc_id" in row:
            return "lmms-eval"
        raise KeyeError(f"{path} lacks doc and doc_id: samples of lmms-eval name their document by one of them")
    if any(name in row for name in _PREDICTIONS):
        return "lines"
    raise KeyeError(
        f"{path} lacks filtered_resps (samples of lmms-eval) and prediction (other JSON lines): its lines have "
        f"{_named(row)}"
    )


def _named(row: Mapping[str, Any]) -> str:
    names = [str(name)[:40] for name in row][:8]
    return ", ".join(names) + (" ..." if len(row) > 8 else "") if names else "no fields"


def _predictions(layout: Layout, first: Mapping[str, Any], rows: Iterator[Mapping[str, Any]]) -> Iterator[Prediction]:
    make = {"keye": _of_keye, "lmms-eval": _of_lmms_eval, "vlmevalkit": _of_row, "lines": _of_row}[layout]
    yield make(0, first)
    for number, row in enumerate(rows, 1):
        if number >= _MOST_ROWS:
            raise KeyeError(f"the file has more than {_MOST_ROWS:,} rows: cut it into parts")
        yield make(number, row)


def _of_keye(number: int, row: Mapping[str, Any]) -> Prediction:
    document, labels, error = row.get("document"), row.get("labels"), row.get("error")
    return Prediction(
        number, _text_or_none(row.get("id")), row.get("prediction") if error is None else None,
        document if isinstance(document, Mapping) else {}, None if error is None else str(error),
        labels if isinstance(labels, Mapping) else {}, _text_or_none(row.get("cluster")),
        row.get("has_gold") is not False,
    )  # fmt: skip


def _of_lmms_eval(number: int, row: Mapping[str, Any]) -> Prediction:
    """A sample: its text before lmms-eval's filters took anything away, where the file has it. Newer versions leave the
    document out; what metrics repeat of it, and the target, are then all that the line says."""
    text = _first_text(row.get("resps")) if "resps" in row else None
    text = _first_text(row.get("filtered_resps")) if text is None else text
    document: dict[str, Any] = {}
    for name, value in row.items():
        if name not in _SAMPLE_FIELDS and isinstance(value, Mapping):
            document |= {key: inner for key, inner in value.items() if key not in ("pred_answer", "score")}
    if isinstance(row.get("doc"), Mapping):
        document |= row["doc"]
    if row.get("target") is not None:
        document.setdefault("answer", row["target"])
    if isinstance(row.get("input"), str):
        document.setdefault("prompt", row["input"])
    own = next((document[name] for name in _IDS if name in document), None)
    document.setdefault("doc_id", row.get("doc_id", number))
    return Prediction(number, _text_or_none(own), text, document)


def _first_text(value: Any) -> str | None:
    """The text in lists of one."""
    for _ in range(4):
        if isinstance(value, list):
            value = value[0] if value else None
    return value if isinstance(value, str) else None


def _of_row(number: int, row: Mapping[str, Any]) -> Prediction:
    name = next(name for name in (*_PREDICTIONS, "") if name in row or not name)
    own = next((row[key] for key in _IDS if row.get(key) not in (None, "")), None)
    value = row.get(name)
    text = None if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    nested = row.get("document") if isinstance(row.get("document"), Mapping) else row.get("doc")
    inner = dict(nested) if isinstance(nested, Mapping) else {}
    document = {**{key: value for key, value in row.items() if key not in (name, "document", "doc")}, **inner}
    return Prediction(number, _text_or_none(own), text, document, None if text is not None else "no prediction")


def _text_or_none(value: Any) -> str | None:
    return None if value is None else str(value)


def _line_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MOST_LINE + 1), b""), 1):
            if len(line) > _MOST_LINE:
                raise KeyeError(f"line {number} of {path} has more than {format_bytes(_MOST_LINE)}: leave media out")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise KeyeError(f"line {number} of {path} is not JSON: give one JSON object a line") from None
            if not isinstance(row, dict):
                raise KeyeError(f"line {number} of {path} is not a JSON object: give one JSON object a line")
            yield row


def _table_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.suffix.lower() == ".xlsx":
        return _sheet_rows(path)
    return _text_rows(path, "\t" if path.suffix.lower() == ".tsv" else ",")


def _text_rows(path: Path, delimiter: str) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(min(_MOST_LINE, sys.maxsize))
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        try:
            for row in reader:
                yield {name: value for name, value in row.items() if name is not None and value not in (None, "")}
        except csv.Error as error:
            raise KeyeError(f"row {reader.line_num} of {path} cannot be read ({error}): save the table again") from None


def _sheet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import openpyxl
    except ModuleNotFoundError as error:
        raise missing_package(error.name, "tables in .xlsx", "eval") from None
    broken = KeyeError(f"{path} is not a table in .xlsx: save it again, or as .tsv")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > _MOST_TABLE:
            raise KeyeError(f"{path} unpacks to {format_bytes(unpacked)}: save it as .tsv")
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        rows = iter(book.worksheets[0].iter_rows(values_only=True))
        names = [str(name) if name is not None else "" for name in next(rows, ())]
        for cells in rows:
            row = {name: cell for name, cell in zip(names, cells, strict=False) if name and cell is not None}
            if row:
                yield {
                    name: cell if isinstance(cell, str | int | float | bool) else str(cell)
                    for name, cell in row.items()
                }
    except KeyeError:
        raise
    except Exception:  # noqa: BLE001 - of a file that others made, whatever the library says of it
        raise broken from None


def write_predictions(path: Path, form: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Records of `keye eval` in the form of others: "lmms-eval" (samples as JSON lines) or "vlmevalkit" (a .tsv)."""
    if form == "lmms-eval":
        with path.open("w", encoding="utf-8") as file:
            file.writelines(
                json.dumps(_sample(number, row), ensure_ascii=False) + "\n" for number, row in enumerate(records)
            )
        return
    rows = [_table_row(number, record) for number, record in enumerate(records)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    names.sort(key=lambda name: (name == "prediction", name != "index"))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _sample(number: int, record: Mapping[str, Any]) -> dict[str, Any]:
    document = dict(record["document"])
    text = record["prediction"] or ""
    return {
        "doc_id": number, "doc": {"id": record["id"], **_cluster_of(record), **document},
        "target": str(_gold(document)), "resps": [[text]], "filtered_resps": [text],
    }  # fmt: skip


def _table_row(number: int, record: Mapping[str, Any]) -> dict[str, Any]:
    document = dict(record["document"])
    options = document.pop("options", document.pop("choices", None))
    row: dict[str, Any] = {"index": number, "id": record["id"], **_cluster_of(record)}
    if isinstance(options, Sequence) and not isinstance(options, str) and len(options) <= 26:
        for letter, option in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", options, strict=False):
            row[letter] = str(option).removeprefix(f"{letter}. ")
    elif options is not None:
        row["options"] = options
    for name, value in document.items():
        row[name] = value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)
    return {**row, "answer": _gold(document), "prediction": record["prediction"] or ""}


def _cluster_of(record: Mapping[str, Any]) -> dict[str, str]:
    """What goes together in an interval, which the fields of a document need not tell."""
    return {"cluster": record["cluster"]} if record.get("cluster") else {}


def _gold(document: Mapping[str, Any]) -> Any:
    return next(
        (document[name] for name in ("answer", "correct_choice", "gt_answer", "number", "span") if name in document), ""
    )
