"""A folder of a benchmark's public data: its tables, the media that rows name, pictures that lie inside tables, and
lists that are written as text. Nothing in the data is ever evaluated as code; paths that lead out of the folder are not
followed.
"""

from __future__ import annotations

import ast
import base64
import binascii
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Final

from keye.config.environment import cache_folder
from keye.data.files.open import open_file
from keye.data.samples import BadRow, Place
from keye.errors import KeyeError, brief, missing_package
from keye.files import output_file, unwritable
from keye.units import MIB

VIDEOS: Final = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v")
PICTURES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
ARCHIVES: Final = (".zip", ".tar", ".tar.gz", ".tgz")
SCRATCH: Final = "keye-media"
#: Formats of tables, the first that is there counts: only parquet keeps types and pictures.
_FORMATS: Final = (".parquet", ".jsonl", ".json", ".tsv", ".csv")
#: Files of a folder that are looked through for media.
MAX_FILES: Final = 1_000_000
#: Largest picture inside a table.
MAX_PICTURE: Final = 64 * MIB
#: Longest list written as text, and how deep lists lie in one another.
_MAX_TEXT, _MAX_DEPTH = 200_000, 16
_MAGIC: Final = (
    (b"\x89PNG", ".png"), (b"\xff\xd8\xff", ".jpg"), (b"GIF8", ".gif"), (b"BM", ".bmp"), (b"RIFF", ".webp"),
)  # fmt: skip


