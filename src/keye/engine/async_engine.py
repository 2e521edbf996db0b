"""The engine for programs with an event loop: requests go in, events come out, a thread of its own computes.

    engine = AsyncEngine(keye.load("nano"))
    engine.start()
    async for event in engine.run(model.request(messages)):
        ...

Closing the iterator, at any stage and however that comes about, gives the request up and frees all that it held.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress

from keye.engine.core import EngineCore
from keye.engine.engine import Keye
from keye.engine.request import Event, Failed, Finished, Request, Stage, Task
from keye.errors import KeyeError

#: Requests that may wait or run at once.
MOST_REQUESTS = 1024


class Overloaded(KeyeError):
    """There are too many requests, or the engine is stopping; nothing was taken."""


class Running:
    """A request on its way: iterate over its events once. Aborted when it is let go."""

    def __init__(self, engine: AsyncEngine, task: Task, queue: asyncio.Queue[Event]) -> None:
        self._engine, self._task, self._queue, self._counted = engine, task, queue, True

    def __aiter__(self) -> Running:
        return self

    async def __anext__(self) -> Event:
        if not self._counted:
            raise StopAsyncIteration
        event = await self._queue.get()
        if isinstance(event, Finished | Failed):
            self._leave()
        if isinstance(event, Failed):
            raise event.error
        return event

    def abort(self) -> None:
        """Gives the request up, at whatever stage it is; nothing happens to one that has ended."""
        self._leave()
        if self._task.stage is not Stage.ENDED:
            self._engine.core.abort(self._task)

    def __del__(self) -> None:
        self.abort()

    def _leave(self) -> None:
        if self._counted:
            self._counted = False
            self._engine._open.discard(self._task)


class AsyncEngine:
    """Requests of many clients on one model, computed together. Use from one event loop; `start` and `close` once."""

    def __init__(self, model: Keye, *, most_requests: int = MOST_REQUESTS) -> None:
        self.model, self.most_requests = model, most_requests
        self.core: EngineCore = model.core
        self._thread = threading.Thread(target=self._work, name="keye-engine", daemon=True)
        self._closing, self._draining = False, False
        self._open: set[Task] = set()
        self._told: deque[tuple[asyncio.Queue[Event], Event]] = deque()
        self._waking = False

    def start(self) -> None:
        """Begins to compute."""
        self._thread.start()

    def submit(self, request: Request) -> Running:
        """Takes a request, from the event loop's thread; `Overloaded`, and nothing taken, when too many are there."""
        if self._draining or self._closing:
            raise Overloaded("the engine is stopping and takes no more requests; try another, or later")
        if len(self._open) >= self.most_requests:
            raise Overloaded(f"{self.most_requests} requests are waiting or running; try again later")
        mode = self.model.attention_of(request.attention)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def tell(event: Event) -> None:
            self._told.append((queue, event))
            if not self._waking:  # one call for all that a step tells: each costs the loop a system call
                self._waking = True
                with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                    loop.call_soon_threadsafe(self._hand_out)

        task = self.core.add(request, mode, tell)
        self._open.add(task)
        return Running(self, task, queue)

    def _hand_out(self) -> None:
        """In the event loop: gives what was told to those who wait for it."""
        self._waking = False
        while self._told:
            queue, event = self._told.popleft()
            queue.put_nowait(event)

    async def run(self, request: Request) -> AsyncGenerator[Event, None]:
        """Works on a request and yields its events, `Finished` last; raises what made it fail, or `Overloaded`."""
        running = self.submit(request)
        try:
            async for event in running:
                yield event
        finally:
            running.abort()

    async def drain(self, seconds: float) -> bool:
        """Refuses new requests and waits for those that are there, at most so long; whether all have ended."""
        self._draining = True
        end = time.monotonic() + seconds
        while self._running() and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return not self._running()

    def close(self) -> None:
        """Gives up what is left of its requests and ends the thread; the model goes on without it."""
        self._closing = True
        with self.core.wake:
            self.core.wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        for task in list(self._open):
            if task.stage is not Stage.ENDED:
                task.tell(Failed(Overloaded("the engine was closed before the request was complete; try again")))
                self.core.abort(task)

    def _running(self) -> bool:
        """Whether a request of this engine holds anything still, also one that was given up in the running step."""
        return any(task.stage is not Stage.ENDED for task in self._open) or any(
            t.aborted for t in list(self.core.tasks)
        )

    def gauges(self) -> Mapping[str, float]:
        """Numbers for monitoring: requests by stage, tokens computed, what the caches did, bytes by account."""
        core = self.core
        stages = [task.stage for task in list(core.tasks)]
        waiting = sum(stage in (Stage.WAITING, Stage.PREPARING, Stage.READY) for stage in stages)
        parts = core.parts
        return {
            "requests_waiting": waiting,
            "requests_running": len(stages) - waiting,
            "prompt_tokens_total": core.computed["prompt"],
            "generation_tokens_total": core.computed["reply"],
            "preemptions_total": core.preemptions,
            "prefix_cache_hits_total": parts.prefixes.hits,
            "prefix_cache_queries_total": parts.prefixes.hits + parts.prefixes.misses,
            **{f"bytes_{name.replace('-', '_')}": float(held) for name, held in parts.ledger.accounts().items()},
        }

    def _work(self) -> None:
        core = self.core
        while not self._closing:
            if core.idle():
                with core.wake:
                    if core.idle() and not self._closing:
                        core.wake.wait(1.0)
                continue
            try:
                if not core.step():
                    core.rest()
            except Exception as error:
                logging.getLogger("keye").exception("the engine failed in a step")
                core.fail_all(error)
