"""The list of a library: folders, the videos in them, and how far each is indexed, in one SQLite file.

Every change is a transaction, so a killed process loses nothing: a video that it was indexing is taken up again where
its index ends. Knows files and states, no model.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from keye.errors import KeyeError
from keye.library.scan import list_videos
from keye.units import format_bytes

State = Literal["discovered", "indexing", "indexed", "failed"]
STATES: Final[tuple[State, ...]] = get_args(State)
#: Disk that all indexes may take, unless a user sets another bound.
DEFAULT_LIMIT: Final = 50 << 30
#: A file that changed less than so many seconds ago may still be being written.
SETTLED: Final = 2.0
_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE folders (id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, watch INTEGER NOT NULL);
CREATE TABLE videos (
    id INTEGER PRIMARY KEY AUTOINCREMENT, folder INTEGER NOT NULL REFERENCES folders (id) ON DELETE CASCADE,
    path TEXT NOT NULL UNIQUE, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, state TEXT NOT NULL, reason TEXT,
    duration REAL, searchable REAL NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0, change INTEGER NOT NULL
);
CREATE INDEX videos_by_state ON videos (state, id);
CREATE INDEX videos_by_change ON videos (change);
"""


@dataclass(frozen=True)
class Folder:
    """A folder of the library; with `watch`, new files in it are indexed as they appear."""

    path: Path
    watch: bool


@dataclass(frozen=True)
class Entry:
    """A video of the library. `duration` seconds if known, `searchable` seconds from the start that the index covers,
    `bytes` of the index, `reason` why it failed or waits; `change` grows with every change of any entry."""

    id: int
    path: Path
    size: int
    mtime_ns: int
    state: State
    reason: str | None
    duration: float | None
    searchable: float
    bytes: int
    change: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class ScanReport:
    """What a look at the folders found: numbers of new, changed and vanished videos, and what could not be read."""

    added: int
    changed: int
    removed: int
    problems: tuple[str, ...]


