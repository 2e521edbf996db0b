"""The engine for programs with an event loop: requests go in, events come out, a thread of its own computes.

    engine = AsyncEngine(keye.load("nano"))
    engine.start()
    async for event in engine.run(model.request(messages)):
        ...

Closing the iterator, at any stage and however that comes about, gives the request up and frees all that it held.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress

from keye.engine.core import EngineCore
from keye.engine.engine import Keye
from keye.engine.request import Event, Failed, Finished, Request, Stage
from keye.errors import KeyeError

#: Requests that may wait or run at once.
MOST_REQUESTS = 1024


class Overloaded(KeyeError):
    """There are too many requests, or the engine is stopping; nothing was taken."""


class AsyncEngine:
    """Requests of many clients on one model, computed together. Use from one event loop; `start` and `close` once."""

    def __init__(self, model: Keye, *, most_requests: int = MOST_REQUESTS) -> None:
        self.model, self.most_requests = model, most_requests
        self.core: EngineCore = model.core
        self._thread = threading.Thread(target=self._work, name="keye-engine", daemon=True)
        self._closing, self._draining = False, False
        self._open = 0

    def start(self) -> None:
        """Begins to compute."""
        self._thread.start()

    async def run(self, request: Request) -> AsyncGenerator[Event, None]:
        """Works on a request and yields its events, `Finished` last; raises what made it fail. `Overloaded`, at once,
        when too many are there."""
        if self._draining or self._closing:
            raise Overloaded("the engine is stopping and takes no more requests; try another, or later")
        if self._open >= self.most_requests:
            raise Overloaded(f"{self.most_requests} requests are waiting or running; try again later")
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def tell(event: Event) -> None:
            with suppress(RuntimeError):  # the loop was closed, and its reader with it
                loop.call_soon_threadsafe(queue.put_nowait, event)

        task = self.core.add(request, self.model.attention_of(request.attention), tell)
        self._open += 1
        try:
            while True:
                event = await queue.get()
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self._open -= 1
            if task.stage is not Stage.ENDED:
                self.core.abort(task)

    async def drain(self, seconds: float) -> bool:
        """Refuses new requests and waits for those that are there, at most so long; whether all have ended."""
        self._draining = True
        end = time.monotonic() + seconds
        while not self.core.idle() and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return self.core.idle()

    def close(self) -> None:
        """Fails what is left, and ends the thread and the engine of the model, which takes no requests any more."""
        self._closing = True
        with self.core.wake:
            self.core.wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self.core.close()

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
            else:
                self._step()

    def _step(self) -> None:
        try:
            if not self.core.step():
                self.core.rest()
        except Exception as error:  # noqa: BLE001 - a defect: those who wait are told, and the thread lives on
            self.core.fail_all(error)
