"""What a file of rows is to its readers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from keye.data.files.raw import MAX_ROW
from keye.data.samples import BadRow, Place
from keye.media.source.fetch import Source
from keye.units import format_bytes

Offsets = NDArray[np.int64]
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """The fields of a row under the names that the file gives them. `members` are media that lie in the data file
    itself, by name; without them media are files of their own."""

    fields: Mapping[str, Any]
    place: Place
    members: Mapping[str, Source] = field(default_factory=dict)


class RowFile(Protocol):
    """Rows of one file, read at any place. `digest` tells whether the content has changed, `kind` names the format of
    the file for people."""

    digest: str
    kind: str

    @property
    def path(self) -> Path: ...

    def __len__(self) -> int: ...

    @property
    def blocks(self) -> Offsets | None:
        """The first rows of blocks that are read as one, ascending from 0; None where any row is as good."""
        ...

    @property
    def window(self) -> int:
        """How many blocks are kept in memory."""
        ...

    def place(self, index: int) -> Place: ...

    def read(self, index: int) -> Row:
        """One row. Raises `BadRow` for one that is broken."""
        ...


def parse_object(raw: bytes, what: str = "line") -> dict[str, Any]:
    """The JSON object that `raw` is. Raises `BadRow` for anything else, saying what is wrong with it."""
    if len(raw) > MAX_ROW:
        raise BadRow(f"the {what} has more than {format_bytes(MAX_ROW)}; name media by paths")
    try:
        value = json.loads(raw)
    except RecursionError:
        raise BadRow(f"the {what} is nested too deeply") from None
    except UnicodeDecodeError:
        raise BadRow(f"the {what} is not in UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        if not raw.strip():
            raise BadRow(f"the {what} is empty") from None
        raise BadRow(f"the {what} is not JSON ({error.msg} at character {error.pos + 1})") from None
    except ValueError:  # Python reads whole numbers of a few thousand digits at most
        raise BadRow(f"the {what} has a number of more digits than anything takes") from None
    return check_object(value, raw, what)


def check_object(value: object, raw: bytes, what: str) -> dict[str, Any]:
    """`value`, which `raw` stands for, if it is an object whose texts are text."""
    if not isinstance(value, dict):
        raise BadRow(f"the {what} is not a JSON object but a {type(value).__name__}")
    if (b"\\ud" in raw or b"\\uD" in raw) and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise BadRow(f"the {what} has half of a character (a single surrogate such as \\ud83d)")
    return value


def find_blocks(edges: Sequence[int], starts: Offsets) -> Offsets | None:
    """The first rows of the blocks that begin at `edges`, of rows that begin at `starts`; None without edges inside."""
    return np.unique(np.searchsorted(starts, edges)) if len(edges) > 1 else None