class Catalog:
    """The catalogue in `folder`, which is made where it is missing. Threads and processes may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.indexes = folder / "indexes"
        try:
            self.indexes.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(folder / "library.db", timeout=30, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise KeyeError(f"the library in {folder} cannot be opened ({error}): name another folder") from None
        self._lock = threading.RLock()
        self._database.row_factory = sqlite3.Row
        self._prepare()

    def _prepare(self) -> None:
        try:
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA foreign_keys = ON")
            with self._change() as database:
                version = database.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    for statement in _SCHEMA.split(";"):
                        database.execute(statement)
                    database.execute(f"PRAGMA user_version = {_VERSION}")
                elif version != _VERSION:
                    raise KeyeError(f"the library in {self.folder} was written by another version of keye: "
                                    "name another folder")  # fmt: skip
        except sqlite3.OperationalError as error:
            raise self._unusable(error) from None
        except sqlite3.DatabaseError as error:
            raise KeyeError(f"{self.folder / 'library.db'} is damaged ({error}): move it away and add the folders "
                            "again; indexes are found again by their videos") from None  # fmt: skip

    def close(self) -> None:
        """Closes the database."""
        with self._lock:
            self._database.close()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """A transaction that writes; one at a time among threads and processes."""
        with self._lock:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                yield self._database
                self._database.execute("COMMIT")
            except sqlite3.OperationalError as error:
                raise self._unusable(error) from None
            finally:
                if self._database.in_transaction:
                    with suppress(sqlite3.Error):
                        self._database.execute("ROLLBACK")

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        try:
            with self._lock, closing(self._database.execute(query, values)) as cursor:
                return cursor.fetchall()
        except sqlite3.OperationalError as error:
            raise self._unusable(error) from None

    def _unusable(self, error: sqlite3.OperationalError) -> KeyeError:
        return KeyeError(f"the library in {self.folder} cannot be used now ({error}): see that its disk has room and "
                         "can be written to, and that no other program holds it")  # fmt: skip

    # Folders

    def add_folder(self, path: Path, *, watch: bool = False) -> ScanReport:
        """Adds a folder, or sets `watch` of one that is here, and looks for videos in it. `KeyeError` for a path that
        is not a readable folder, or lies in one that is here already, or the other way round."""
        folder = _resolve(path)
        if not folder.is_dir():
            raise KeyeError(f"{path} is not a folder: name a folder with videos")
        for other in self.folders():
            if other.path != folder and (folder.is_relative_to(other.path) or other.path.is_relative_to(folder)):
                raise KeyeError(f"{path} overlaps with {other.path} in the library: remove that first")
        with self._change() as database:
            database.execute(
                "INSERT INTO folders (path, watch) VALUES (?, ?) ON CONFLICT (path) DO UPDATE SET watch = ?",
                (str(folder), watch, watch),
            )
        return self.scan(folder)

    def remove_folder(self, path: Path) -> int:
        """Forgets a folder and its videos, deletes their indexes and returns the bytes that were freed; the videos stay
        where they are. `KeyeError` where the folder is not in the library."""
        names = {str(_resolve(path)), str(path)}
        known = [other for other in self.folders() if str(other.path) in names]
        if not known:
            raise KeyeError(f"{path} is not in the library: keye library list names its folders")
        rows = self._rows("SELECT videos.id FROM videos JOIN folders ON folders.id = folder WHERE folders.path = ?",
                          (str(known[0].path),))  # fmt: skip
        with self._change() as database:
            database.execute("DELETE FROM folders WHERE path = ?", (str(known[0].path),))
            self._next_change(database)
        return sum(self._delete_index(row["id"]) for row in rows)

    def folders(self) -> list[Folder]:
        """The folders by path."""
        return [
            Folder(Path(row["path"]), bool(row["watch"])) for row in self._rows("SELECT * FROM folders ORDER BY path")
        ]

    def scan(self, folder: Path | None = None, *, now: float | None = None) -> ScanReport:
        """Compares the folders, or one of them, with the catalogue. A video whose size or time of change differs is
        indexed again; one that vanished is forgotten with its index, unless its whole folder is away (a disk that is
        not mounted). Files that changed within `SETTLED` seconds wait for the next scan."""
        now = time.time() if now is None else now
        added = changed = removed = 0
        problems: list[str] = []
        for row in self._rows("SELECT * FROM folders ORDER BY path"):
            root = Path(row["path"])
            if folder is not None and root != folder:
                continue
            if not root.is_dir():
                problems.append(f"{root} is not there now; its videos are kept in the library")
                continue
            listing = list_videos(root)
            problems += listing.problems
            known = {r["path"]: r for r in self._rows("SELECT * FROM videos WHERE folder = ?", (row["id"],))}
            stale: list[int] = []  # whose indexes are deleted once the change is stored
            with self._change() as database:
                for path, status in listing.videos.items():
                    if 0 <= now - status.st_mtime < SETTLED:
                        known.pop(str(path), None)
                        continue
                    old = known.pop(str(path), None)
                    if old is None:
                        database.execute(
                            "INSERT INTO videos (folder, path, size, mtime_ns, state, change) "
                            "VALUES (?, ?, ?, ?, ?, ?)",
                            (row["id"], str(path), status.st_size, status.st_mtime_ns, "discovered",
                             self._next_change(database)),
                        )  # fmt: skip
                        added += 1
                        continue
                    is_same = (old["size"], old["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
                    if not is_same or (old["state"] == "indexed" and not self._path(old["id"]).exists()):
                        database.execute(
                            "UPDATE videos SET size = ?, mtime_ns = ?, state = 'discovered', reason = NULL, duration = "
                            "NULL, searchable = 0, bytes = 0, change = ? WHERE id = ?",
                            (status.st_size, status.st_mtime_ns, self._next_change(database), old["id"]),
                        )
                        stale.append(old["id"])
                        changed += 1
                for path_text, old in known.items():
                    if not any(Path(path_text).is_relative_to(folder) for folder in listing.unread):
                        database.execute("DELETE FROM videos WHERE id = ?", (old["id"],))
                        self._next_change(database)
                        stale.append(old["id"])
                        removed += 1
            for number in stale:
                self._delete_index(number)
        return ScanReport(added, changed, removed, tuple(problems))

    def count_unsettled(self, *, now: float | None = None) -> int:
        """The number of videos in the folders that changed within `SETTLED` seconds and are not in the list yet."""
        now = time.time() if now is None else now
        known = {str(entry.path) for entry in self.entries()}
        return sum(
            str(path) not in known and 0 <= now - status.st_mtime < SETTLED
            for folder in self.folders() if folder.path.is_dir()
            for path, status in list_videos(folder.path).videos.items()
        )  # fmt: skip

    # Entries

    def entries(self, *states: State, since: int = -1) -> list[Entry]:
        """The videos in any of `states` (all by default) that changed after the change `since`, by path."""
        wanted = states or STATES
        marks = ", ".join("?" * len(wanted))
        rows = self._rows(
            f"SELECT * FROM videos WHERE state IN ({marks}) AND change > ? ORDER BY path", (*wanted, since)
        )
        return [_entry(row) for row in rows]

    def last_change(self) -> int:
        """The number of the last change."""
        rows = self._rows("SELECT value FROM meta WHERE name = 'change'")
        return int(rows[0]["value"]) if rows else 0

    def index_path(self, entry: Entry) -> Path:
        """Where the index of a video lies."""
        return self._path(entry.id)

    def _path(self, number: int) -> Path:
        return self.indexes / f"{number}.keye"

    def used_bytes(self) -> int:
        """Bytes of all indexes and what is stored beside them, as the disk has them."""
        total = 0
        for path in self.indexes.iterdir():
            with suppress(OSError):
                total += path.stat().st_size
        return total

    @property
    def limit(self) -> int:
        """Bytes that the indexes may take together."""
        rows = self._rows("SELECT value FROM meta WHERE name = 'limit'")
        return int(rows[0]["value"]) if rows else DEFAULT_LIMIT

    @limit.setter
    def limit(self, nbytes: int) -> None:
        if nbytes <= 0:
            raise KeyeError(f"the limit is {format_bytes(nbytes)}; it must be positive")
        with self._change() as database:
            database.execute("INSERT OR REPLACE INTO meta (name, value) VALUES ('limit', ?)", (nbytes,))

    def retry_failed(self) -> int:
        """Lets failed videos be tried again; returns their number."""
        with self._change() as database:
            return database.execute(
                "UPDATE videos SET state = 'discovered', reason = NULL, change = ? WHERE state = 'failed'",
                (self._next_change(database),),
            ).rowcount

    # Indexing

    @contextmanager
    def working(self) -> Iterator[bool]:
        """Makes this process the one that indexes; False where another is. Videos that a process which has ended was
        indexing are `discovered` again, and their indexes are continued."""
        handle = os.open(self.folder / "worker.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            with self._change() as database:
                database.execute(
                    "UPDATE videos SET state = 'discovered', change = ? WHERE state = 'indexing'",
                    (self._next_change(database),),
                )
            yield True
        finally:
            os.close(handle)

    def claim(self) -> Entry | None:
        """The next video to index, `indexing` from now on; those that were begun come first."""
        with self._change() as database:
            row = database.execute(
                "SELECT * FROM videos WHERE state = 'discovered' ORDER BY searchable = 0, id LIMIT 1"
            ).fetchone()
            if row is None:
                return None
            change = self._next_change(database)
            database.execute(
                "UPDATE videos SET state = 'indexing', reason = NULL, change = ? WHERE id = ?", (change, row["id"])
            )
        return _entry(self._rows("SELECT * FROM videos WHERE id = ?", (row["id"],))[0])

    def update(self, entry: Entry, state: State, *, reason: str | None = None, searchable: float | None = None,
               duration: float | None = None) -> bool:  # fmt: skip
        """Notes how far a video is; False, and nothing is noted, where it was removed or has changed meanwhile."""
        path, nbytes = self.index_path(entry), 0
        with suppress(OSError):
            nbytes = path.stat().st_size
        with self._change() as database:
            count = database.execute(
                "UPDATE videos SET state = ?, reason = ?, searchable = coalesce(?, searchable), duration = "
                "coalesce(?, duration), bytes = ?, change = ? WHERE id = ? AND size = ? AND mtime_ns = ?",
                (state, reason, searchable, duration, nbytes, self._next_change(database), entry.id, entry.size,
                 entry.mtime_ns),
            ).rowcount  # fmt: skip
        return bool(count)

    def _next_change(self, database: sqlite3.Connection) -> int:
        row = database.execute(
            "INSERT INTO meta (name, value) VALUES ('change', 1) ON CONFLICT (name) DO UPDATE SET value = value + 1 "
            "RETURNING value"
        ).fetchone()
        return int(row[0])

    def _delete_index(self, number: int) -> int:
        """Deletes an index and what lies beside it; returns the bytes."""
        freed = 0
        for path in self.indexes.glob(f"{number}.*"):
            with suppress(OSError):
                nbytes = path.stat().st_size
                path.unlink()
                freed += nbytes
        return freed


def _entry(row: sqlite3.Row) -> Entry:
    return Entry(
        row["id"], Path(row["path"]), row["size"], row["mtime_ns"], row["state"], row["reason"], row["duration"],
        row["searchable"], row["bytes"], row["change"],
    )  # fmt: skip


def _resolve(path: Path) -> Path:
    """The absolute path without links; `KeyeError` for what cannot be a path."""
    try:
        folder = path.expanduser().resolve()
        folder.is_dir()  # fails for names that are too long
        return folder
    except (OSError, RuntimeError, ValueError):
        raise KeyeError(f"{str(path)[:80]!r} cannot be a folder: name a folder with videos") from None
