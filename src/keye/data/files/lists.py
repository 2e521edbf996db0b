"""JSON files that hold all their rows in one value: a list, read entry by entry, or an object.

A list may be of any length: a first pass finds where its entries begin, in memory that one entry needs.
"""

from __future__ import annotations

import codecs
import json
import re
from array import array
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np

from keye.data.files.raw import CACHED_BLOCKS, MAX_ROW, Raw
from keye.data.files.rows import Offsets, Row, check_object, find_blocks
from keye.data.samples import BadRow, Place
from keye.errors import KeyeError
from keye.units import MIB, format_bytes

_JSON: Final = json.JSONDecoder()
_BLANK: Final = re.compile(r"[ \t\r\n]*")
#: Largest file that is one JSON object.
MAX_OBJECT: Final = 256 * MIB
#: Names under which objects have their rows.
_ROWS: Final = ("questions", "annotations", "data", "samples", "rows", "items", "examples")
#: The field that has the name of a row, where an object names its rows.
KEY: Final = "_key"


class JsonList:
    """The entries of a list that begins at byte `start`. A row of a list on a single line has its number for a line."""

    kind = "JSON list"
    window = CACHED_BLOCKS

    def __init__(self, raw: Raw, start: int = 0) -> None:
        self.raw, self.path = raw, raw.path
        starts, lines = array("q"), array("I")
        for begin, line in _Scanner(raw, start).entries():
            starts.append(begin)
            lines.append(line)
        self._starts = np.frombuffer(starts, np.int64) if starts else np.zeros(0, np.int64)
        is_single = len(lines) > 1 and lines[0] == lines[-1]
        self._lines = range(1, len(lines) + 1) if is_single else lines
        self.digest = raw.digest

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def blocks(self) -> Offsets | None:
        return find_blocks(self.raw.edges, self._starts)

    def place(self, index: int) -> Place:
        return Place(str(self.path), int(self._lines[index]))

    def read(self, index: int) -> Row:
        stop = int(self._starts[index + 1]) if index + 1 < len(self) else self.raw.size
        data = self.raw.read(int(self._starts[index]), min(stop, int(self._starts[index]) + MAX_ROW * 4))
        value, end = _JSON.raw_decode(data.decode(errors="replace"))
        return Row(check_object(value, data[: 4 * end], "entry"), self.place(index))


class _Scanner:
    """Finds the entries of a list that begins at byte `start`."""

    def __init__(self, raw: Raw, start: int) -> None:
        self._raw, self._skip = raw, start
        self._pieces = raw.pieces()
        self._decoder = codecs.getincrementaldecoder("utf-8-sig" if not start else "utf-8")()
        self._text, self._at, self._is_end = "", 0, False
        self._byte, self._line = start, 1

    def entries(self) -> Iterator[tuple[int, int]]:
        """The first byte and the line of each."""
        if self._next() != "[":
            raise self._fault("a list was expected")
        self._move(self._at + 1)
        is_first = True
        while (mark := self._next()) != "]":
            if not is_first:
                if mark != ",":
                    raise self._fault("a comma or the end of the list was expected")
                self._move(self._at + 1)
                self._next()
            begin, line = self._byte, self._line
            self._move(self._find_end())
            yield begin, line
            is_first = False
        for _ in self._pieces:  # the digest is of all bytes
            pass

    def _next(self) -> str:
        """The next character that is not blank; the scanner stands at it."""
        while True:
            self._move(_BLANK.match(self._text, self._at).end())  # type: ignore[union-attr]  # matches always
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                raise self._fault("the file ends inside the list")

    def _find_end(self) -> int:
        while True:
            fault = "the file ends inside an entry"
            try:
                value, end = _JSON.raw_decode(self._text, self._at)
                if end < len(self._text) or self._is_end or not isinstance(value, int | float):
                    return end  # a number at the end of the text may go on
            except RecursionError:
                raise self._fault("an entry is nested too deeply") from None
            except ValueError as error:
                fault = getattr(error, "msg", str(error))
            if len(self._text) - self._at > MAX_ROW:
                raise self._fault(f"an entry is longer than {format_bytes(MAX_ROW)}, or not JSON ({fault})")
            if not self._read():
                raise self._fault(fault)

    def _move(self, place: int) -> None:
        """Goes on to a character of the text."""
        passed = place - self._at
        if not passed:
            return
        ascii_only = self._text.isascii()
        self._byte += passed if ascii_only else len(self._text[self._at : place].encode())
        self._line += self._text.count("\n", self._at, place)
        self._at = place

    def _read(self) -> bool:
        """Adds a piece of the file to the text, without what is behind; False at the end of the file."""
        piece = next(self._pieces, b"")
        while piece and self._skip >= len(piece):
            self._line += piece.count(b"\n")
            self._skip -= len(piece)
            piece = next(self._pieces, b"")
        if self._skip:
            self._line += piece.count(b"\n", 0, self._skip)
            piece, self._skip = piece[self._skip :], 0
        if not self._byte and piece.startswith(codecs.BOM_UTF8):
            self._byte = len(codecs.BOM_UTF8)
        try:
            more = self._decoder.decode(piece, final=not piece)
        except UnicodeDecodeError:
            raise self._fault("it is not in UTF-8; save it as UTF-8") from None
        self._text, self._at, self._is_end = self._text[self._at :] + more, 0, not piece
        return not self._is_end

    def _fault(self, what: str) -> KeyeError:
        return KeyeError(f"{self._raw.path}:{self._line} is not valid JSON: {what}")


