"""Atomic file writes that replace only what keye wrote, and private temporary folders."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from keye.errors import KeyeError, Option

log: Final = logging.getLogger("keye")
#: Name prefixes of private folders, and the file in each that its process keeps locked.
SERVER_PREFIX: Final = "keye-serve-"
BATCH_PREFIX: Final = "keye-batch-"
LOCK: Final = "lock"
#: What pictures and videos that keye wrote say of themselves, in the first or last bytes of the file.
MARK: Final = "made by keye"
_MARK_BYTES: Final = 1 << 16
#: Larger JSON files are not read to find out who wrote them.
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


class DiskFull(KeyeError):
    """No room was left for a file."""


def unwritable(path: Path, error: OSError) -> KeyeError:
    """The sentence for a file that could not be written."""
    if error.errno in _FULL:
        return DiskFull(f"no room is left to write {path}: free some, or name a place on another disk")
    reason = error.strerror if error.errno else "the disk may be full"
    return KeyeError(f"{path} cannot be written ({reason}): name another place")


def check_output(path: Path, is_own: Callable[[Path], bool], *, overwrite: bool = False) -> None:
    """`KeyeError` where a file at `path` could not be written, or would take the place of one that is not `is_own` and
    may not be overwritten. An empty file may always be replaced."""
    try:
        if not path.absolute().parent.is_dir() or path.is_dir():
            raise KeyeError(f"{path} cannot be written: name a file in a folder that exists")
        if not path.exists():
            return
        if not path.is_file():
            raise KeyeError(f"{path} is not a file that can be replaced: name another")
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


class PrivateFolder:
    """A temporary folder at `path` that only this user may enter, created now and locked while this process lives.
    Creating one removes those of processes that were killed."""

    def __init__(self, prefix: str = SERVER_PREFIX) -> None:
        remove_abandoned_folders()
        self._home = Path(tempfile.mkdtemp(prefix=prefix))
        self._lock: IO[bytes] = (self._home / LOCK).open("xb")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.path = self._home / "files"
        self.path.mkdir(mode=0o700)

    def remove(self) -> None:
        """Removes the folder with all that is in it."""
        shutil.rmtree(self._home, ignore_errors=True)
        self._lock.close()


def remove_abandoned_folders() -> None:
    """Removes the private folders of this user that no process holds locked."""
    try:
        prefixes = (SERVER_PREFIX, BATCH_PREFIX)
        entries = [entry for entry in os.scandir(tempfile.gettempdir()) if entry.name.startswith(prefixes)]
    except OSError:
        return
    for entry in entries:
        try:
            status = entry.stat(follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
                continue
            # A folder without a lock file is about to get one: keep it.
            descriptor = os.open(os.path.join(entry.path, LOCK), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError while its process lives
                shutil.rmtree(entry.path, ignore_errors=True)
            log.warning("removed %s, left by a process that was killed", entry.path)
        except OSError as error:
            log.debug("%s was not removed: %s", entry.path, error)
