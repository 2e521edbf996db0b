"""Rows of several events as rows of one each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from keye.data.files.rows import Offsets, Row, RowFile
from keye.data.samples import BadRow, Place

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
