"""Rows of several events as rows of one each, and rows of one event at several times as one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from keye.data.files.rows import Offsets, Row, RowFile
from keye.data.samples import BadRow, Place

#: What tells rows about one event from others; None for a row that is about none.
Key = Callable[[Mapping[str, Any]], object]
#: The rows that a row stands for; None for one that stands for itself.
Split = Callable[[Mapping[str, Any]], list[dict[str, Any]] | None]


class EventRows:
    """The rows of a file, parted by `split`. All are read once, and eight bytes kept for each."""

    def __init__(self, rows: RowFile, split: Split) -> None:
        self._rows, self._split = rows, split
        self.digest, self.kind, self.window = rows.digest, rows.kind, rows.window
        counts = (self._count(index) for index in range(len(rows)))
        self._starts = np.cumsum(np.fromiter((0, *counts), np.int64, len(rows) + 1))
        self._last: tuple[int, Row, list[dict[str, Any]] | None] | None = None

    @property
    def path(self) -> Path:
        return self._rows.path

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def blocks(self) -> Offsets | None:
        blocks = self._rows.blocks
        return None if blocks is None else np.unique(self._starts[blocks])

    def place(self, index: int) -> Place:
        return self._rows.place(self._row(index))

    def read(self, index: int) -> Row:
        number = self._row(index)
        last = self._last
        if last is None or last[0] != number:
            row = self._rows.read(number)
            last = self._last = (number, row, self._split(row.fields))
        _, row, events = last
        return row if events is None else replace(row, fields=events[index - int(self._starts[number])])

    def _row(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _count(self, index: int) -> int:
        try:
            events = self._split(self._rows.read(index).fields)
        except BadRow:
            return 1  # and is read again where it is wanted, as a bad row
        return 1 if events is None else len(events)


class JoinedRows:
    """The rows of a file, those with the same `key` as one with all their times: a table with a line for each time
    would else teach that the event happens then and at no other time. All are read once, and sixteen bytes kept for
    each."""

    def __init__(self, rows: RowFile, key: Key) -> None:
        self._rows = rows
        self.digest, self.kind, self.window = rows.digest, rows.kind, rows.window
        numbers, groups = dict[object, int](), np.zeros(len(rows), np.int64)
        for index in range(len(rows)):
            try:
                value = key(rows.read(index).fields)
            except BadRow:
                value = None
            groups[index] = numbers.setdefault(index if value is None else hash(value), len(numbers))
        self._members = np.argsort(groups, kind="stable")
        self._starts = np.searchsorted(groups[self._members], np.arange(len(numbers) + 1))

    @property
    def path(self) -> Path:
        return self._rows.path

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def blocks(self) -> Offsets | None:
        blocks = self._rows.blocks
        return None if blocks is None else np.unique(np.searchsorted(self._members[self._starts[:-1]], blocks))

    def place(self, index: int) -> Place:
        return self._rows.place(int(self._members[self._starts[index]]))

    def read(self, index: int) -> Row:
        numbers = self._members[self._starts[index] : self._starts[index + 1]]
        row = self._rows.read(int(numbers[0]))
        if len(numbers) == 1:
            return row
        times = [
            (fields.get("start"), fields.get("end")) for fields in (self._rows.read(int(n)).fields for n in numbers)
        ]
        if any(time in ((None, None), ("", "")) for time in times):
            raise BadRow(f"one of {len(times)} rows about this event says that it never happens, and others when")
        rest = {name: value for name, value in row.fields.items() if name not in ("start", "end")}
        return replace(row, fields={**rest, "spans": [list(time) for time in times]})
