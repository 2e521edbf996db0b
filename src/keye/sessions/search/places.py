"""Where search indexes are kept without a named file: a folder of the user's cache, of bounded size.

An index is found again by what it was made of: the video, the model and how windows were planned. The least recently
used ones are removed when the folder grows beyond its bound.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from keye.cache.fingerprint import Fingerprint
from keye.config.environment import cache_folder
from keye.errors import KeyeError, MediaError, Option
from keye.media.content import source_hash
from keye.media.source.fetch import Source, fetch_source

#: Files up to this size are hashed in full; of larger ones size, time of change and three pieces count.
HASHED_BYTES: Final = 1 << 30
_PIECE: Final = 4 << 20
#: What the folder may hold: so much, but not more than this share of what is free on its disk and in it.
MOST_BYTES: Final = 20 << 30
_FREE_SHARE: Final = 0.1
#: A use is noted at most so often, in seconds: writing the time makes what was compared of a file forgotten.
_TOUCH_SECONDS: Final = 24 * 3600
_FOLDER, _SUFFIX = "find", ".keye"
#: Changes when what is in an index does, so that older ones are not found.
_FORMAT: Final = 4


def identify_source(source: Source) -> str:
    """What tells a video file from others: "sha256:" and the hash of its bytes, or, above 1 GiB, "pieces:" and the hash
    of its size, time of change, beginning, middle and end."""
    if source.data is not None or source.size <= HASHED_BYTES:
        return f"sha256:{source_hash(source).hex()}"
    with source.open() as file:
        status = os.fstat(file.fileno())
        digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
        for start in (0, status.st_size // 2, status.st_size - _PIECE):
            file.seek(start)
            digest.update(file.read(_PIECE))
    return f"pieces:{digest.hexdigest()}"


def path_of(source: Source) -> str | None:
    """Where a file will be found again; None for one in memory and for a temporary one."""
    return None if source.path is None or source.keep is not None else str(source.path.absolute())


def find_again(path: object, identity: str) -> Source | None:
    """The file that was at a path, if it is still there and the same."""
    if not isinstance(path, str) or not Path(path).is_file():
        return None
    try:
        source = fetch_source(Path(path))
    except MediaError:
        return None
    return source if identify_source(source) == identity else None


def find_folder() -> Path:
    """The folder of search indexes, made if need be."""
    folder = cache_folder() / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def is_default(path: Path) -> bool:
    """Whether a file lies in that folder."""
    return path.absolute().parent == (cache_folder() / _FOLDER).absolute()


def default_index_path(source: Source, model: Fingerprint, plan: object, folder: Path | None = None) -> Path:
    """Where the index of a video for a model belongs under `plan`, the choices of the user as plain data."""
    key = hashlib.sha256(repr((_FORMAT, identify_source(source), model, plan)).encode()).hexdigest()[:32]
    return (folder or find_folder()) / f"{key}{_SUFFIX}"


def note_use(path: Path) -> None:
    """Notes that an index was used now."""
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > _TOUCH_SECONDS:
            os.utime(path)


def make_room(needed: int, keep: Path | None = None, folder: Path | None = None, most: int | None = None) -> list[Path]:
    """Removes the least recently used indexes until `needed` more bytes are within the bound; returns those removed.
    `keep` stays. Files that others have mapped stay readable for them. `KeyeError` before anything is removed where
    `needed` is beyond the bound by itself."""
    folder = folder or find_folder()
    entries: list[tuple[float, int, Path]] = []
    for path in folder.glob(f"*{_SUFFIX}"):
        with suppress(OSError):
            status = path.stat()
            entries.append((status.st_mtime, status.st_size, path))
    used = sum(size for _, size, _ in entries)
    if most is None:
        most = min(MOST_BYTES, int(_FREE_SHARE * (shutil.disk_usage(folder).free + used)))
    if needed > most:
        sentence = "the index takes about {} MB, more than the {} MB that their folder may hold: name a file with {}"
        raise KeyeError(sentence, f"{needed / 1e6:,.0f}", f"{most / 1e6:,.0f}", Option("index"))
    removed = []
    for _, size, path in sorted(entries, key=lambda entry: entry[0]):
        if used + needed <= most:
            break
        if path != keep:
            with suppress(OSError):
                path.unlink()
                removed.append(path)
                used -= size
    return removed
