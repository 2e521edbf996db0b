"""A batch: every item of a manifest is asked once by some worker, and its record is written once.

Items that ask about the same media meet them in one place: the first of them alone, the others after it, where what
was decoded and computed lies in the caches. A worker that is lost is started again and its questions are asked after
all others; one during which workers are lost again is then asked alone, and if that fails too, gets an error.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from keye.batch.journal import Journal, check_same
from keye.batch.manifest import BadLine, Item, by_media, key_of
from keye.batch.workers import Answer, Worker, WorkerLost
from keye.errors import KeyeError

#: Workers that an item may lose before it is asked alone.
_SHARED_LOSSES: Final = 2
#: Times in a row that starting a worker may fail, and that it may be lost without having answered anything.
_MOST_STARTS: Final = 3
_MOST_LOSSES: Final = 100
_SYNC_SECONDS: Final = 1.0
_Key = tuple[str, ...]


@dataclass
class Report:
    """What a batch did. `items` of the manifest are `skipped` (done by an earlier run), `ok` or `errors`; tokens and
    `video_seconds`, as far as servers tell them, and `seconds` of wall time are of this run. `losses` counts workers
    that were lost."""

    items: int = 0
    skipped: int = 0
    ok: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    video_seconds: float = 0.0
    seconds: float = 0.0
    losses: int = 0

    @property
    def items_per_second(self) -> float:
        return (self.ok + self.errors) / self.seconds if self.seconds > 0 else 0.0

    def count(self, record: Mapping[str, Any], answer: Answer | None) -> None:
        """One more record of this run."""
        if record["error"] is not None:
            self.errors += 1
            return
        self.ok += 1
        usage = _mapping(answer.body.get("usage") if answer is not None else None)
        media = usage.get("media")
        self.prompt_tokens += int(_amount(usage, "prompt_tokens"))
        self.cached_tokens += int(_amount(_mapping(usage.get("prompt_tokens_details")), "cached_tokens"))
        self.completion_tokens += int(_amount(usage, "completion_tokens"))
        self.video_seconds += sum(_amount(_mapping(m), "duration") for m in (media if isinstance(media, list) else ()))

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "seconds": round(self.seconds, 3), "items_per_second": round(self.items_per_second, 3)}


class Agenda:
    """Which question comes next. Knows items and names of workers; asks nothing.

    A worker gets, in this order: another question about media that it has processed; one about media that no worker
    has; one about media that others have; one that was put last. While the first question about some media is under
    way, its others wait.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self._groups = {key: deque(group) for key, group in by_media(items).items()}
        # A key is in one of these, or its questions are all under way or answered.
        self._cold = deque(self._groups)
        self._opening: dict[str, _Key] = {}
        self._warm: dict[str, deque[_Key]] = {}
        self._placed = set(self._groups)
        self._last: deque[Item] = deque()

    def take(self, worker: str) -> Item | None:
        """The next question for a worker, by its name; None where there is none just now."""
        key = self._next_warm(worker)
        if key is None and self._cold:
            return self._open(self._cold.popleft())
        if key is None:
            key = next((k for other in self._warm if (k := self._next_warm(other)) is not None), None)
        if key is not None:
            return self._groups[key].popleft()
        return self._last.popleft() if self._last and not any(self._groups.values()) else None

    def mark_answered(self, item: Item, worker: str) -> None:
        """A question has its answer, from this worker."""
        key = self._opening.pop(item.id, None)
        if key is not None:
            self._warm.setdefault(worker, deque()).append(key)

    def drop(self, item: Item) -> None:
        """A question is done with, and its media were not processed."""
        key = self._opening.pop(item.id, None)
        if key is not None:
            self._cold.appendleft(key)

    def put_last(self, item: Item) -> None:
        """A question is to be asked again, after all others."""
        self.drop(item)
        self._last.append(item)

    def put_back(self, item: Item) -> None:
        """A question was not asked after all."""
        self.drop(item)
        key = key_of(item)
        self._groups[key].appendleft(item)
        if key not in self._placed:
            self._placed.add(key)
            self._cold.appendleft(key)

    def forget(self, worker: str) -> None:
        """What a worker has processed is lost with it."""
        for key in self._warm.pop(worker, ()):
            if self._groups[key]:
                self._cold.appendleft(key)
            else:
                self._placed.discard(key)

    def _open(self, key: _Key) -> Item:
        item = self._groups[key].popleft()
        if self._groups[key]:
            self._opening[item.id] = key
        else:
            self._placed.discard(key)
        return item

    def _next_warm(self, worker: str) -> _Key | None:
        keys = self._warm.get(worker, deque())
        while keys and not self._groups[keys[0]]:
            self._placed.discard(keys.popleft())
        return keys[0] if keys else None


