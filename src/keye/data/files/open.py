"""Which kind of file of rows it is, judged by the content; and files of rows joined to one."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Final

import numpy as np

from keye.data.files.lines import JsonLines
from keye.data.files.raw import open_raw
from keye.data.files.rows import Offsets, Row, RowFile
from keye.data.samples import Place
from keye.errors import KeyeError

#: Ends of names of files of rows, of which a folder may have others beside them.
_SUFFIXES: Final = (".jsonl", ".json")
MAX_FILES: Final = 100_000


def list_files(path: Path) -> list[Path]:
    """The files of rows that a path names: itself, or those in a folder in the order of their names."""
    if not path.is_dir():
        return [path]
    files = sorted(
        file for file in path.rglob("*") if file.name.removesuffix(".gz").endswith(_SUFFIXES) and file.is_file()
    )
    if not files:
        raise KeyeError(f"{path} has no file of rows ({', '.join(_SUFFIXES)}); give a file, or a folder of such files")
    if len(files) > MAX_FILES:
        raise KeyeError(f"{path} has {len(files):,} files of rows, more than {MAX_FILES:,}; join them")
    return files


def open_rows(path: Path) -> RowFile:
    """The rows of a file or of all files in a folder."""
    files = [open_file(file) for file in list_files(path)]
    return files[0] if len(files) == 1 else Shards(path, files)


def open_file(path: Path) -> RowFile:
    """The rows of one file. `KeyeError` for one that is of no known kind."""
    return JsonLines(open_raw(path))


class Shards:
    """Files of rows, one after the other."""

    def __init__(self, path: Path, files: Sequence[RowFile]) -> None:
        self.path, self.files = path, files
        self._starts = list(accumulate((len(file) for file in files), initial=0))
        self.kind = files[0].kind
        described = "\n".join(f"{file.path.name} {len(file)} {file.digest}" for file in files)
        self.digest = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
        self.window = min(file.window for file in files)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def blocks(self) -> Offsets | None:
        """Those of all files; a file without any is one block."""
        parts = [file.blocks for file in self.files]
        if all(part is None for part in parts):
            return None
        listed = [np.zeros(1, np.int64) if part is None else part for part in parts]
        joined = [part + start for part, start in zip(listed, self._starts, strict=False)]
        return np.unique(np.concatenate(joined))

    def place(self, index: int) -> Place:
        file, row = self._find(index)
        return file.place(row)

    def read(self, index: int) -> Row:
        file, row = self._find(index)
        return file.read(row)

    def _find(self, index: int) -> tuple[RowFile, int]:
        number = bisect_right(self._starts, index) - 1
        return self.files[number], index - self._starts[number]
