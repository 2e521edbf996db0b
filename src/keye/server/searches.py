"""Long work beside requests, such as searches in videos: whose turn it is, how it ends, and the indexes that searches
share.

An owner has one job at a time, all together a few; others wait in the order in which they came. So two questions about
one video never build its index twice, and no one waits for more than one job of each other owner. An index is written
as it is built and stays, within the room of its owner, until the server ends. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from keye.media.content import identify
from keye.media.source.fetch import Source
from keye.media.speech import Transcriber, transcribe
from keye.media.subtitles import Subtitles
from keye.moments import FindEvent, FindProgress, FindResult
from keye.server.edge.errors import ApiError
from keye.server.stores import FileStore
from keye.sessions.search.places import identify_source

#: Jobs of one owner that may be open.
MOST_OPEN: Final = 8
#: Seconds between events at the most, and of two reports of progress at the least.
BEAT_SECONDS: Final = 2.0
_PROGRESS_SECONDS: Final = 0.2

#: What comes before the events of a job.
STARTED: Final = object()
#: What a job calls with each event, in its thread.
Emit = Callable[[Any], None]


@dataclass(eq=False)
class Job:
    """Work of an owner, from when it waits to its end: `work` runs in a thread, and ends soon after `stop`."""

    owner: str
    work: Callable[[Job, Emit], None]
    id: str = field(default_factory=lambda: f"find-{secrets.token_hex(16)}")
    _stops: list[Callable[[], None]] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Ends the work soon, in whatever state it is. May be called by any thread."""
        self._stopping.set()
        for stop in self._stops:
            stop()

    def on_stop(self, stop: Callable[[], None]) -> None:
        """Has `stop` called by `stop`, at once where that was called before."""
        self._stops.append(stop)
        if self.is_stopping:
            stop()