class JsonObject:
    """The rows of a file that is one object: the object itself, or its values, each with its name as `_key`."""

    kind = "JSON object"
    window = 1
    blocks = None

    def __init__(self, raw: Raw, data: bytes, value: Mapping[str, Any]) -> None:
        self.path, self.digest = raw.path, raw.digest
        named = bool(value) and all(isinstance(inner, Mapping) for inner in value.values())
        self._rows = [{KEY: name, **inner} for name, inner in value.items()] if named else [dict(value)]
        self._lines = list(_lines_of(data, value)) if named else [1]

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, index: int) -> Place:
        return Place(str(self.path), self._lines[index])

    def read(self, index: int) -> Row:
        return Row(self._rows[index], self.place(index))


def _lines_of(data: bytes, value: Mapping[str, Any]) -> Iterator[int]:
    """The line of each name; numbers where all stand on one line."""
    is_single = b"\n" not in data.strip()
    line, at = 1, 0
    for number, name in enumerate(value, 1):
        place = data.find(json.dumps(name, ensure_ascii=False).encode(errors="replace"), at)
        if place >= 0:
            line, at = line + data.count(b"\n", at, place), place
        yield number if is_single else line


def open_object(raw: Raw) -> JsonList | JsonObject:
    """A file that is one JSON object: the list of rows in it, or an object of rows."""
    data, size = [], 0
    for piece in raw.pieces():
        size += len(piece)
        if size > MAX_OBJECT:
            raise KeyeError(f"{raw.path} is one JSON object of more than {format_bytes(MAX_OBJECT)}; write JSON lines")
        data.append(piece)
    text = b"".join(data).removeprefix(codecs.BOM_UTF8)
    try:
        value = check_object(json.loads(text), text, "file")
    except BadRow as error:
        raise KeyeError(f"{raw.path}: {error}") from None
    except UnicodeDecodeError:
        raise KeyeError(f"{raw.path} is not in UTF-8; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise KeyeError(f"{raw.path}:{error.lineno} is not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError):
        raise KeyeError(f"{raw.path} is JSON with numbers or lists beyond what is read") from None
    for name in _ROWS:
        rows = value.get(name)
        if isinstance(rows, list) and rows and all(isinstance(row, Mapping) for row in rows[:8]):
            match = re.search(rb'"%s"\s*:\s*(\[)' % name.encode(), text)
            if match is not None:
                skipped = size - len(text)
                return JsonList(raw, match.start(1) + skipped)
    return JsonObject(raw, text, value)
