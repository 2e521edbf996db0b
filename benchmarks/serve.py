"""`keye serve` under load: what HTTP costs, how soon the first token comes, whether it stays up.

    python -m benchmarks.serve throughput --json   # tokens a second over HTTP against AsyncEngine in process
    python -m benchmarks.serve first-token --json  # a warm question about a video seen before
    python -m benchmarks.serve indexed --json      # the same about an index of it
    python -m benchmarks.serve health --videos 20 --json  # /health while long videos are decoded
    python -m benchmarks.serve soak --minutes 5 --clients 64 --json  # mixed media, random disconnects

keye-nano in a server process of its own; clients are in this one. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import httpx

STREAMS, PORT = 32, 8991
URL = f"http://127.0.0.1:{PORT}"
DEMO = Path(__file__).parents[1] / "src/keye/assets/demo.mp4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["throughput", "first-token", "indexed", "health", "soak"])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument(
        "--warm", type=float, default=150, help="seconds before the soak: memory grows until caches are full"
    )
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each reply")
    parser.add_argument("--threads", type=int, default=1, help="threads of the model")
    parser.add_argument("--json", action="store_true", help="(the output is always JSON)")
    parser.add_argument("--videos", type=int, default=20, help="videos that are decoded at once")
    options = parser.parse_args()
    measures = {
        "throughput": throughput, "first-token": first_token, "indexed": indexed, "health": health, "soak": soak,
    }  # fmt: skip
    measure = measures[options.what]
    print(json.dumps({"what": options.what, **measure(options)}))


@contextmanager
def server(options: argparse.Namespace) -> Any:
    """A running `keye serve`, ended by SIGTERM."""
    command = [sys.executable, "-m", "keye", "serve", "--port", str(PORT), "--threads", str(options.threads)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                httpx.get(f"{URL}/health")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait(30)


def body(number: int, *, tokens: int = 64, ignore_eos: bool = True) -> dict[str, Any]:
    """A short question in words, each its own. Special tokens are written out, so that every token is an event."""
    return {
        "model": "nano", "stream": True, "max_tokens": tokens, "ignore_eos": ignore_eos, "skip_special_tokens": False,
        "messages": [{"role": "user", "content": f"question {number}: what is seen?"}],
    }  # fmt: skip


async def stream(client: httpx.AsyncClient, request: dict[str, Any]) -> int:
    """Events with a choice in them."""
    count = 0
    async with client.stream("POST", f"{URL}/v1/chat/completions", json=request) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            count += '"delta"' in line
    return count


def throughput(options: argparse.Namespace) -> dict[str, Any]:
    """Both ways in turn, three times; the middle ratio."""

    async def over_http() -> float:
        limits = httpx.Limits(max_connections=STREAMS)
        async with httpx.AsyncClient(limits=limits, timeout=120) as client:
            await asyncio.gather(*(stream(client, body(i, tokens=4)) for i in range(STREAMS)))
            begin = time.perf_counter()
            events = await asyncio.gather(*(stream(client, body(i, tokens=options.tokens)) for i in range(STREAMS)))
            seconds = time.perf_counter() - begin
            assert min(events) >= options.tokens, "a token came without an event of its own"
            return STREAMS * options.tokens / seconds

    rates, cpu = [], resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(3):
        command = [sys.executable, __file__, "in-process", str(options.threads), str(options.tokens)]
        inside = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        with server(options):
            begin = resource.getrusage(resource.RUSAGE_SELF)
            rate = asyncio.run(over_http())
            cpu = resource.getrusage(resource.RUSAGE_SELF)
        rates.append((rate, inside, cpu.ru_utime + cpu.ru_stime - begin.ru_utime - begin.ru_stime))
    ratios = sorted(rate / inside for rate, inside, _ in rates)
    return {
        "streams": STREAMS, "tokens_each": options.tokens,
        "http_tokens_per_second": round(max(rate for rate, _, _ in rates), 1),
        "in_process_tokens_per_second": round(max(inside for _, inside, _ in rates), 1),
        "ratio": round(ratios[1], 3), "ratios": [round(ratio, 3) for ratio in ratios],
        "client_cpu_seconds": round(statistics.median(seconds for _, _, seconds in rates), 2),
    }  # fmt: skip


def in_process(threads: int, each: int) -> float:
    """Tokens a second of the same requests on AsyncEngine, all there at once."""
    import torch

    import keye
    from keye.engine.async_engine import AsyncEngine

    torch.set_num_threads(threads)
    model = keye.load("nano")
    engine = AsyncEngine(model.engine)

    async def run_stream(number: int, tokens: int) -> None:
        request = replace(
            model.request(body(number)["messages"], max_tokens=tokens, ignore_eos=True), skip_special=False
        )
        async for _ in engine.run(request):
            pass

    async def every() -> float:
        await asyncio.gather(*(run_stream(i, 4) for i in range(STREAMS)))
        begin = time.perf_counter()
        await asyncio.gather(*(run_stream(i, each) for i in range(STREAMS)))
        return STREAMS * each / (time.perf_counter() - begin)

    engine.start()
    try:
        return asyncio.run(every())
    finally:
        engine.close()


def first_token(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds to the first event with text, of questions about an uploaded video that was asked about before."""
    with server(options), httpx.Client(timeout=60) as client:
        uploaded = client.post(f"{URL}/v1/files", files={"file": ("demo.mp4", DEMO.read_bytes())}).json()
        return first_tokens(client, uploaded["id"])


