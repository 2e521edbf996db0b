"""The output of a batch, from which a killed batch resumes: a file of JSON lines to which complete records are
appended, one for each item. Knows ids and digests, not what an answer is.

A record has its id under `custom_id` or `id`, the digest of the line that it answers under `line_digest`, and an
`error` that is null or missing where all went well.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from keye.errors import KeyeError
from keye.files import complete_file

#: How records begin.
_BEGIN: Final = b'{"line_digest":"'
#: Longest record, in bytes.
_MOST_BYTES: Final = 1 << 28


@dataclass(frozen=True)
class Done:
    """What a record says of its item."""

    digest: str
    ok: bool


class Journal:
    """The output file, opened by one process at a time and until `close`. `done` are the items that it has, by id.

    An incomplete last line, which a kill leaves, is cut off, and a new file to which nothing was written is removed.
    `KeyeError` for a file that another batch writes to, that cannot be written, or that holds anything but records:
    such a file is never changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._was_there = os.path.lexists(path)
        self._fd = _open_locked(path)
        try:
            self.done = self._recover()
        except BaseException:
            os.close(self._fd)
            raise
        self._unsynced = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one record, completely or not at all."""
        # The digest comes first, so that the beginning of a record is known as one.
        ordered = {"line_digest": record["line_digest"], **record}
        line = json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"
        name, done = _read(line)
        assert name not in self.done, f"{name} has a record already"
        begin = os.lseek(self._fd, 0, os.SEEK_END)
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            os.ftruncate(self._fd, begin)
            raise _unwritable(self.path, error) from None
        self.done[name] = done
        self._unsynced = True

    def sync(self) -> None:
        """Waits until what was appended is on the disk."""
        if self._unsynced:
            self._unsynced = False
            os.fsync(self._fd)

    def forget(self, ids: Collection[str]) -> None:
        """Takes the records of these items out, in one step: a kill leaves the file as it was, or without them."""
        if not ids:
            return
        os.lseek(self._fd, 0, os.SEEK_SET)
        with complete_file(self.path) as draft:
            fd = _open_locked(draft)
            try:
                with os.fdopen(os.dup(self._fd), "rb") as old, os.fdopen(os.dup(fd), "wb") as new:
                    new.writelines(line for line in old if _read(line)[0] not in ids)
                os.fsync(fd)
            except OSError as error:
                os.close(fd)
                raise _unwritable(self.path, error) from None
        os.close(self._fd)  # a process that waits for the old file sees that it no longer has this name
        self._fd = fd
        self.done = {name: done for name, done in self.done.items() if name not in ids}

    def close(self) -> None:
        """Writes to the disk what is not there yet, and lets others in."""
        if self._fd >= 0:
            self.sync()
            if not os.fstat(self._fd).st_size and not self._was_there:
                self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    def _recover(self) -> dict[str, Done]:
        done: dict[str, Done] = {}
        size = 0
        with os.fdopen(os.dup(self._fd), "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_MOST_BYTES), b""), 1):
                try:
                    name, record = _read(line)
                except ValueError:
                    if not line.endswith(b"\n") and _is_torn_record(line, bool(done)):
                        break
                    raise KeyeError(
                        f"line {number} of {self.path} is not a record of keye batch: choose another file with -o"
                    ) from None
                if name in done:
                    raise KeyeError(f"{self.path} has two records of {name[:100]!r}: choose another file with -o")
                done[name] = record
                size += len(line)
        if size < os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, size)
        elif size and os.pread(self._fd, 1, size - 1) != b"\n":
            os.write(self._fd, b"\n")
        return done


def _is_torn_record(line: bytes, others: bool) -> bool:
    """Whether a line without its end is the beginning of a record and of nothing else, beside `others` in the file."""
    # Less than a record's beginning, and what records of earlier versions began with, many a file has.
    begins = line.startswith(_BEGIN) or (others and (_BEGIN.startswith(line) or line.startswith(b'{"id":"')))
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return begins
    return False  # a complete value, which keye did not write


def check_same(items: Iterable[tuple[str, str]], done: Mapping[str, Done], path: Path) -> list[str]:
    """Ids of those (id, digest) that failed and ask something else now, which are to be asked again. `KeyeError` where
    one that was answered asks something else: its answer would belong to another question."""
    changed = [(name, done[name].ok) for name, digest in items if name in done and done[name].digest != digest]
    settled = [name for name, ok in changed if ok]
    if settled:
        others = f" and {len(settled) - 1} others" if len(settled) > 1 else ""
        raise KeyeError(
            f"{path} answers {settled[0][:100]!r}{others} as the manifest or the options were before: "
            "restore them, or choose another file with -o"
        )
    return [name for name, _ in changed]


def _read(line: bytes) -> tuple[str, Done]:
    """Id and state of a record; `ValueError` for anything else."""
    try:
        record = json.loads(line)
    except RecursionError:
        raise ValueError("too deep") from None
    if not isinstance(record, dict):
        raise ValueError("no object")
    name, digest = record.get("custom_id", record.get("id")), record.get("line_digest")
    if not isinstance(name, str) or not isinstance(digest, str):
        raise ValueError("no record")
    return name, Done(digest, record.get("error") is None)


def _open_locked(path: Path) -> int:
    """The file of this name, created if necessary and locked."""
    while True:
        if path.exists() and not path.is_file():  # a pipe, for one, would never come to an end
            raise KeyeError(f"{path} is not a file: choose another with -o")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _unwritable(path, error) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise KeyeError(
                f"another keye batch writes to {path}: wait for it, or choose another file with -o"
            ) from None
        except FileNotFoundError:
            pass
        os.close(fd)  # another took its place between opening and locking


def _unwritable(path: Path, error: OSError) -> KeyeError:
    if error.errno == errno.ENOSPC:
        return KeyeError(f"no room is left to write {path}: free some and run the same command again, which goes on")
    return KeyeError(f"{path} cannot be written ({error.strerror}): choose another file with -o")
