"""The decode service against a reader in this process: 200 short videos to planned frames.

    python benchmarks/decode_service.py
    python benchmarks/decode_service.py --address ray --rounds 3

Writes moving rectangles in H.264 (a few different files, copied), and decodes all of them in each round in three ways
by turns: here, one after another, as a request does; by a service of one worker; by one of two. `wall` is seconds of
the videos alone, the service being open; `cpu` seconds of processor time of this process and all below it, the start
of the service (`start_cpu`, measured with no work) taken off. Each figure is the median of the rounds, with the
lowest and highest. `speedup` is wall here over wall of two workers, round by round; `overhead_wall` and
`overhead_cpu` are those of one worker over those here, less one. On a machine that others use, the first two need
free processors to mean something; `overhead_cpu` depends on them less. With `--address ray` the service's workers are
those of the cluster, in place of two; processor time on a cluster is not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np

from keye.cluster.decode_queue import Priority
from keye.cluster.decode_work import VideoWork
from keye.cluster.service import DecodeService, open_service
from keye.config import ProcessorConfig
from keye.config.media import DEFAULTS
from keye.media.processor import Processor
from keye.media.source.fetch import Source, fetch_source

CONFIG = ProcessorConfig.of("2.0")
DIFFERENT = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=8, help="length of each video")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--address", default="local:2", help="the service that is compared with the reader here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="keye-decode-") as folder:
        sources = write_videos(Path(folder), options.videos, options.seconds)
        print(json.dumps(measure(sources, options), indent=2))


def measure(sources: list[Source], options: argparse.Namespace) -> dict[str, Any]:
    ways: dict[str, Callable[[], tuple[float, float, int]]] = {
        "here": lambda: timed_here(sources),
        "one_worker": lambda: timed_service(sources, "local:1"),
        "service": lambda: timed_service(sources, options.address),
    }
    start_cpu = {address: cpu_of(lambda a=address: open_service(a).close()) for address in ("local:1", options.address)}
    walls: dict[str, list[float]] = {name: [] for name in ways}
    cpus: dict[str, list[float]] = {name: [] for name in ways}
    frames = set()
    for _ in range(options.rounds):
        for name, run in ways.items():
            wall, cpu, count = run()
            address = {"one_worker": "local:1", "service": options.address}.get(name)
            walls[name].append(wall)
            cpus[name].append(cpu - start_cpu.get(address or "", 0.0))
            frames.add(count)
    assert len(frames) == 1, "all ways give equally many frames"
    return {
        "videos": len(sources), "frames": frames.pop(), "processors": len(os.sched_getaffinity(0)),
        "address": options.address, "load_average": os.getloadavg()[0], "start_cpu": start_cpu,
        "wall": {name: spread(values) for name, values in walls.items()},
        "cpu": {name: spread(values) for name, values in cpus.items()},
        "speedup": spread([a / b for a, b in zip(walls["here"], walls["service"], strict=True)]),
        "overhead_wall": spread([b / a - 1 for a, b in zip(walls["here"], walls["one_worker"], strict=True)]),
        "overhead_cpu": spread([b / a - 1 for a, b in zip(cpus["here"], cpus["one_worker"], strict=True)]),
    }  # fmt: skip


def timed_here(sources: list[Source]) -> tuple[float, float, int]:
    """Seconds, processor seconds and frames of one reader in this process."""
    count = 0
    cpu, begin = processor_seconds(), time.perf_counter()
    for source in sources:
        with Processor(CONFIG).decode_video(source, DEFAULTS) as (_, frames):
            count += sum(frame.shape[2] == 3 for frame in frames)
    return time.perf_counter() - begin, processor_seconds() - cpu, count


def timed_service(sources: list[Source], address: str) -> tuple[float, float, int]:
    """The same of a service; its start counts in the processor time alone."""
    cpu = processor_seconds()
    with open_service(address) as service:
        begin = time.perf_counter()
        count = decode_all(service, sources)
        wall = time.perf_counter() - begin
    return wall, processor_seconds() - cpu, count


def decode_all(service: DecodeService, sources: list[Source]) -> int:
    """Frames of all videos, taken in order while more are submitted."""
    count, waiting = 0, []
    for source in sources:
        waiting.append(service.submit(VideoWork(source, CONFIG), Priority.BATCH))
        if len(waiting) == 16:
            count += len(waiting.pop(0).result().frames)
    return count + sum(len(result.result().frames) for result in waiting)


def cpu_of(run: Callable[[], None]) -> float:
    before = processor_seconds()
    run()
    return processor_seconds() - before


def processor_seconds() -> float:
    """Of this process and of all below it that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def spread(values: list[float]) -> dict[str, float]:
    return {name: round(f(values), 3) for name, f in (("median", statistics.median), ("low", min), ("high", max))}


def write_videos(folder: Path, count: int, seconds: int) -> list[Source]:
    """`count` files of 640x360 at 25 frames a second."""
    first = [write_video(folder / f"{number}.mp4", seconds, number) for number in range(min(count, DIFFERENT))]
    copies = [Path(shutil.copyfile(first[number % DIFFERENT], folder / f"{number}.mp4"))
              for number in range(len(first), count)]  # fmt: skip
    return [fetch_source(path) for path in [*first, *copies]]


def write_video(path: Path, seconds: int, seed: int) -> Path:
    generator = np.random.default_rng(seed)
    background = generator.integers(0, 255, (360, 640, 3), dtype=np.uint8) // 4 + 96
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for number in range(25 * seconds):
            picture = background.copy()
            picture[100:200, (number * 4) % 500 : (number * 4) % 500 + 100] = (200, 40 + seed, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


if __name__ == "__main__":
    main()
