"""Which kind of file of rows it is, judged by the content; and files of rows joined to one."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Final

import numpy as np

from keye.data.files.lines import CsvFile, JsonLines, TextLines
from keye.data.files.lists import JsonList, open_object
from keye.data.files.parquet import MAGIC, ParquetRows
from keye.data.files.raw import MAX_ROW, Raw, open_raw
from keye.data.files.rows import Offsets, Row, RowFile
from keye.data.files.tar import TarRows, is_tar
from keye.data.samples import Place
from keye.errors import KeyeError

#: Ends of names of files of rows. A folder is read for the first of these kinds that it has.
_KINDS: Final = ((".parquet",), (".tar",), (".jsonl", ".ndjson"), (".json",), (".csv", ".tsv"), (".txt",))
#: Files that say something of a set and hold no rows of it.
_ASIDE: Final = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"})
_TRAIN: Final = re.compile(r"(?:^|[-_./])train(?:ing)?(?:[-_./]|$)", re.IGNORECASE)
_HELD_OUT: Final = re.compile(r"(?:^|[-_./])(?:test|val|valid|validation|dev|eval)(?:[-_./]|$)", re.IGNORECASE)
#: A set of a hub: its owner and its name.
_HUB: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w-]*")
MAX_FILES: Final = 100_000
_HEAD: Final = 1 << 16
_ARCHIVES: Final = (
    (b"PK\3\4", "a ZIP archive"), (b"ARROW1", "an Arrow file"), (b"7z\xbc\xaf", "a 7z archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"), (b"BZh", "a bzip2 file"), (b"\xfd7zXZ", "an xz file"),
)  # fmt: skip
#: Names of columns of which a table of ours has at least one.
_COLUMNS: Final = frozenset(
    """
    text caption image images video videos query response question answer instruction output prompt chosen rejected
    start end messages conversations image_path video_path file_name""".split()
)


def list_files(path: Path) -> list[Path]:
    """The files of rows that a path names: itself, or those in a folder in the order of their names. Where a folder has
    files of its training part and of others, only the first are taken."""
    if not path.exists() and _HUB.fullmatch(str(path)):
        raise KeyeError(f"{path} does not exist; a set of a hub is downloaded first (hf download --repo-type dataset "
                        f"{path} --local-dir FOLDER) and named by its folder")  # fmt: skip
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_aside(file, path))
    for kind in _KINDS:
        named = [file for file in files if file.name.lower().removesuffix(".gz").endswith(kind)]
        train = [file for file in named if _TRAIN.search(str(file.relative_to(path)))]
        if train and any(_HELD_OUT.search(str(file.relative_to(path))) for file in named):
            named = train
        if len(named) > MAX_FILES:
            raise KeyeError(f"{path} has {len(named):,} files of rows, more than {MAX_FILES:,}; join them")
        if named:
            return named
    endings = ", ".join(ending for kind in _KINDS for ending in kind)
    raise KeyeError(f"{path} has no file of rows ({endings}); give a file, or a folder of such files")


def _is_aside(file: Path, folder: Path) -> bool:
    return file.name in _ASIDE or any(part.startswith(".") for part in file.relative_to(folder).parts)


def open_rows(path: Path) -> RowFile:
    """The rows of a file or of all files in a folder."""
    files = [open_file(file) for file in list_files(path)]
    return files[0] if len(files) == 1 else Shards(path, files)


def open_file(path: Path) -> RowFile:
    """The rows of one file. `KeyeError` for one that is of no known kind."""
    raw = open_raw(path)
    head = raw.head(_HEAD)
    if head.startswith(MAGIC):
        return ParquetRows(path)
    if is_tar(head):
        return TarRows(raw)
    if path.suffix.lower() in (".parquet", ".tar"):
        raise KeyeError(f"{path} is not a {path.suffix[1:].lower()} file, judged by its first bytes; download it again")
    for magic, name in _ARCHIVES:
        if head.startswith(magic):
            raise KeyeError(f"{path} is {name}; give JSON lines, JSON, CSV, text, parquet or tar")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise KeyeError(f"{path} is in UTF-16; save it as UTF-8")
    if b"\0" in head:
        raise KeyeError(f"{path} is not a file of rows; give JSON lines, JSON, CSV, text, parquet or tar")
    return _open_text(raw, head.removeprefix(codecs.BOM_UTF8))


def _open_text(raw: Raw, head: bytes) -> RowFile:
    name = raw.path.name.lower().removesuffix(".gz")
    text = head.lstrip()
    is_json = name.endswith((".json", ".jsonl", ".ndjson"))
    if text.startswith(b"[") and (is_json or text[1:].lstrip()[:1] in (b"{", b"]")):
        return JsonList(raw)
    if text.startswith(b"{"):
        return JsonLines(raw) if name.endswith((".jsonl", ".ndjson")) or _is_lines(raw, text) else open_object(raw)
    if is_json and text:
        return JsonLines(raw) if name.endswith(("l", ".ndjson")) else _reject_json(raw, text)
    if name.endswith((".csv", ".tsv")) or _is_table(text):
        return CsvFile(raw)
    return TextLines(raw)


def _reject_json(raw: Raw, text: bytes) -> RowFile:
    raise KeyeError(f"{raw.path} begins with {text[:20]!r} and not with a list or an object; give valid JSON")


def _is_lines(raw: Raw, head: bytes) -> bool:
    """Whether a text that begins with an object has one on each line: its first line is an object and more follow, or
    several lines begin one."""
    lines = [line for line in head.splitlines()[:20] if line.strip()]
    if sum(line.startswith(b"{") for line in lines) > 1:
        return True
    if b"\n" not in head:
        head = raw.head(MAX_ROW)
    first, _, rest = head.lstrip().partition(b"\n")
    if not rest.strip():
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _is_table(head: bytes) -> bool:
    """Whether the first line names columns that we know, and nothing but columns."""
    first = head.partition(b"\n")[0].decode(errors="replace").strip()
    separator = max(",\t;", key=first.count)
    names = [name.strip(' "').lower() for name in first.split(separator)]
    return len(names) > 1 and all(name.isidentifier() for name in names) and bool(_COLUMNS.intersection(names))


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
        """Those of all files; a file without any is one block, where others have them."""
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
