"""What the defences cost: starting a confined worker, passing the guard, checking the shape of a large body.

Prints JSON. Run:
    python benchmarks/guard_cost.py [--repeats 20]
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

from PIL import Image

from keye.hub import asset
from keye.media.image import read_image
from keye.media.source.fetch import fetch_source, untrusted
from keye.media.video import VideoReader
from keye.server.edge.guard import Guard, GuardSettings
from keye.server.edge.json_shape import check_json
from keye.server.edge.limits import Limits

EVENTS, REQUESTS = 20_000, 3_000
MIB = 1024**2
HEADERS = [(b"host", b"localhost")]


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median time of one call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return round(statistics.median(times) * 1000, 1)


def open_and_close() -> None:
    with VideoReader(fetch_source(asset("demo.mp4"))):
        return


async def streams(scope: Any, receive: Any, send: Any) -> None:
    """An answer of `EVENTS` pieces for the path of a stream, else an empty one."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(EVENTS if scope["path"] == "/v1/stream" else 0):
        await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def microseconds(app: Any, path: str, requests: int, pieces: int) -> float:
    """Time of one piece of an answer, or of one request."""
    scope = {"type": "http", "method": "GET", "path": path, "headers": HEADERS, "query_string": b"", "client": None}

    async def sink(message: Any) -> None:
        """Takes everything at once."""

    async def ask() -> None:
        for _ in range(requests):
            await app(dict(scope), sink, sink)

    begin = time.perf_counter()
    asyncio.run(ask())
    return round((time.perf_counter() - begin) / (requests * pieces) * 1e6, 2)


def body_check(body: bytes) -> dict[str, float]:
    """Seconds for one body, and the longest time for which another thread could not run meanwhile."""
    gaps, done = [0.0], threading.Event()

    def watch() -> None:
        last = time.perf_counter()
        while not done.wait(0.001):
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    check_json(body, Limits())
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    return {"mib": round(len(body) / MIB, 1), "ms": round(seconds * 1000, 1), "stall_ms": round(max(gaps) * 1000, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    out = io.BytesIO()
    Image.new("RGB", (640, 480), (200, 10, 10)).save(out, "JPEG")
    ours, theirs = fetch_source(out.getvalue()), untrusted(fetch_source(out.getvalue()))
    guard = Guard(streams, GuardSettings(limits=Limits(requests_per_second=1e9, burst=1e9)))
    report = {
        "benchmark": "guard_cost",
        "video_worker_start_ms": milliseconds(open_and_close, repeats),
        "image_here_ms": milliseconds(lambda: read_image(ours), repeats),
        "image_confined_ms": milliseconds(lambda: read_image(theirs), repeats),
        "request_us": {
            "without": microseconds(streams, "/v1/models", REQUESTS, 1),
            "guarded": microseconds(guard, "/v1/models", REQUESTS, 1),
        },
        "streamed_event_us": {
            "without": microseconds(streams, "/v1/stream", 1, EVENTS),
            "guarded": microseconds(guard, "/v1/stream", 1, EVENTS),
        },
        "json": {
            "one long string": body_check(b'{"a":"' + b"A" * (60 * MIB) + b'"}'),
            "escapes only": body_check(b'{"a":"' + b"\\u4e2d" * (10 * MIB) + b'"}'),
            "numbers": body_check(b"[" + b"1," * 499_000 + b"1]"),
        },
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
