"""The engine for programs with an event loop: requests go in, events come out, a thread of its own computes.

    model = keye.load("nano")
    engine = AsyncEngine(model.engine)
    engine.start()
    async for event in engine.run(model.request(messages)):
        ...

Closing the iterator in any way, in any state of the request, aborts it and frees all that it held.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

from keye.engine.engine import AnyPrompt, Engine, GenerationResult, ResultBuilder, ScoreResult
from keye.engine.request import Delta, Event, Failed, Finished, GenerationRequest, Task
from keye.engine.sampling import SamplingParams
from keye.errors import KeyeError

#: Requests that may wait or run at once.
MOST_REQUESTS = 1024
#: More of a reply waits up to so many seconds for what follows it: waking the event loop for each token takes the
#: processor, and Python's global lock, from the model.
FLUSH_SECONDS = 0.05


class Overloaded(KeyeError):
    """There are too many requests; nothing was taken."""


class Stopping(Overloaded):
    """The engine is ending: nothing is taken any more, or what was taken is given up."""


class OpenRequest:
    """A request that was submitted; `next_events` takes its events as they come. Aborted when it is
    garbage-collected."""

    def __init__(self, engine: AsyncEngine, task: Task, events: deque[Event], arrived: asyncio.Event) -> None:
        self._engine, self._task, self._events, self._arrived, self._is_open = engine, task, events, arrived, True

    async def next_events(self, seconds: float | None = None) -> list[Event] | None:
        """All events that have come, waiting for the first of them; none when nothing came for so many seconds, None
        after the last. Raises what made the request fail, after the events before that."""
        if not self._is_open:
            return None
        if not self._events:
            self._arrived.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._arrived.wait()
        events: list[Event] = []
        while self._events and not (events and isinstance(self._events[0], Failed)):
            event = self._events.popleft()
            if isinstance(event, Finished | Failed):
                self._close()
            if isinstance(event, Failed):
                raise event.error
            events.append(event)
        return events

    def abort(self) -> None:
        """Aborts the request in whatever state it is; nothing happens to one that has ended."""
        self._close()
        if not self._task.has_ended:
            self._engine.core.abort(self._task)

    def __del__(self) -> None:
        self.abort()

    def _close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._engine._open.discard(self._task)


class AsyncEngine:
    """Requests of many clients on one model, computed together. Use from one event loop; `start` and `close` once."""

    def __init__(self, engine: Engine, *, most_requests: int = MOST_REQUESTS) -> None:
        self.engine, self.core, self.most_requests = engine, engine.core, most_requests
        self._thread = threading.Thread(target=self._work, name="keye-engine", daemon=True)
        self._closing, self._draining = False, False
        self._open: set[Task] = set()
        #: Events that the engine's thread has emitted and the event loop has not distributed yet.
        self._outbox: deque[tuple[deque[Event], asyncio.Event, Event]] = deque()
        self._is_waking, self._is_scheduled, self._last_flush = False, False, 0.0

    def start(self) -> None:
        """Begins to compute."""
        self._thread.start()

    def submit(self, request: GenerationRequest) -> OpenRequest:
        """Takes a request, from the event loop's thread; `Overloaded`, and nothing taken, when too many are there."""
        if self._draining or self._closing:
            raise Stopping("the server is ending and takes no more requests; try again")
        if len(self._open) >= self.most_requests:
            raise Overloaded(f"{self.most_requests} requests are waiting or running; try again later")
        loop, events, arrived = asyncio.get_running_loop(), deque[Event](), asyncio.Event()
        begun: set[int] = set()

        def flush_later() -> None:
            loop.call_later(max(0.0, self._last_flush + FLUSH_SECONDS - time.monotonic()), self._flush)

        def emit(event: Event) -> None:
            # Called by the engine's thread. More of a reply may wait for what follows it; all else is urgent.
            growth = isinstance(event, Delta) and event.choice_index in begun
            if isinstance(event, Delta):
                begun.add(event.choice_index)
            self._outbox.append((events, arrived, event))
            with suppress(RuntimeError):  # the loop is closed: no reader is left
                if growth and not (self._is_scheduled or self._is_waking):
                    self._is_scheduled = True
                    loop.call_soon_threadsafe(flush_later)
                elif not growth and not self._is_waking:
                    self._is_waking = True
                    loop.call_soon_threadsafe(self._flush)

        task = self.core.add(request, emit)
        self._open.add(task)
        return OpenRequest(self, task, events, arrived)

    def _flush(self) -> None:
        """In the event loop: distributes the events to the coroutines that wait for them."""
        self._is_waking, self._is_scheduled, self._last_flush = False, False, time.monotonic()
        while self._outbox:
            events, arrived, event = self._outbox.popleft()
            events.append(event)
            arrived.set()

    async def run(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Computes a request and yields its events, `Finished` last; raises what made it fail, or `Overloaded`."""
        submitted = self.submit(request)
        try:
            while (events := await submitted.next_events()) is not None:
                for event in events:
                    yield event
        finally:
            submitted.abort()

    async def generate(self, prompt: AnyPrompt, sampling: SamplingParams, **options: Any) -> GenerationResult:
        """Continues one prompt; options as in `Engine.generate`. Concurrent calls are computed together."""
        request = self.engine.generate_request(prompt, sampling, **options)
        return (await self._result(request)).build_result()

    async def score(self, token_ids: AnyPrompt, **options: Any) -> ScoreResult:
        """The log-probabilities of tokens; see `Engine.score` for options."""
        return (await self._result(self.engine.score_request(token_ids, **options))).build_scores()

    async def update_weights(self, state: Mapping[str, Tensor]) -> int:
        """Replaces weights between two steps; see `Engine.update_weights`."""
        return await asyncio.to_thread(self.engine.update_weights, state)

    async def _result(self, request: GenerationRequest) -> ResultBuilder:
        builder = ResultBuilder(request)
        async for event in self.run(request):
            builder.add(event)
        return builder

    def fail_open(self) -> None:
        """Fails the open requests, from the event loop's thread: the server is ending."""
        for task in list(self._open):
            if not task.has_ended:
                task.emit(Failed(Stopping("the server is ending before the request was complete; try again")))
                self.core.abort(task)

    async def drain(self, seconds: float) -> bool:
        """Rejects new requests and waits for the open ones, at most so long; whether all have ended."""
        self._draining = True
        end = time.monotonic() + seconds
        while self._has_open() and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return not self._has_open()

    def close(self) -> None:
        """Aborts the open requests and ends the thread; the model goes on without it."""
        self._closing = True
        with self.core.wake:
            self.core.wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self.fail_open()

    def _has_open(self) -> bool:
        """Whether a request of this engine still holds anything, also one that was aborted in the running step."""
        return any(not task.has_ended for task in self._open) or any(t.aborted for t in list(self.core.tasks))

    def gauges(self) -> Mapping[str, float]:
        """Numbers for monitoring: requests by state, tokens computed, what the caches did, bytes by account."""
        core, runtime, tasks = self.core, self.core.runtime, list(self.core.tasks)
        running = sum(task.is_running for task in tasks)
        return {
            "requests_waiting": len(tasks) - running,
            "requests_running": running,
            "computed_prompt_tokens_total": core.computed["prompt"],
            "computed_reply_tokens_total": core.computed["reply"],
            "preemptions_total": core.scheduler.preemptions,
            "prefix_cache_hits_total": runtime.prefixes.hits,
            "prefix_cache_queries_total": runtime.prefixes.hits + runtime.prefixes.misses,
            **{f"{name.replace('-', '_')}_bytes": float(nbytes) for name, nbytes in runtime.ledger.accounts().items()},
        }

    def _work(self) -> None:
        core = self.core
        while not self._closing:
            if core.is_idle():
                with core.wake:
                    if core.is_idle() and not self._closing:
                        core.wake.wait(1.0)
                continue
            try:
                if not core.step():
                    core.wait_for_work()
            except Exception as error:
                logging.getLogger("keye").exception("the engine failed in a step")
                core.fail_all(error)
