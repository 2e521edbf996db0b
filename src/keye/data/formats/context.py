"""What converting the rows of one set needs besides a row: its folder of media, the names of its columns, the wording
of the model's questions; and the notes on what was tolerated."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from keye.config import GenerationConfig
from keye.data.samples import BadRow

#: Turns an event into the question when it happens.
GroundQuestion: TypeAlias = Callable[[str], str]


def default_question(event: str) -> str:
    """The question of models that bring none of their own."""
    return GenerationConfig().ground_prompt.format(event=event)


class Notes:
    """Counts of what was tolerated in the rows of a set, by sentence."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, sentence: str) -> None:
        """Counts a row."""
        self.counts[sentence] += 1


@dataclass(frozen=True)
class Context:
    """`root` is where relative names of media begin; `columns` maps names that a file uses to ours. With `opens` media
    may be opened where a row cannot be understood without (pixel coordinates); else only names are checked.
    `ground_question` words the question when an event happens, as the model is asked it. `prepare` gives the fields of
    rows our names before `columns` do; `charades` says that texts are lines of Charades-STA."""

    root: Path
    columns: Mapping[str, str] = field(default_factory=dict)
    ground_question: GroundQuestion = default_question
    mode: str | None = None
    opens: bool = True
    prepare: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    charades: bool = False
    notes: Notes = field(default_factory=Notes)
    paths: Paths = field(default_factory=lambda: Paths())


class Paths:
    """Whether media files are there; each name is looked up once while `remember` holds."""

    def __init__(self, *, remember: bool = False) -> None:
        self._faults: dict[str, str | None] | None = {} if remember else None

    def check(self, path: str) -> None:
        """`BadRow` where no file with content is at `path`."""
        if self._faults is None:
            fault = find_fault(path)
        elif path in self._faults:
            fault = self._faults[path]
        else:
            fault = self._faults[path] = find_fault(path)
        if fault is not None:
            raise BadRow(fault)

    def exists(self, path: str) -> bool:
        """Whether a regular file is at `path`."""
        return os.path.isfile(path)


def find_fault(path: str) -> str | None:
    """Why a medium at `path` cannot be opened, as far as its directory entry tells."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return f"{path} does not exist"
    except (OSError, ValueError) as error:
        return f"{path[:200]} cannot be opened ({getattr(error, 'strerror', None) or error})"
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is {'a directory' if stat.S_ISDIR(status.st_mode) else 'not a regular file'}"
    return None if status.st_size else f"{path} is empty (0 bytes)"


def rename(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The fields under our names: `columns` maps those of the file. A name that a column takes over is dropped."""
    if not columns:
        return dict(fields)
    ours = set(columns.values())
    renamed = {name: value for name, value in fields.items() if name not in columns and name not in ours}
    named = {name: fields[theirs] for theirs, name in columns.items() if theirs in fields and name != "ignore"}
    return renamed | named
