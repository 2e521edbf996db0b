"""The library that a server has (`keye serve --library`): its videos by id, a thread that indexes them, and what
changes. It belongs to the operator and is there for all keys; folders are managed by those who may. Knows no HTTP."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from keye.errors import KeyeError
from keye.library.catalog import Catalog, Entry
from keye.library.find import LibraryResult, LibrarySearch
from keye.library.indexing import index_library
from keye.media.source.fetch import Source, fetch_source
from keye.moments import FindProgress, MomentsFound
from keye.server.edge.errors import ApiError

if TYPE_CHECKING:
    from keye.api import Keye

log: Final = logging.getLogger("keye.server")
#: How ids of videos in the library begin.
LIBRARY: Final = "library-"
#: Seconds between two looks at folders, and after work that could not go on.
_SCAN_SECONDS: Final = 5.0
_RETRY_SECONDS: Final = 30.0


class _Closing(Exception):
    """Ends the work of the thread."""


@dataclass(frozen=True)
class Indexing:
    """The video that is being indexed, how far it is, and how many wait."""

    id: str
    progress: FindProgress
    waiting: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"id": self.id, **asdict(self.progress), "waiting": self.waiting}


class ServedLibrary:
    """The library in a folder. With `may_manage` all who reach the server may add and remove folders. Safe to share by
    threads; `start` and `close` once."""

    def __init__(self, model: Keye, folder: Path, *, may_manage: bool) -> None:
        self.model, self.catalog, self.may_manage = model, Catalog(folder), may_manage
        #: What keeps the work from going on, and what of the folders cannot be read.
        self.problems: Sequence[str] = ()
        self.indexing: Indexing | None = None
        self._closing, self._wake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="keye-library", daemon=True)

    def start(self) -> None:
        """Begins to look for videos and to index them."""
        self._thread.start()

    def close(self) -> None:
        """Ends the work; what is indexed stays."""
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self.catalog.close()

    @property
    def is_closing(self) -> bool:
        """Whether the server is ending."""
        return self._closing.is_set()

    def wake(self) -> None:
        """Has the thread look at the folders now."""
        self._wake.set()

    def _work(self) -> None:
        while not self.is_closing:
            seconds = _SCAN_SECONDS
            try:
                problems = self.catalog.scan().problems
                self._index()
                self.problems = problems
            except _Closing:
                return
            except KeyeError as error:
                self.problems, seconds = (str(error),), _RETRY_SECONDS
            except Exception as error:  # the thread lives as long as the server
                log.exception("the library could not be indexed")
                self.problems, seconds = (f"unexpected {type(error).__name__}",), _RETRY_SECONDS
            finally:
                self.indexing = None
            self._wake.wait(seconds)
            self._wake.clear()

    def _index(self) -> None:
        if not self.catalog.entries("discovered", "indexing"):
            return
        with closing(index_library(self.model, self.catalog, check=self._check)) as events:
            for event in events:
                self._check()
                if event.progress is not None:
                    self.indexing = Indexing(f"{LIBRARY}{event.entry.id}", event.progress, event.waiting)

    def _check(self) -> None:
        if self.is_closing:
            raise _Closing

    def entry(self, video_id: str) -> Entry:
        """A video by its id; `ApiError` 404 for any other. Blocks."""
        number = video_id.removeprefix(LIBRARY)
        entries = self.catalog.entries() if number.isdecimal() else []
        entry = next((entry for entry in entries if str(entry.id) == number), None)
        if entry is None:
            raise ApiError(404, "no video of the library has this id", param="file_id", code="not_found")
        return entry

    def source(self, video_id: str) -> Source:
        """The file of a video. `MediaError` where it is gone. Blocks."""
        return fetch_source(self.entry(video_id).path)

    def find_index(self, path: Path | None) -> Path | None:
        """The index of a video by its path; None for others, and those that are not indexed. Blocks."""
        entries = self.catalog.entries("indexed") if path is not None else []
        return next((self.catalog.index_path(entry) for entry in entries if entry.path == path), None)

    def state(self) -> object:
        """Something that differs whenever `describe` does. Blocks."""
        return self.catalog.last_change(), self.catalog.folders(), self.indexing, self.problems

    def describe(self) -> dict[str, Any]:
        """All of it, as plain data. Blocks."""
        change, entries = self.catalog.last_change(), self.catalog.entries()
        folders = [
            {"name": folder.path.name, "watch": folder.watch, **({"path": str(folder.path)} if self.may_manage else {})}
            for folder in self.catalog.folders()
        ]
        return {
            "object": "keye.library", "folders": folders, "videos": self.describe_entries(entries), "change": change,
            "bytes": self.catalog.used_bytes(), "limit": self.catalog.limit, "may_manage": self.may_manage,
            "indexing": None if self.indexing is None else self.indexing.to_dict(), "problems": list(self.problems),
        }  # fmt: skip

    def describe_entries(self, entries: Sequence[Entry]) -> list[dict[str, Any]]:
        """Videos as plain data, named by their folder; with paths for those who may manage."""
        roots = [folder.path for folder in self.catalog.folders()]
        return [
            {**entry.to_dict(), "id": f"{LIBRARY}{entry.id}", "name": _name(entry.path, roots),
             "path": str(entry.path) if self.may_manage else None}
            for entry in entries
        ]  # fmt: skip

    def search(self, event: str, on_search: Callable[[LibrarySearch], None], **options: Any) -> Iterator[Any]:
        """The events of a search in all videos, progress as it is and others as plain data, in which videos have their
        ids; `on_search` gets what can be stopped. Blocks."""
        search = LibrarySearch(self.model, self.catalog, event, **options)
        on_search(search)
        entries = self.describe_entries(self.catalog.entries())
        named = {str(entry.path): data for entry, data in zip(self.catalog.entries(), entries, strict=False)}
        for item in search.run():
            if isinstance(item, FindProgress):
                yield item
            elif isinstance(item, MomentsFound):
                yield _with_ids(item.to_dict(), named)
            elif isinstance(item, LibraryResult):
                yield {"type": "result", "result": _with_ids(item.to_dict(), named)}


def _name(path: Path, roots: Sequence[Path]) -> str:
    root = next((root for root in roots if path.is_relative_to(root)), path.parent)
    return path.relative_to(root.parent).as_posix()


def _with_ids(value: Any, named: Mapping[str, Mapping[str, Any]]) -> Any:
    """Plain data in which each `file` is the id of a video, and `name` its name."""
    if isinstance(value, list):
        return [_with_ids(item, named) for item in value]
    if not isinstance(value, dict):
        return value
    data = {key: _with_ids(item, named) for key, item in value.items()}
    if isinstance(file := value.get("file"), str):
        known = named.get(file, {"id": None, "name": Path(file).name})
        data |= {"file": known["id"], "name": known["name"]}
    return data