class Jobs:
    """The jobs of all owners, of which `most_running` run at once. Used from the event loop; `submit` runs a function
    in a thread."""

    def __init__(self, submit: Callable[..., Any], most_running: int) -> None:
        self._submit = submit
        self._open: dict[str, Job] = {}
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._count: Counter[str] = Counter()
        self._running = asyncio.Semaphore(most_running)

    async def run(self, job: Job) -> AsyncGenerator[Any, None]:
        """`STARTED` once the job has its place, then its events, at least one every `BEAT_SECONDS`: the progress again,
        None where there is none yet. Raises what its work raises. Closing this stops the job, whose turn lasts until
        its thread has ended."""
        if self._count[job.owner] >= MOST_OPEN:
            sentence = f"{MOST_OPEN} searches of yours are waiting or running; stop one, or try again later"
            raise ApiError(429, sentence, code="too_many_running", retry=10)
        self._count[job.owner] += 1
        self._open[job.id] = job
        queue: asyncio.Queue[tuple[Any]] = asyncio.Queue()
        task: asyncio.Future[None] | None = None
        progress: FindProgress | None = None
        try:
            yield STARTED
            task = asyncio.ensure_future(self._take_turn(job, queue))
            task.add_done_callback(lambda _: self._leave(job))
            while not task.done() or not queue.empty():
                getting = asyncio.ensure_future(queue.get())
                await asyncio.wait((getting, task), timeout=BEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if getting.done():
                    (event,) = getting.result()
                    progress = event if isinstance(event, FindProgress) else progress
                    yield event
                    continue
                getting.cancel()
                if not task.done():
                    yield progress
            await task
        finally:
            job.stop()
            del self._open[job.id]
            if task is None:
                self._leave(job)

    def stop(self, job_id: str, owner: str) -> None:
        """Stops a job of this owner; `ApiError` 404 for any other id."""
        job = self._open.get(job_id)
        if job is None or job.owner != owner:
            raise ApiError(404, "no search has this id; it may have ended", param="find_id", code="not_found")
        job.stop()

    def stop_all(self) -> None:
        """Stops all jobs: the server is ending."""
        for job in list(self._open.values()):
            job.stop()

    async def _take_turn(self, job: Job, queue: asyncio.Queue[tuple[Any]]) -> None:
        loop, last = asyncio.get_running_loop(), 0.0

        def emit(event: FindEvent | Mapping[str, Any]) -> None:
            nonlocal last
            now = time.monotonic()
            if isinstance(event, FindProgress) and now - last < _PROGRESS_SECONDS and event.done < event.total:
                return
            last = now
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(queue.put_nowait, (event,))

        stopped = asyncio.Event()

        def note_stop() -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(stopped.set)

        job.on_stop(note_stop)
        async with AsyncExitStack() as stack:
            for place in (self._turns[job.owner], self._running):
                if not await _acquire(place, stopped) or job.is_stopping:
                    raise ApiError(409, "the search was stopped before it began", code="stopped")
                stack.callback(place.release)
            await self._submit(job.work, job, emit)

    def _leave(self, job: Job) -> None:
        self._count[job.owner] -= 1
        if not self._count[job.owner]:
            del self._count[job.owner]
            self._turns.pop(job.owner, None)


async def _acquire(place: asyncio.Lock | asyncio.Semaphore, stopped: asyncio.Event) -> bool:
    """Waits for a place, and whether it was taken: not where `stopped` is set before."""
    taking, stopping = asyncio.ensure_future(place.acquire()), asyncio.ensure_future(stopped.wait())
    try:
        await asyncio.wait((taking, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        taking.cancel()
    await asyncio.wait((taking,))
    if not taking.cancelled() and stopped.is_set():
        place.release()
        return False
    return not taking.cancelled()


@dataclass(frozen=True)
class FinishedSearch:
    """What a search has found in a video, and what it was asked with."""

    owner: str
    source: Source
    result: FindResult
    prompts: tuple[str, ...]
    settings: Mapping[str, Any]


class FinishedSearches:
    """The last searches that have ended, for their records. Safe to share by threads."""

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._searches: OrderedDict[str, FinishedSearch] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, search_id: str, search: FinishedSearch) -> None:
        """Takes a search; the oldest make room."""
        with self._lock:
            self._searches[search_id] = search
            while len(self._searches) > self._most:
                self._searches.popitem(last=False)

    def get(self, search_id: str, owner: str) -> FinishedSearch:
        """A search of this owner; `ApiError` 404 for any other id."""
        with self._lock:
            search = self._searches.get(search_id)
        if search is None or search.owner != owner:
            raise ApiError(404, "no search that has ended has this id", param="find_id", code="not_found")
        return search


class Transcripts:
    """Speech of videos as lines, by a service that the operator has named; the last ones are kept, by owner. Safe to
    share by threads."""

    def __init__(self, service: Transcriber | None, salt: Callable[[str], bytes], most: int = 32) -> None:
        self._service, self._salt, self._most = service, salt, most
        self._lines: OrderedDict[object, Subtitles] = OrderedDict()
        self._lock = threading.Lock()

    def get(
        self, owner: str, source: Source, track: int | None, check: Callable[[], None],
        on_progress: Callable[[float, float], None],
    ) -> Subtitles:  # fmt: skip
        """The lines of a video; `ApiError` where no service is named. `check` may raise to end the work. Blocks."""
        if self._service is None:
            sentence = "subtitles: this server has no transcription service; start it with --transcribe"
            raise ApiError(400, sentence, param="subtitles", code="no_transcriber")
        key = self._salt(owner), identify(source), track
        with self._lock:
            if key in self._lines:
                self._lines.move_to_end(key)
                return self._lines[key]
        lines = transcribe(source, self._service, track=track, on_progress=on_progress, check=check)
        with self._lock:
            self._lines[key] = lines
            while len(self._lines) > self._most:
                self._lines.popitem(last=False)
        return lines


class SearchIndexes:
    """Files of indexes by owner and video, in the folder of uploads and counted as storage of their owner. Those used
    longest ago make room for others, and for uploads; those not used for `seconds` go. Safe to share by threads."""

    def __init__(self, files: FileStore, salt: Callable[[str], bytes], seconds: float) -> None:
        self._files, self._salt, self._seconds = files, salt, seconds
        self._sizes: defaultdict[str, OrderedDict[Path, int]] = defaultdict(OrderedDict)
        self._used: dict[Path, float] = {}
        self._busy: Counter[Path] = Counter()
        self._lock = threading.Lock()
        files.evict = self._evict

    def path(self, owner: str, source: Source, options: Mapping[str, Any]) -> Path:
        """Where the index of a video under these options is, or will be; in use until `release`. Reads the file once.
        Blocks."""
        facts = repr(sorted(options.items())).encode()
        digest = hashlib.sha256(self._salt(owner) + identify_source(source).encode() + facts).hexdigest()
        path = self._files.folder / f"find-{digest}"
        with self._lock:
            self._sizes[owner].setdefault(path, 0)
            self._sizes[owner].move_to_end(path)
            self._busy[path] += 1
        return path

    def release(self, path: Path) -> None:
        """Ends a use of an index."""
        with self._lock:
            self._busy[path] -= 1
            self._used[path] = time.time()

    def sweep(self) -> None:
        """Removes those that were not used for long."""
        oldest = time.time() - self._seconds
        with self._lock:
            for owner in list(self._sizes):
                for path in [path for path in self._idle(owner) if self._used[path] < oldest]:
                    self._drop(owner, path)

    def account(self, owner: str, path: Path) -> None:
        """Counts what an index has grown by; `ApiError` where there is no room for it even without the others."""
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            size = 0
        with self._lock:
            mine = self._sizes[owner]
            while True:
                try:
                    self._files.claim(owner, size - mine.get(path, 0))
                    mine[path] = size
                    return
                except ApiError:
                    others = (other for other in mine if other != path)
                    if (oldest := next(others, None)) is None:
                        raise
                    self._drop(owner, oldest)

    def remove(self, owner: str, path: Path) -> None:
        """Removes an index."""
        with self._lock:
            self._drop(owner, path)

    def _idle(self, owner: str) -> list[Path]:
        """Indexes that no search uses, those used longest ago first."""
        return [path for path in self._sizes.get(owner, ()) if not self._busy[path]]

    def _evict(self, owner: str) -> bool:
        """Removes the index that was used longest ago; False where all are in use."""
        with self._lock:
            idle = self._idle(owner)
            if idle:
                self._drop(owner, idle[0])
            return bool(idle)

    def _drop(self, owner: str, path: Path) -> None:
        self._files.claim(owner, -self._sizes[owner].pop(path, 0))
        self._used.pop(path, None)
        path.unlink(missing_ok=True)