@dataclass
class _WorkerState:
    """A worker with the number of its starts, and how many times in a row it was lost without an answer."""

    worker: Worker
    start: int = 0
    failed_starts: int = 0
    is_dead: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Batch:
    """One run over a manifest. `progress` is called with what is done and how much there is; `shape` makes the record
    that is written of the id and the record that a batch writes."""

    def __init__(
        self,
        workers: Sequence[Worker],
        journal: Journal,
        *,
        progress: Callable[[int, int], None] = lambda *_: None,
        shape: Callable[[str, dict[str, Any]], dict[str, Any]] = lambda _, record: record,
    ) -> None:
        self._states = [_WorkerState(worker) for worker in workers]
        self._journal, self._progress, self._shape = journal, progress, shape
        self.report = Report()
        self._left = 0
        self._losses: dict[str, int] = {}
        self._suspects: list[Item] = []
        self._why = ""

    async def run(self, lines: Sequence[Item | BadLine], *, retry_errors: bool = False) -> Report:
        """Asks whatever the output does not hold yet. `KeyeError` where no worker is left; what was answered stays."""
        begin = time.monotonic()
        syncing = asyncio.create_task(self._sync())
        try:
            todo = self._resume(lines, retry_errors)
            for line in todo:
                if isinstance(line, BadLine):
                    self._write(line, record_of_error(line, line.reason, "bad_line"), None)
            items = [line for line in todo if isinstance(line, Item)]
            if items:
                await self._ask_all(items)
        finally:
            syncing.cancel()
            with suppress(asyncio.CancelledError):
                await syncing
            for state in self._states:
                await state.worker.close()
            self.report.seconds = time.monotonic() - begin
        return self.report

    def _resume(self, lines: Sequence[Item | BadLine], retry_errors: bool) -> list[Item | BadLine]:
        """The lines that have no record; those to be asked again lose theirs."""
        journal = self._journal
        again = set(check_same([(line.id, line.digest) for line in lines], journal.done, journal.path))
        if retry_errors:
            again |= {line.id for line in lines if line.id in journal.done and not journal.done[line.id].ok}
        journal.forget(again)
        todo = [line for line in lines if line.id not in journal.done]
        self.report.items, self.report.skipped = len(lines), len(lines) - len(todo)
        self._progress(self.report.skipped, len(lines))
        return todo

    async def _ask_all(self, items: Sequence[Item]) -> None:
        self._agenda, self._left, self._changed = Agenda(items), len(items), asyncio.Condition()
        try:
            async with asyncio.TaskGroup() as tasks:
                for state in self._states:
                    tasks.create_task(self._serve(state))
        except BaseExceptionGroup as several:
            error: BaseException = several
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None
        for item in self._suspects:
            await self._ask_alone(item)
        if self._left:
            raise KeyeError(
                f"no worker is left ({self._why}), and {self._left:,} of the items wait; what was answered is in "
                f"{self._journal.path}: run the same command again, which goes on"
            )

    async def _serve(self, state: _WorkerState) -> None:
        """Starts a worker and keeps all its slots busy until nothing is left."""
        if await self._start(state, state.start):
            async with asyncio.TaskGroup() as slots:
                for _ in range(state.worker.slots):
                    slots.create_task(self._fill(state))

    async def _fill(self, state: _WorkerState) -> None:
        while (item := await self._next(state)) is not None:
            async with state.lock:  # it may be about to restart
                start = state.start
            try:
                await self._ask(state, item)
            except WorkerLost as lost:
                await self._put_back(item, lost)
                await self._start(state, start + 1)
            else:
                await self._notify()

    async def _next(self, state: _WorkerState) -> Item | None:
        """A question, as soon as there is one; None when all are answered or quarantined."""
        async with self._changed:
            while self._left > len(self._suspects) and not state.is_dead:
                item = self._agenda.take(state.worker.name)
                if item is not None:
                    return item
                await self._changed.wait()
        return None

    async def _ask(self, state: _WorkerState, item: Item) -> None:
        """Asks and writes the record; raises `WorkerLost` and nothing else."""
        begin = time.monotonic()
        try:
            answer = await state.worker.ask(item)
        except WorkerLost:
            raise
        except KeyeError as error:
            self._agenda.drop(item)
            self._write(item, record_of_error(item, str(error), "bad_medium"), None)
            return
        except Exception as error:  # noqa: BLE001 - whatever a line or an answer brings about ends that item alone
            self._agenda.drop(item)
            reason = f"it could not be asked, or its answer not be read ({type(error).__name__})"
            self._write(item, record_of_error(item, reason, "failed"), None)
            return
        state.failed_starts = 0
        self._agenda.mark_answered(item, state.worker.name)
        self._write(item, record_of_answer(item, answer, time.monotonic() - begin, state.worker.name), answer)

    async def _put_back(self, item: Item, lost: WorkerLost) -> None:
        """A question whose worker was lost goes to another worker, or is quarantined."""
        self._losses[item.id] = self._losses.get(item.id, 0) + lost.during
        if not lost.during:
            self._agenda.put_back(item)
        elif self._losses[item.id] < _SHARED_LOSSES:
            self._agenda.put_last(item)
        else:
            self._agenda.drop(item)
            self._suspects.append(item)
        await self._notify()

    async def _ask_alone(self, item: Item) -> None:
        """The last try of a question during which workers were lost: nothing else is under way."""
        for state in self._states:
            if state.is_dead:
                continue
            try:
                await self._ask(state, item)
            except WorkerLost as lost:
                await self._start(state, state.start + 1)
                if lost.during:
                    self._write(
                        item, record_of_error(item, f"workers were lost while they answered this: {lost}", "lost"), None
                    )
                    return
            else:
                return

    async def _start(self, state: _WorkerState, number: int) -> bool:
        """Makes a worker ready for the `number`th time, unless another slot has done so; whether it is."""
        async with state.lock:
            if state.is_dead or (state.start >= number and number > 0):
                return not state.is_dead
            if number > 0:
                self.report.losses += 1
                self._agenda.forget(state.worker.name)
                state.failed_starts += 1
            state.start = number
            if state.failed_starts > _MOST_LOSSES:
                state.is_dead, self._why = True, f"{state.worker.name} was lost {_MOST_LOSSES} times without an answer"
            for attempt in range(0 if state.is_dead else _MOST_STARTS):
                try:
                    await state.worker.start()
                    break
                except WorkerLost as lost:
                    self._why = str(lost)
                    state.is_dead = number == 0 or attempt == _MOST_STARTS - 1
                    if state.is_dead:
                        break
        await self._notify()
        return not state.is_dead

    def _write(self, line: Item | BadLine, record: dict[str, Any], answer: Answer | None) -> None:
        self._journal.append(self._shape(line.id, record))
        self.report.count(record, answer)
        self._left -= isinstance(line, Item)
        self._progress(self.report.skipped + self.report.ok + self.report.errors, self.report.items)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(_SYNC_SECONDS)
            await asyncio.to_thread(self._journal.sync)


