"""Indexes the videos of a library one after another; a killed process goes on where it stopped.

One process of all that share the catalogue indexes at a time. A video that cannot be read becomes `failed` with its
reason and the next one is taken; a full disk or the library's own bound ends the work and leaves the others waiting.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from keye.cache.ledger import OutOfMemory
from keye.cache.mapped import check_disk
from keye.errors import KeyeError
from keye.files import DiskFull
from keye.library.catalog import Catalog, Entry
from keye.library.vectors import VectorWriter
from keye.moments import FindProgress
from keye.units import format_bytes

log: Final = logging.getLogger("keye")

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from keye.api import Keye
    from keye.sessions.search.build import Effort
    from keye.sessions.search.embedders import Embedder


@dataclass(frozen=True)
class IndexingEvent:
    """How far the work is: the video, its progress while it is read (None before and after), and how many others
    wait."""

    entry: Entry
    progress: FindProgress | None
    waiting: int


def index_library(
    model: Keye, catalog: Catalog, *, effort: Effort = "auto", embedder: Embedder | None = None,
    check: Callable[[], None] | None = None,
) -> Generator[IndexingEvent]:  # fmt: skip
    """Indexes what is discovered until nothing is left. Closing the generator, or `check` raising, leaves the current
    video to be continued. `KeyeError` where another process indexes this library, the bound is reached, or the disk is
    full; everything that was indexed stays valid."""
    with catalog.working() as is_mine:
        if not is_mine:
            raise KeyeError(f"another process indexes the library in {catalog.folder}: wait for it, or stop it")
        while True:
            if not catalog.entries("discovered"):
                return
            _check_room(catalog)
            entry = catalog.claim()
            if entry is None:
                return
            yield from _index_video(model, catalog, entry, effort, embedder, check)


class LibraryFull(KeyeError):
    """The bound on the disk that the indexes may take is reached."""


def _check_room(catalog: Catalog) -> None:
    used = catalog.used_bytes()
    if used >= catalog.limit:
        raise LibraryFull(f"the indexes take {format_bytes(used)} of the {format_bytes(catalog.limit)} that the "
                          "library may use: set a higher limit, or remove a folder")  # fmt: skip
    check_disk(catalog.folder, 0)


def _index_video(
    model: Keye, catalog: Catalog, entry: Entry, effort: Effort, embedder: Embedder | None,
    check: Callable[[], None] | None,
) -> Generator[IndexingEvent]:  # fmt: skip
    from keye.engine.media import as_medium
    from keye.sessions.search.build import WindowsReady, build_search_index

    path = catalog.index_path(entry)
    state: Any = "discovered"  # taken up again, should anything end the work
    reason: str | None = None
    searchable = entry.searchable
    duration: float | None = None
    waiting = len(catalog.entries("discovered"))
    interrupted = False

    def check_all() -> None:
        nonlocal interrupted
        interrupted = True
        if check is not None:
            check()
        interrupted = False

    try:
        yield IndexingEvent(entry, None, waiting)
        store = None if embedder is None else VectorWriter(path, embedder)
        on_frames = None if store is None else _appender(store)
        events = build_search_index(
            model.engine, as_medium(str(entry.path), None), path, effort=effort, check=check_all, on_frames=on_frames
        )
        for event in events:
            if isinstance(event, WindowsReady):
                duration = event.index.duration
                searchable = searchable_until(event.index.seen)
                if not catalog.update(entry, "indexing", searchable=searchable, duration=duration):
                    return  # the video was removed, or has changed
                _check_room(catalog)
            else:
                yield IndexingEvent(entry, event, waiting)
        state = "indexed"
    except (DiskFull, LibraryFull) as error:  # not the video's fault
        reason = str(error)
        raise
    except OutOfMemory as error:
        state, reason = "failed", str(error)
        check_disk(catalog.folder, 0)
    except KeyeError as error:
        state, reason = "failed", str(error)
    except Exception as error:
        if interrupted:
            raise
        # A defect that one video meets must not keep the others waiting.
        log.exception("%s could not be indexed", entry.path)
        state, reason = "failed", f"unexpected {type(error).__name__}: {error}"
    finally:
        catalog.update(entry, state, reason=reason, searchable=searchable, duration=duration)


def _appender(store: VectorWriter) -> Callable[[NDArray[np.uint8], Any], None]:
    return lambda frames, times: store.append(frames, [float(time) for time in times])


def searchable_until(seen: Any) -> float:
    """Seconds from the start of the video that are covered without a gap."""
    until = 0.0
    for span in sorted(seen, key=lambda span: span.start):
        if span.start > until + span.spacing + 1e-6:
            break
        until = max(until, span.end)
    return until