class DataFolder:
    """A folder of data. `scratch` takes the pictures that lie inside tables, one file for each different picture; by
    default a folder in it, or one of the user's cache where it cannot be written. With `writes` off they stay where
    they are and have no path."""

    def __init__(self, root: Path, scratch: Path | None = None, *, writes: bool = True) -> None:
        if not root.is_dir():
            raise KeyeError(f"{root} is not a folder: name the folder that holds the benchmark's data")
        self.root, self.writes = root.absolute(), writes
        own = self.root / SCRATCH if os.access(root, os.W_OK) else cache_folder() / "eval-media"
        self.scratch = (scratch or own).absolute()

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """All files below the folder in the order of their names, hidden ones left out."""
        paths: list[Path] = []
        seen: set[str] = set()
        for folder, names, files in os.walk(self.root, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen or folder == str(self.scratch):
                names.clear()
                continue
            seen.add(real)
            names[:] = sorted(name for name in names if not name.startswith("."))
            paths += [Path(folder, name) for name in sorted(files) if not name.startswith(".")]
            if len(paths) > MAX_FILES:
                raise KeyeError(f"{self.root} has more than {MAX_FILES:,} files; name the folder of one benchmark")
        return tuple(paths)

    @cached_property
    def archives(self) -> tuple[Path, ...]:
        """Archives that lie in the folder."""
        return tuple(path for path in self.files if path.name.lower().endswith(ARCHIVES))

    @cached_property
    def _by_name(self) -> Mapping[str, list[Path]]:
        """Files by name, and media also by their names without ending."""
        names: dict[str, list[Path]] = {}
        for path in self.files:
            names.setdefault(path.name, []).append(path)
            if path.suffix.lower() in (*VIDEOS, *PICTURES):
                names.setdefault(path.stem, []).append(path)
        return names

    def tables(self, patterns: Sequence[str]) -> list[Path]:
        """The files of the first pattern that matches any, of one format: some sets come in several. A pattern is a
        regular expression for the end of the path below the folder."""
        for pattern in patterns:
            regex = re.compile(rf"(?:^|.*/)(?:{pattern})")
            if matching := [path for path in self.files if regex.fullmatch(path.relative_to(self.root).as_posix())]:
                ending = min({path.suffix.lower() for path in matching}, key=_preference)
                return [path for path in matching if path.suffix.lower() == ending]
        return []

    def locate(self, name: str, endings: Sequence[str] = VIDEOS, within: str = "") -> str:
        """The absolute path of a medium that a row names by a path or an id; where it should be, if it is not there.

        A file in the folder `within`, if named, or at that path from the folder; else the file of that name anywhere
        below it, of several the one whose path agrees longest.
        """
        wanted = PurePosixPath(name.replace("\\", "/"))
        parts = [part for part in wanted.parts if part not in ("/", "..", ".")]
        for base in (self.root / within, self.root) if parts else ():
            path = base.joinpath(*parts)
            if path.is_file():
                return str(path)
            for ending in endings:
                other = path.with_name(path.name + ending)
                if other.is_file():
                    return str(other)
        last = parts[-1] if parts else ""
        near = [*self._by_name.get(last, ()), *self._by_name.get(PurePosixPath(last).stem, ())]
        if near := [path for path in near if path.suffix.lower() in endings]:
            return str(max(near, key=lambda path: (_agreement(path.parts, parts), -len(path.parts))))
        path = self.root.joinpath(within, *parts) if parts else self.root / "(no name)"
        return str(path if path.suffix.lower() in endings or not endings else path.with_name(path.name + endings[0]))

    def picture(self, value: object) -> str:
        """The absolute path of a picture: of one named by path, or of one that lies in the row as bytes, base64 text or
        {"bytes": ..., "path": ...}, which is written to the scratch folder once. `KeyeError` for anything else."""
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            if len(value) < 1024 and PurePosixPath(value).suffix.lower() in PICTURES:
                return self.locate(value, PICTURES)
            try:
                value = base64.b64decode(value.partition("base64,")[2] or value, validate=True)
            except (binascii.Error, ValueError):
                raise KeyeError(f"{brief(value)} is neither the name of a picture nor a picture in base64") from None
        if not isinstance(value, bytes) or not value:
            raise KeyeError(f"a picture is {brief(value)}; give its path or its bytes")
        ending = next((ending for magic, ending in _MAGIC if value.startswith(magic)), None)
        if ending is None or len(value) > MAX_PICTURE:
            raise KeyeError(f"a picture of {len(value):,} bytes is not PNG, JPEG, WebP, GIF or BMP of up to 64 MiB")
        if not self.writes:
            return ""
        path = self.scratch / f"{hashlib.sha256(value).hexdigest()[:24]}{ending}"
        if not path.is_file():
            try:
                self.scratch.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise unwritable(self.scratch, error) from None
            with output_file(path) as draft:
                draft.write_bytes(value)
        return str(path)


class NoFolder(DataFolder):
    """Stands in where rows are read without their media, which keep their names."""

    def __init__(self) -> None:
        super().__init__(Path("/"), writes=False)

    def tables(self, patterns: Sequence[str]) -> list[Path]:
        return []

    def locate(self, name: str, endings: Sequence[str] = VIDEOS, within: str = "") -> str:
        return name

    def picture(self, value: object) -> str:
        return ""


def _preference(ending: str) -> int:
    return _FORMATS.index(ending) if ending in _FORMATS else len(_FORMATS)


def _agreement(parts: Sequence[str], wanted: Sequence[str]) -> int:
    """How many parts two paths share before their last."""
    count = 0
    for own, other in zip(reversed(parts[:-1]), reversed(wanted[:-1]), strict=False):
        if own != other:
            break
        count += 1
    return count


def read_rows(paths: Sequence[Path]) -> Iterator[tuple[Place, Mapping[str, Any] | BadRow]]:
    """The rows of tables, one file after the other, each with its place; `BadRow` for one that is broken."""
    for path in paths:
        if path.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise missing_package("pyarrow", f"{path} (parquet)", "eval")
        rows = open_file(path)
        for index in range(len(rows)):
            try:
                yield rows.place(index), rows.read(index).fields
            except BadRow as error:
                yield rows.place(index), error


def parse_list(value: object, what: str) -> list[Any]:
    """A list, also one written as text in JSON or as Python writes it; `KeyeError` names `what` for anything else."""
    if isinstance(value, list | tuple):
        return list(value)
    if hasattr(value, "tolist"):
        return list(value.tolist())
    parsed = parse_literal(value, what)
    if not isinstance(parsed, list | tuple):
        raise KeyeError(f"{what} is {brief(value)}, not a list")
    return list(parsed)


def parse_literal(value: object, what: str) -> Any:
    """The value that a text writes in JSON or as a Python literal, within bounds of length and depth."""
    text = value if isinstance(value, str) else ""
    depth = deepest = 0
    for mark in re.findall(r"[\[\](){}]", text[:_MAX_TEXT]):
        depth += 1 if mark in "[({" else -1
        deepest = max(deepest, depth)
    if not text or len(text) > _MAX_TEXT or deepest > _MAX_DEPTH:
        raise KeyeError(f"{what} is {brief(value)}, not a short list or object written as text")
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise KeyeError(f"{what} is {brief(value)}, which is neither JSON nor a Python literal") from None