def indexed(options: argparse.Namespace) -> dict[str, Any]:
    """The same about an index of the video."""
    with server(options), httpx.Client(timeout=60) as client:
        uploaded = client.post(f"{URL}/v1/files", files={"file": ("demo.mp4", DEMO.read_bytes())}).json()
        result = client.post(f"{URL}/v1/indexes", json={"file_id": uploaded["id"]}).json()
        return {"index_tokens": result["keye"]["tokens"], "build_seconds": result["keye"]["seconds"],
                **first_tokens(client, result["id"])}  # fmt: skip


def first_tokens(client: httpx.Client, medium: str) -> dict[str, Any]:
    """Milliseconds to the first text of twelve questions, one after another."""
    times = []
    for number in range(12):
        content = [
            {"type": "file", "file": {"file_id": medium}},
            {"type": "text", "text": f"when is the {('red circle', 'cyan triangle', 'star')[number % 3]} visible?"},
        ]
        request = {"model": "nano", "stream": True, "messages": [{"role": "user", "content": content}]}
        begin = time.perf_counter()
        with client.stream("POST", f"{URL}/v1/chat/completions", json=request) as response:
            for line in response.iter_lines():
                if '"content":"' in line and '"content":""' not in line:
                    times.append(1000 * (time.perf_counter() - begin))
                    break
    warm = sorted(times[3:])
    return {"first_ms": round(times[0], 1), "warm_ms": round(warm[len(warm) // 2], 1), "slowest_ms": round(warm[-1], 1)}


def health(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds that /health takes, asked again and again while videos of ten minutes are decoded for as many
    requests, each cut elsewhere so that none is known before."""
    times: list[float] = []
    done = threading.Event()

    def probe() -> None:
        """In a thread, so that the clients of the videos do not stand in its way."""
        with httpx.Client(timeout=60) as client:
            client.get(f"{URL}/health").raise_for_status()
            while not done.wait(0.02):
                start = time.perf_counter()
                client.get(f"{URL}/health").raise_for_status()
                times.append(1000 * (time.perf_counter() - start))

    async def ask(client: httpx.AsyncClient, file_id: str, number: int) -> int:
        video = {"url": file_id, "max_frames": 256, "max_pixels": 28 * 28 * 4, "video_start": float(number)}
        content = [{"type": "video_url", "video_url": video}, {"type": "text", "text": "what is seen?"}]
        request = {"max_tokens": 1, "messages": [{"role": "user", "content": content}]}
        return (await client.post(f"{URL}/v1/chat/completions", json=request)).status_code

    async def every(file_id: str) -> list[int]:
        async with httpx.AsyncClient(timeout=600) as client:
            return await asyncio.gather(*(ask(client, file_id, number) for number in range(options.videos)))

    with tempfile.TemporaryDirectory() as folder, server(options):
        path = Path(folder) / "long.mp4"
        write_long(path)
        uploaded = httpx.post(f"{URL}/v1/files", files={"file": path.open("rb")}, timeout=120).json()
        probing, begin = threading.Thread(target=probe), time.perf_counter()
        probing.start()
        try:
            statuses = asyncio.run(every(uploaded["id"]))
        finally:
            done.set()
            probing.join()
        seconds = time.perf_counter() - begin
    times.sort()
    return {
        "videos": options.videos, "statuses": dict(Counter(statuses)), "seconds": round(seconds, 1),
        "asked": len(times), "median_ms": round(times[len(times) // 2], 1),
        "p99_ms": round(times[len(times) * 99 // 100], 1), "slowest_ms": round(times[-1], 1),
        "over_100_ms": sum(item > 100 for item in times),
    }  # fmt: skip


def write_long(path: Path, seconds: int = 600, size: tuple[int, int] = (640, 360)) -> None:
    """Moving rectangles, 25 frames a second, H.264."""
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(25 * seconds):
            pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
            place = number * 3 % (size[0] - 80)
            pixels[100:200, place : place + 80] = (number % 256, 200, 50)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Clients that ask about words, pictures and a video, and often leave early."""
    counts: Counter[str] = Counter()
    picture = "data:image/png;base64," + base64.b64encode(_png()).decode()

    async def client_of(number: int, end: float, http: httpx.AsyncClient, file_id: str) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            kind = rng.choice(["text", "image", "video"])
            content: list[dict[str, Any]] = [{"type": "text", "text": f"what is seen? {rng.randint(0, 50)}"}]
            if kind == "image":
                content.insert(0, {"type": "image_url", "image_url": {"url": picture}})
            elif kind == "video":
                content.insert(
                    0, {"type": "video_url", "video_url": {"url": file_id, "max_frames": rng.randint(2, 32)}}
                )
            request = {**body(0, tokens=rng.randint(1, 64)), "messages": [{"role": "user", "content": content}]}
            leave = rng.random() < 0.3
            try:
                async with http.stream("POST", f"{URL}/v1/chat/completions", json=request) as response:
                    if response.status_code != 200:
                        counts[str(response.status_code)] += 1
                        await asyncio.sleep(0.2)
                        continue
                    async for line in response.aiter_lines():
                        if '"error"' in line:
                            counts["error event"] += 1
                        if leave and rng.random() < 0.1:
                            counts["left"] += 1
                            break
                    else:
                        counts["ok"] += 1
            except httpx.TransportError as error:
                counts[type(error).__name__] += 1

    sizes: list[int] = []

    async def watch(pid: int, end: float) -> None:
        while time.monotonic() < end:
            sizes.append(round(_rss(pid) / 2**20))
            await asyncio.sleep(15)

    async def everyone(file_id: str, seconds: float, pid: int) -> None:
        limits = httpx.Limits(max_connections=options.clients)
        async with httpx.AsyncClient(limits=limits, timeout=120) as http:
            end = time.monotonic() + seconds
            clients = (client_of(n, end, http, file_id) for n in range(options.clients))
            await asyncio.gather(watch(pid, end), *clients)

    with server(options) as process:
        uploaded = httpx.post(f"{URL}/v1/files", files={"file": ("demo.mp4", DEMO.read_bytes())}, timeout=60).json()
        asyncio.run(everyone(uploaded["id"], options.warm, process.pid))
        warm, counts_warm = _rss(process.pid), dict(counts)
        counts.clear()
        asyncio.run(everyone(uploaded["id"], 60 * options.minutes, process.pid))
        time.sleep(2)
        late, metrics = _rss(process.pid), httpx.get(f"{URL}/metrics").text
    usage = {
        line.split()[0]: float(line.split()[1]) for line in metrics.splitlines() if "bytes_" in line and line[0] != "#"
    }
    return {
        "clients": options.clients, "minutes": options.minutes, "outcomes": dict(counts), "while_warming": counts_warm,
        "rss_mib_warm": round(warm / 2**20), "rss_mib_end": round(late / 2**20), "growth": round(late / warm - 1, 3),
        "rss_mib_every_15_s": sizes,
        "ledger_at_the_end": usage,
    }  # fmt: skip


def _rss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS")


def _png() -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (112, 112), "navy").save(out, "PNG")
    return out.getvalue()


if __name__ == "__main__":
    if sys.argv[1:2] == ["in-process"]:
        print(in_process(int(sys.argv[2]), int(sys.argv[3])))
    else:
        main()