def record_of_answer(item: Item, answer: Answer, seconds: float, worker: str) -> dict[str, Any]:
    """The record of an answer, good or bad: in OpenAI's form for lines in that form, else the answer's parts."""
    body = answer.body
    choices = body.get("choices")
    choice = _mapping(choices[0]) if isinstance(choices, list) and choices else {}
    problem = None if answer.status == 200 and not body.get("error") else _problem(answer)
    if problem is None and not isinstance(choice.get("message"), Mapping):
        problem = {"code": "bad_answer", "message": "the server's answer has no choices with a message"}
    if item.openai:
        response = {"status_code": answer.status, "request_id": body.get("id") or "", "body": body}
        return _openai_record(item, response, problem)
    if problem is not None:
        return {"id": item.id, "line_digest": item.digest, "error": problem}
    message, fields = choice["message"], _mapping(body.get("keye"))
    optional = {
        "reasoning": message.get("reasoning_content"), "intervals": fields.get("intervals") or None,
        "regions": fields.get("regions") or None, "evidence": fields.get("evidence"), "notes": fields.get("notes"),
    }  # fmt: skip
    return {
        "id": item.id, "line_digest": item.digest, "text": message.get("content"),
        **{name: value for name, value in optional.items() if value is not None},
        "finish_reason": choice.get("finish_reason"), "usage": body.get("usage"), "model": body.get("model"),
        "worker": worker, "seconds": round(seconds, 3), "error": None,
    }  # fmt: skip


def record_of_error(line: Item | BadLine, message: str, code: str) -> dict[str, Any]:
    """The record of an item that was never answered."""
    place = f"line {line.line}: " if line.line else ""  # 0: no line of a file
    error = {"code": code, "message": f"{place}{message}"}
    if isinstance(line, Item) and line.openai:
        return _openai_record(line, None, error)
    return {"id": line.id, "line_digest": line.digest, "error": error}


def _openai_record(item: Item, response: object, error: object) -> dict[str, Any]:
    ids = {"id": f"batch_req_{item.digest}", "custom_id": item.id, "line_digest": item.digest}
    return {**ids, "response": response, "error": error}


def _problem(answer: Answer) -> dict[str, Any]:
    """OpenAI's error object, or what others send in its place."""
    error: Any = answer.body.get("error") or answer.body.get("detail") or answer.body
    if isinstance(error, Mapping):
        code = error.get("code")
        return {
            "code": code if code and isinstance(code, str | int) else f"status_{answer.status}",
            "message": str(error.get("message") or dict(error))[:2000],
        }
    return {"code": f"status_{answer.status}", "message": str(error)[:2000]}


def unknown_ids(lines: Iterable[Item | BadLine], journal: Journal) -> int:
    """How many records the output has of items that the manifest no longer holds."""
    return len(journal.done.keys() - {line.id for line in lines})


def _mapping(value: object) -> Mapping[str, Any]:
    """An object in an answer; empty where something else stands in its place."""
    return value if isinstance(value, Mapping) else {}


def _amount(of: Mapping[str, Any], name: str) -> float:
    """A number in an answer; 0 where there is none."""
    value = of.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e15 else 0
