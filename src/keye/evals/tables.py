"""Tasks whose questions are rows of public tables: reading, and checking that nothing is missing, by the same function.

Rules for odd rows, the same for all tasks: a row that repeats an earlier one (same id) is asked again under an id with
`#2` and counts again; a row without its gold answer is asked and not counted; a broken row stops the reading.
"""

from __future__ import annotations

import os
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keye.data.samples import BadRow, Place
from keye.errors import KeyeError
from keye.evals.data.files import DataFolder, NoFolder, read_rows
from keye.evals.task import DataReport, EvalItem, Task, TaskSettings

#: Sentences of one kind that a report shows.
_MOST_SENTENCES = 10
#: Columns of pictures.
_PICTURES = ("image", "image_1", "image_path", "decoded_image")


@dataclass(frozen=True, kw_only=True)
class TableTask(Task):
    """A task of rows.

    tables: where the rows are, alternatives as regular expressions for ends of paths; the first that matches counts.
    layouts: columns that every row has, one tuple for each layout of the public data.
    rows: published number of questions, None where it is not known.
    """

    tables: tuple[str, ...]
    layouts: tuple[tuple[str, ...], ...]
    rows: int | None = None

    @abstractmethod
    def items(self, row: Mapping[str, Any], folder: DataFolder, settings: TaskSettings) -> Iterable[EvalItem]:
        """The questions of a row, most often one. The row has the columns of a layout, and its number as `_row`
        and its file and line as `_place`."""

    def adapt(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row of another program's table of predictions under the names of the public data."""
        return row

    def read(self, folder: Path, settings: TaskSettings) -> Iterator[EvalItem]:
        """The items in the order of the tables."""
        data = DataFolder(folder, settings.scratch)
        seen: Counter[str] = Counter()
        for number, (place, row) in enumerate(read_rows(self.find_tables(data))):
            for item in self._items(place, row, number, data, settings):
                seen[item.id] += 1
                yield item if seen[item.id] == 1 else replace(item, id=f"{item.id}#{seen[item.id]}")

    def find_tables(self, data: DataFolder) -> list[Path]:
        """The files that hold the rows; `KeyeError` where there are none."""
        if paths := data.tables(self.tables):
            return paths
        names = " or ".join(dict.fromkeys(map(_plain, self.tables)))
        raise KeyeError(f"{data.root} has no table of {self.title} (a file named like {names}): download {self.source} "
                        "and name its folder")  # fmt: skip

    def item_of(self, row: Mapping[str, Any], number: int) -> EvalItem:
        """The item of a row of the public data or of another program's table of predictions."""
        complete = {**dict.fromkeys(_PICTURES, ""), **self.adapt(row)}  # tables of predictions leave pictures out
        return self._items(f"row {number + 1}", complete, number, NoFolder(), TaskSettings())[0]

    def _items(
        self, place: Place | str, row: Mapping[str, Any] | BadRow, number: int, data: DataFolder, settings: TaskSettings
    ) -> list[EvalItem]:
        if isinstance(row, BadRow):
            raise KeyeError(f"{place}: {row}")
        if missing := self.missing_fields(row):
            raise KeyeError(f"{place} lacks {', '.join(missing)}, which rows of {self.title} have: another version?")
        try:
            return list(self.items({**row, "_row": number, "_place": str(place)}, data, settings))
        except KeyeError as error:
            raise KeyeError(f"{place}: {error}") from None
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {str(error)[:80]}"
            raise KeyeError(f"{place} is not a row of {self.title} as it was published ({reason})") from None

    def missing_fields(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The columns that a row lacks of the layout that it comes closest to."""
        lacking = [tuple(name for name in layout if name not in row) for layout in self.layouts]
        return min(lacking, key=len, default=())

    def check(self, folder: Path) -> DataReport:
        """What is missing in a folder: tables, columns, rows against the published number, media, answers."""
        try:
            data = DataFolder(folder, writes=False)
            tables = self.find_tables(data)
        except KeyeError as error:
            return DataReport(self.name, str(folder), problems=(str(error),), expected=self._expected())
        return self._check(data, tables)

    def _expected(self) -> dict[str, int]:
        return {} if self.rows is None else {"items": self.rows}

    def _check(self, data: DataFolder, tables: Sequence[Path]) -> DataReport:
        rows, faults, fields = 0, list[str](), dict[str, None]()
        ids, media, silent = Counter[str](), dict[str, None](), 0
        try:
            for place, row in read_rows(tables):
                rows += 1
                if not isinstance(row, BadRow) and (missing := self.missing_fields(row)):
                    fields.update(dict.fromkeys(missing))
                    continue
                try:
                    items = self._items(place, row, rows - 1, data, TaskSettings())
                except KeyeError as error:
                    faults.append(str(error))
                    continue
                ids.update(item.id for item in items)
                silent += sum(not item.has_gold for item in items)
                media.update(dict.fromkeys(path for item in items for path in media_of(item)))
        except KeyeError as error:  # a table that cannot be read at all
            faults.insert(0, str(error))
        absent = tuple(path for path in media if not os.path.isfile(path))
        counts = {"tables": len(tables), "rows": rows, "items": ids.total(), "media": len(media)}
        return DataReport(
            self.name, str(data.root), counts, self._expected(), tuple(fields), absent,
            self._problems(data, ids.total(), fields, faults, len(absent), len(media)), _notes(ids, silent),
        )  # fmt: skip

    def _problems(
        self, data: DataFolder, items: int, fields: Mapping[str, None], faults: Sequence[str], absent: int, media: int
    ) -> tuple[str, ...]:
        problems = list(faults[:_MOST_SENTENCES])
        if len(faults) > _MOST_SENTENCES:
            problems.append(f"{len(faults) - _MOST_SENTENCES:,} more rows cannot be read")
        if fields:
            problems.append(f"rows lack {', '.join(fields)}: the data are of another version")
        if self.rows is not None and items != self.rows:
            problems.append(f"{items:,} questions are here and {self.rows:,} were published")
        if absent:
            packed = [path.name for path in data.archives]
            unpack = f"; {len(packed)} archives ({', '.join(packed[:3])} ...) are not unpacked" if packed else ""
            problems.append(f"{absent:,} of {media:,} media files are missing{unpack}")
        return tuple(problems)


def _notes(ids: Counter[str], silent: int) -> tuple[str, ...]:
    repeated = sum(count - 1 for count in ids.values())
    notes = []
    if repeated:
        notes.append(f"{repeated:,} rows repeat earlier ones and are asked and counted again")
    if silent:
        notes.append(f"{silent:,} questions have no gold answer: they are asked and not counted")
    return tuple(notes)


def media_of(item: EvalItem) -> list[str]:
    """Paths of the media of an item; those that lie in a table and were not written have none."""
    return [str(part[kind]) for part in item.content for kind in ("video", "image") if part.get(kind)]


def text_part(text: str) -> dict[str, Any]:
    """A part of a message."""
    return {"type": "text", "text": text}


def video_part(path: str, **options: Any) -> dict[str, Any]:
    """A part of a message."""
    return {"type": "video", "video": path, **options}


def image_part(path: str) -> dict[str, Any]:
    """A part of a message."""
    return {"type": "image", "image": path}


def _plain(pattern: str) -> str:
    """An example of the names that a regular expression for a path stands for."""
    first = re.sub(r"\(\?:([^|)]*)[^)]*\)\??", r"\1", pattern)
    return first.replace("[^/]*", "*").replace("jsonl?", "jsonl").replace(r"\d+", "4").replace("\\", "")
