"""Unpacks the archives that benchmarks are published in, where the user says so: ZIP, tar, compressed tar, and tar cut
into parts (`videos.tar.part.aa`). Only media, subtitles and tables are taken, under names inside the folder; links,
devices and names that lead out of it are left. What is there in full already is not unpacked again, so that an
interrupted run goes on; a file of the same name and another size stays as it is.
"""

from __future__ import annotations

import io
import re
import shutil
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

from keye.errors import KeyeError
from keye.evals.data.files import ARCHIVES, PICTURES, VIDEOS, DataFolder
from keye.files import output_file
from keye.units import GIB, MIB, format_bytes

#: Endings of the files that are unpacked.
ENDINGS: Final = frozenset({*VIDEOS, *PICTURES, ".srt", ".vtt", ".json", ".jsonl", ".tsv", ".csv", ".txt", ".parquet"})
#: Members of an archive, and how much larger than it they may be together: media hardly compress.
MAX_MEMBERS: Final = 1_000_000
MAX_RATIO: Final = 50
#: Bytes that stay free on the disk.
_RESERVE: Final = GIB
_PIECE: Final = 4 * MIB
_PART: Final = re.compile(r"(.+\.(?:tar|tar\.gz|tgz))\.?(?:part)?[._-]?([a-z]{2}|\d{1,4})", re.IGNORECASE)

Progress = Callable[[str, int], None]
"""(name of the archive, bytes unpacked so far)."""


@dataclass(frozen=True)
class Unpacked:
    """What was done: files unpacked, those there already, members that were left, and the bytes unpacked."""

    unpacked: int = 0
    present: int = 0
    left: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    open: Callable[[], IO[bytes] | None] | None


def unpack_archives(folder: Path, progress: Progress | None = None) -> Unpacked:
    """Unpacks all archives in a folder, each into the folder that it lies in. `KeyeError` names an archive that is
    damaged, or that unpacks to far more than it could hold or than the disk has room for; what was unpacked stays."""
    total = Unpacked()
    for name, files in _group(DataFolder(folder, writes=False)).items():
        total = _unpack(name, files, total, progress)
    return total


def _group(data: DataFolder) -> dict[Path, list[Path]]:
    """Archives, each with its files: itself, or its parts in order."""
    groups: dict[Path, list[Path]] = defaultdict(list)
    for path in data.files:
        if path.name.lower().endswith(ARCHIVES):
            groups[path].append(path)
        elif match := _PART.fullmatch(path.name):
            groups[path.with_name(match[1])].append(path)
    return groups


def _unpack(name: Path, files: Sequence[Path], total: Unpacked, progress: Progress | None) -> Unpacked:
    packed = sum(path.stat().st_size for path in files)
    unpacked, present, left, size = total.unpacked, total.present, total.left, 0
    try:
        for count, member in enumerate(_members(name, files)):
            if count >= MAX_MEMBERS:
                raise KeyeError(f"{name} has more than {MAX_MEMBERS:,} members; unpack it by hand")
            target = _target(name.parent, member.name)
            if target is not None and target.is_file() and target.stat().st_size == member.size:
                present += 1
                continue
            is_free = target is not None and not target.exists()
            source = member.open() if is_free and member.open is not None else None
            if target is None or source is None:
                left += 1
                continue
            size += _write(source, target, member, limit=MAX_RATIO * packed + MIB - size, name=name)
            unpacked += 1
            if progress is not None:
                progress(name.name, total.bytes + size)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise KeyeError(f"{name} is damaged or of a kind that is not read ({error}); download it again") from None
    return Unpacked(unpacked, present, left, total.bytes + size)


def _members(name: Path, files: Sequence[Path]) -> Iterator[_Member]:
    if name.suffix.lower() == ".zip":
        with zipfile.ZipFile(name) as archive:
            for info in archive.infolist():
                is_file = not info.is_dir() and (info.external_attr >> 28) in (0, 8)  # no link, no device
                yield _Member(info.filename, info.file_size, partial(archive.open, info) if is_file else None)
        return
    with _Joined(files) as raw, tarfile.open(fileobj=io.BufferedReader(raw, _PIECE), mode="r|*") as stream:
        for entry in stream:
            yield _Member(entry.name, entry.size, partial(stream.extractfile, entry) if entry.isreg() else None)


class _Joined(io.RawIOBase):
    """Files read as one, from front to back."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._left = list(paths)
        self._file: IO[bytes] = io.BytesIO()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not (count := self._file.readinto(buffer)) and self._left:  # type: ignore[attr-defined]  # files have it
            self._file.close()
            self._file = self._left.pop(0).open("rb")
        return int(count or 0)

    def close(self) -> None:
        self._file.close()
        super().close()


def _target(folder: Path, name: str) -> Path | None:
    """Where a member belongs; None for one that is not taken."""
    path = PurePosixPath(name.replace("\\", "/"))
    parts = [part for part in path.parts if part != "."]
    is_inside = parts and not path.is_absolute() and ".." not in parts and ":" not in parts[0]
    if not is_inside or path.suffix.lower() not in ENDINGS or any(part.startswith((".", "__MACOSX")) for part in parts):
        return None
    target = folder.joinpath(*parts)
    # A link among the folders could lead out, as could a file that is a link.
    return target if target.resolve().is_relative_to(folder.resolve()) else None


def _write(source: IO[bytes], target: Path, member: _Member, *, limit: int, name: Path) -> int:
    """Writes a member, counting what comes out rather than what is promised."""
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free - _RESERVE
    if member.size > free:
        raise KeyeError(
            f"{name} needs {format_bytes(member.size)} more on a disk that has {format_bytes(max(0, free))} left"
        )
    unpacked = 0
    with source, output_file(target) as draft, draft.open("wb") as file:
        while piece := source.read(_PIECE):
            unpacked += len(piece)
            if unpacked > min(limit, max(member.size, 0)):
                raise KeyeError(
                    f"{name} unpacks to more than it can hold; it is damaged or a trap and was not unpacked on"
                )
            file.write(piece)
    return unpacked
