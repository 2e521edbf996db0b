"""Writing files so that nobody ever sees half of one, and so that nothing is replaced that keye did not write."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from keye.errors import KeyeError, Option

#: What pictures and videos that keye wrote say of themselves, in the first or last bytes of the file.
MARK: Final = "made by keye"
_MARK_BYTES: Final = 1 << 16
#: A larger file of JSON is not read to find out whose it is.
_MOST_JSON: Final = 64 << 20
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path` that takes its place when the block succeeds and vanishes when it fails. Of a
    link, the file that it names is replaced."""
    target = path.resolve() if path.is_symlink() else path
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield draft
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """`complete_file` for what a user asked for: `KeyeError` with one sentence where it cannot be written."""
    try:
        with complete_file(path) as draft:
            yield draft
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> KeyeError:
    """The sentence for a file that could not be written."""
    if error.errno in _FULL:
        return KeyeError(f"no room is left to write {path}: free some, or name a place on another disk")
    reason = error.strerror if error.errno else "the disk may be full"
    return KeyeError(f"{path} cannot be written ({reason}): name another place")


def check_output(path: Path, is_own: Callable[[Path], bool], *, overwrite: bool = False) -> None:
    """`KeyeError` where a file at `path` could not be written, or would take the place of one that is not `is_own` and
    may not be overwritten. An empty file is nobody's."""
    try:
        if not path.absolute().parent.is_dir() or path.is_dir():
            raise KeyeError(f"{path} cannot be written: name a file in a folder that exists")
        if not path.exists():
            return
        if not path.is_file():
            raise KeyeError(f"{path} is no file that can be replaced: name another")
        if overwrite or not path.stat().st_size or is_own(path):
            return
    except OSError as error:
        raise unwritable(path, error) from None
    raise KeyeError("{} exists and is not an earlier output of this kind: name another file, or give {}", path,
                    Option("overwrite"))  # fmt: skip


def has_mark(path: Path) -> bool:
    """Whether a picture or a video says that keye wrote it."""
    with path.open("rb") as file:
        first = file.read(_MARK_BYTES)
        file.seek(max(0, path.stat().st_size - _MARK_BYTES))
        return MARK.encode() in first or MARK.encode() in file.read(_MARK_BYTES)


def is_json_with(path: Path, names: frozenset[str]) -> bool:
    """Whether a file is a JSON object that has these names."""
    if path.stat().st_size > _MOST_JSON:
        return False
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and names <= value.keys()
