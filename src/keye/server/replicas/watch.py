"""Which replicas answer: each is asked for its health again and again, passed over while it is silent, and ended where
it stays so. Knows replicas and a clock, no requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from keye.server.replicas.processes import Replica, ReplicaLost

log: Final = logging.getLogger("keye.server")
#: Seconds between two questions; without an answer for how long a replica is passed over, and ended.
PAUSE: Final = 0.5
SILENT_SECONDS: Final = 2.0
LOST_SECONDS: Final = 15.0


class Watch:
    """The times at which replicas have answered last. `watch` follows one for as long as it runs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.last_answers: dict[str, float] = {}

    def is_silent(self, replica: Replica) -> bool:
        """Whether a replica that runs has not answered for a while."""
        last = self.last_answers.get(replica.name)
        return replica.is_ready and last is not None and self._clock() - last > SILENT_SECONDS

    async def watch(self, replica: Replica, *, pause: float = PAUSE) -> None:
        """Asks again and again; ends what does not answer for `LOST_SECONDS`, so that it is started again."""
        while True:
            if not replica.is_ready:
                self.last_answers.pop(replica.name, None)
            elif await answers(replica, SILENT_SECONDS):
                self.last_answers[replica.name] = self._clock()
            elif self._clock() - self.last_answers.setdefault(replica.name, self._clock()) > LOST_SECONDS:
                log.warning("replica %s has not answered for %g s and is ended", replica.name, LOST_SECONDS)
                await replica.kill()
                self.last_answers.pop(replica.name, None)
            await asyncio.sleep(pause)


async def answers(replica: Replica, seconds: float) -> bool:
    """Whether a replica answers a health check within `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            reply = await replica.send("GET", "/health", {}, b"")
            await reply.close()
            return reply.status == 200
    except (TimeoutError, ReplicaLost):
        return False
