"""llama.cpp's fields of streams: how far a prompt has come (`return_progress`), and how fast tokens are computed
(`timings_per_token`). Programs made for its server show them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from keye.engine.request import Delta, Event, Prefilled, Progress


class Telemetry:
    """Follows the events of one request; `timings` and `progress` say which fields are wanted."""

    def __init__(self, timings: bool | None, progress: bool | None) -> None:
        self._timings, self._progress = bool(timings), bool(progress)
        self._begin = time.perf_counter()
        self._prefilled = self._begin
        self._prompt, self._cached, self._reply, self._reported = 0, 0, 0, False

    def see(self, event: Event) -> None:
        """Takes an event of the engine."""
        if isinstance(event, Progress) and event.phase == "prefill":
            self._cached = event.cached
        elif isinstance(event, Prefilled):
            self._prompt, self._prefilled = event.prompt_tokens, time.perf_counter()
        elif isinstance(event, Delta):
            self._reply += len(event.tokens)

    def timings(self) -> dict[str, Any]:
        """The speed so far as a field of a chunk; nothing where it is not wanted, or no token has come."""
        if not self._timings or not self._reply:
            return {}
        computed = self._prompt - self._cached
        timings = {
            "cache_n": self._cached,
            **_speed("prompt", computed, self._prefilled - self._begin),
            **_speed("predicted", self._reply, time.perf_counter() - self._prefilled),
        }
        return {"timings": timings}

    def progress(self, event: Progress) -> Iterator[dict[str, Any]]:
        """What a step of the prompt adds to a stream: before the first, what was computed before."""
        if not self._progress or event.phase != "prefill":
            return
        processed = [event.done] if self._reported else [event.cached, event.done]
        self._reported = True
        milliseconds = round(1000 * (time.perf_counter() - self._begin))
        for done in processed:
            step = {"total": event.total, "cache": event.cached, "processed": done, "time_ms": milliseconds}
            yield {"prompt_progress": step}


def _speed(name: str, tokens: int, seconds: float) -> dict[str, float]:
    milliseconds, count = 1000 * max(seconds, 1e-6), max(tokens, 1)
    return {
        f"{name}_n": tokens,
        f"{name}_ms": round(milliseconds, 3),
        f"{name}_per_token_ms": round(milliseconds / count, 3),
        f"{name}_per_second": round(1000 * count / milliseconds, 3),
    }
