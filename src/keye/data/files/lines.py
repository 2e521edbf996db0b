"""Files with a row a line: JSON lines, CSV and plain text. Eight bytes are kept for a row: where it begins."""

from __future__ import annotations

import codecs
import csv
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np

from keye.data.files.raw import CACHED_BLOCKS, MAX_ROW, Raw
from keye.data.files.rows import Offsets, Row, find_blocks, parse_object
from keye.data.samples import BadRow, Place
from keye.errors import KeyeError
from keye.units import format_bytes

_NEWLINE, _QUOTE = b'\n"'
_BLANKS: Final = np.frombuffer(b" \t\r\n", np.uint8)
#: Cells may be as long as rows: tables of benchmarks hold pictures in base64.
csv.field_size_limit(MAX_ROW)
#: Columns of a CSV file.
MAX_COLUMNS: Final = 1000


class LineFile(ABC):
    """Rows that begin on lines of their own; subclasses say what a line means. Lines without text are no rows."""

    kind = ""
    window = CACHED_BLOCKS
    #: Whether a newline between double quotes belongs to its row.
    quotes = False

    def __init__(self, raw: Raw) -> None:
        self.raw, self.path = raw, raw.path
        self._starts, self._skipped = find_lines(raw.pieces(), quotes=self.quotes)
        self.digest = raw.digest
        if len(self._starts) and self._starts[0] == 0 and raw.read(0, 3) == codecs.BOM_UTF8:
            self._starts[0] = len(codecs.BOM_UTF8)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def blocks(self) -> Offsets | None:
        return find_blocks(self.raw.edges, self._starts)

    def place(self, index: int) -> Place:
        return Place(str(self.path), index + 1 + int(np.searchsorted(self._skipped, index, side="right")))

    def read(self, index: int) -> Row:
        return Row(self.parse(self.line(index)), self.place(index))

    @abstractmethod
    def parse(self, line: bytes) -> dict[str, Any]:
        """The fields of a line."""

    def line(self, index: int) -> bytes:
        """The bytes of a row, without the end of its line."""
        start = int(self._starts[index])
        stop = int(self._starts[index + 1]) if index + 1 < len(self._starts) else self.raw.size
        if stop - start > MAX_ROW:
            raise BadRow(f"the line has more than {format_bytes(MAX_ROW)}; name media by paths")
        data = self.raw.read(start, stop)
        return data if self.quotes else data.partition(b"\n")[0]


class JsonLines(LineFile):
    """A JSON object on each line."""

    kind = "JSON lines"

    def parse(self, line: bytes) -> dict[str, Any]:
        return parse_object(line)


class TextLines(LineFile):
    """A text on each line, as the field `text`."""

    kind = "text"

    def parse(self, line: bytes) -> dict[str, Any]:
        return {"text": decode(line).removesuffix("\r")}


class CsvFile(LineFile):
    """Rows of a table whose first line names the columns; parted by commas, semicolons or tabs."""

    kind = "CSV"
    quotes = True

    def __init__(self, raw: Raw) -> None:
        super().__init__(raw)
        if not len(self._starts):
            raise KeyeError(f"{self.path} has no line with the names of its columns")
        first = decode(super().line(0)).strip("\r\n")
        self._separator = max(",\t;", key=first.count)
        try:
            self.columns = [name.strip() for name in next(csv.reader([first], delimiter=self._separator), [])]
        except csv.Error as error:
            raise KeyeError(f"{self.path}:1 does not name columns as CSV ({error})") from None
        if len(self.columns) > MAX_COLUMNS or len(set(self.columns)) < len(self.columns):
            raise KeyeError(f"{self.path}:1 names {len(self.columns):,} columns, too many or one of them twice")

    def __len__(self) -> int:
        return max(0, len(self._starts) - 1)

    def place(self, index: int) -> Place:
        return super().place(index + 1)

    def line(self, index: int) -> bytes:
        return super().line(index + 1)

    def parse(self, line: bytes) -> dict[str, Any]:
        text = decode(line).rstrip("\r\n")
        try:
            rows = list(csv.reader(text.splitlines(keepends=True), delimiter=self._separator, strict=True))
        except csv.Error as error:
            raise BadRow(f"the line is not CSV ({error})") from None
        cells = rows[0] if len(rows) == 1 else []
        if len(cells) != len(self.columns):
            raise BadRow(f"the line has {len(cells)} cells and the first line names {len(self.columns)} columns")
        return dict(zip(self.columns, cells, strict=True))


def decode(line: bytes) -> str:
    """The text of a line in UTF-8; `BadRow` for other bytes."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise BadRow("the line is not in UTF-8; save the file as UTF-8") from None


def find_lines(pieces: Iterable[bytes], *, quotes: bool) -> tuple[Offsets, Offsets]:
    """Where rows begin, int64 [n]; and for each line that begins no row, since it is blank or in quotes, the number of
    rows that begin before it, int64 [m], ascending."""
    starts, skipped, count = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for begins, is_row in _iter_lines(pieces, quotes=quotes):
        before = count + np.cumsum(is_row)
        starts.append(begins[is_row])
        skipped.append(before[~is_row])
        count += int(is_row.sum())
    return np.concatenate(starts), np.concatenate(skipped)


def _iter_lines(pieces: Iterable[bytes], *, quotes: bool) -> Iterator[tuple[Offsets, np.ndarray]]:
    """For each piece the lines that begin in it and whether they begin a row."""
    base, is_pending, is_quoted = 0, True, False
    for piece in pieces:
        data = np.frombuffer(piece, np.uint8)
        ends = np.flatnonzero(data == _NEWLINE)
        outside = np.ones(len(ends) + 1, bool)
        outside[0] = not is_quoted
        if quotes:
            marks = np.flatnonzero(data == _QUOTE)
            outside[1:] = (np.searchsorted(marks, ends) + is_quoted) % 2 == 0
            is_quoted ^= bool(len(marks) % 2)
        begins = np.concatenate(([0], ends + 1))[not is_pending :]
        outside = outside[not is_pending :]
        is_pending = bool(len(ends)) and int(ends[-1]) == len(data) - 1
        if is_pending:
            begins, outside = begins[:-1], outside[:-1]
        is_row = outside.copy()
        for line in np.flatnonzero(outside & np.isin(data[begins], _BLANKS)):
            end = piece.find(b"\n", int(begins[line]))
            is_row[line] = bool(piece[int(begins[line]) : None if end < 0 else end].strip())
        yield begins + base, is_row
        base += len(data)
