"""The library that a server has (`keye serve --library`): its videos by id, a thread that indexes them, and what
changes. It belongs to the operator and is there for all keys; folders are managed by those who may. Knows no HTTP."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
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
from keye.sessions.search.search_index import open_search_index

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
        path = self.entry(video_id).path
        with self.hiding_paths():
            return fetch_source(path)

    def find_index(self, path: Path | None, media_options: Mapping[str, Any], *, scenes: bool) -> Path | None:
        """The index of a video by its path, if it was made under these options of media, and with scenes where they
        are wanted; None for others, and those that are not indexed. Blocks."""
        entries = self.catalog.entries("indexed") if path is not None else []
        entry = next((entry for entry in entries if entry.path == path), None)
        if entry is None:
            return None
        try:
            index = open_search_index(self.model.runtime, self.catalog.index_path(entry))
        except KeyeError:  # made by another model, or gone: a search makes its own
            return None
        fits = index.suits(media_options) and (not scenes or index.scenes_end > 0)
        index.release()
        return self.catalog.index_path(entry) if fits else None

    def names_for_paths(self) -> Callable[[str], str]:
        """What puts names in place of the library's paths in a text; leaves it as it is for those who may manage.
        Blocks."""
        if self.may_manage:
            return lambda text: text
        names = {str(folder.path): folder.path.name or "/" for folder in self.catalog.folders()}
        names |= {str(self.catalog.index_path(entry)): f"{LIBRARY}{entry.id}" for entry in self.catalog.entries()}
        for path in (self.catalog.indexes, self.catalog.folder):
            names |= {str(form): "the library" for form in (path, path.resolve()) if form.is_absolute()}
        pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
        return lambda text: pattern.sub(lambda match: names[match[0]], text)

    @contextmanager
    def hiding_paths(self) -> Iterator[None]:
        """Puts names in place of the library's paths in errors that are raised within. Blocks."""
        rename = self.names_for_paths()
        try:
            yield
        except KeyeError as error:
            error.args = tuple(rename(str(part)) if isinstance(part, str | Path) else part for part in error.args)
            raise

    def state(self) -> object:
        """Something that differs whenever `describe` does. Blocks."""
        return self.catalog.last_change(), self.catalog.folders(), self.indexing, self.problems

    def describe(self) -> dict[str, Any]:
        """All of it, as plain data. Blocks."""
        change, entries = self.catalog.last_change(), self.catalog.entries()
        rename = self.names_for_paths()
        folders = [
            {"name": folder.path.name, "watch": folder.watch, **({"path": str(folder.path)} if self.may_manage else {})}
            for folder in self.catalog.folders()
        ]
        return {
            "object": "keye.library", "folders": folders, "videos": self.describe_entries(entries), "change": change,
            "bytes": self.catalog.used_bytes(), "limit": self.catalog.limit, "may_manage": self.may_manage,
            "indexing": None if self.indexing is None else self.indexing.to_dict(),
            "problems": [rename(problem) for problem in self.problems],
        }  # fmt: skip

    def describe_entries(self, entries: Sequence[Entry]) -> list[dict[str, Any]]:
        """Videos as plain data, named by their folder; with paths for those who may manage."""
        roots, rename = [folder.path for folder in self.catalog.folders()], self.names_for_paths()
        return [
            {**entry.to_dict(), "reason": entry.reason and rename(entry.reason), "id": f"{LIBRARY}{entry.id}",
             "name": _name(entry.path, roots), "path": str(entry.path) if self.may_manage else None}
            for entry in entries
        ]  # fmt: skip

    def search(self, event: str, on_search: Callable[[LibrarySearch], None], **options: Any) -> Iterator[Any]:
        """The events of a search in all videos, progress as it is and others as plain data, in which videos have their
        ids; `on_search` gets what can be stopped. Blocks."""
        search = LibrarySearch(self.model, self.catalog, event, **options)
        on_search(search)
        entries, rename = self.catalog.entries(), self.names_for_paths()
        described = self.describe_entries(entries)
        named = {str(entry.path): data for entry, data in zip(entries, described, strict=True)}
        with self.hiding_paths():
            for item in search.run():
                if isinstance(item, FindProgress):
                    yield item
                elif isinstance(item, MomentsFound):
                    yield _with_ids(item.to_dict(), named, rename)
                elif isinstance(item, LibraryResult):
                    result = {**_with_ids(item.to_dict(), named, rename), "query": item.query}
                    yield {"type": "result", "result": result}


def _name(path: Path, roots: Sequence[Path]) -> str:
    root = next((root for root in roots if path.is_relative_to(root)), path.parent)
    return path.relative_to(root.parent).as_posix()


def _with_ids(value: Any, named: Mapping[str, Mapping[str, Any]], rename: Callable[[str], str]) -> Any:
    """Plain data in which each `file` is the id of a video, and `name` its name; other texts are renamed."""
    if isinstance(value, str):
        return rename(value)
    if isinstance(value, list):
        return [_with_ids(item, named, rename) for item in value]
    if not isinstance(value, dict):
        return value
    data = {key: _with_ids(item, named, rename) for key, item in value.items()}
    if isinstance(file := value.get("file"), str):
        known = named.get(file, {"id": None, "name": Path(file).name})
        data |= {"file": known["id"], "name": known["name"]}
    return data
