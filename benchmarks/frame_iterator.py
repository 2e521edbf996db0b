"""The frame iterator over a long video: time against a plain sequential PyAV decode, and memory over its length.

Makes its own 360p H.264 clip (24 fps, a keyframe every 10 s), samples 2 frames per second at 448 wide, one
thread, prints JSON.
`memory_late_over_early` compares memory in the last tenth with the second tenth. Run:
    python benchmarks/frame_iterator.py [--minutes 60] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.media.source.fetch import fetch_source
from keye.media.video import DecodeLimits, VideoReader

WIDTH, HEIGHT, FPS, SAMPLED = 640, 360, 24, 2
#: 448 x 252 pixels a frame, and enough budget that the whole length is sampled.
CONFIG = ProcessorConfig(video_min_tokens=144, video_max_tokens=144, video_total_tokens=10**8)


def write_clip(path: Path, minutes: float) -> None:
    """A texture that pans, with a box that moves and the grain of a camera, a few hundred kbit/s."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 210, (HEIGHT // 12, WIDTH // 8, 3), dtype=np.uint8)
    texture = np.kron(coarse, np.ones((12, 8, 1), dtype=np.uint8))
    grain = rng.integers(-8, 9, (4, HEIGHT, WIDTH, 1), dtype=np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "23"})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = 10 * FPS
        for i in range(int(minutes * 60 * FPS)):
            frame = (np.roll(texture, i, axis=1) + np.roll(grain[i % 4], i * 37, axis=1)).astype(np.uint8)
            frame[i % 260 : i % 260 + 80, 100:180] = i % 256
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def plain_decode(path: Path) -> float:
    """Seconds of a loop over all frames."""
    begin = time.perf_counter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = 1
        for _ in container.decode(stream):
            pass
    return time.perf_counter() - begin


def iterate(path: Path) -> dict[str, Any]:
    """Seconds of planning and reading all sampled frames, and memory of this process and its worker on the way."""
    begin = time.perf_counter()
    memory = []
    with VideoReader(fetch_source(path), DecodeLimits(threads=1)) as reader:
        plan = reader.plan(CONFIG, MediaOptions(fps=SAMPLED))
        planned = time.perf_counter()
        for i, _ in enumerate(reader.frames(plan)):
            if i % max(plan.frames // 50, 1) == 0:
                memory.append((resident(os.getpid()), resident(reader.worker.process.pid)))
    seconds = time.perf_counter() - begin
    tenth = max(len(memory) // 10, 1)
    own, worker = (
        max(m[k] for m in memory[-tenth:]) / max(m[k] for m in memory[tenth : 2 * tenth] or memory) for k in (0, 1)
    )
    return {
        "frames": plan.frames, "width": plan.width, "height": plan.height, "seconds": seconds,
        "planning_seconds": planned - begin, "worker_mb": max(m[1] for m in memory) / 1e6,
        "memory_late_over_early": max(own, worker),
    }  # fmt: skip


def resident(pid: int) -> int:
    """Resident memory of a process in bytes (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_clip(path, options.minutes)
        megabits = path.stat().st_size * 8e-6 / (options.minutes * 60)
        runs = [(plain_decode(path), iterate(path)) for _ in range(options.repeats)]
    plain = min(seconds for seconds, _ in runs)
    best = min((run for _, run in runs), key=lambda run: run["seconds"])
    print(json.dumps({
        "minutes": options.minutes, "mbit_per_second": round(megabits, 2),
        **{k: round(v, 3) for k, v in best.items()}, "plain_seconds": round(plain, 3),
        "ratio": round(best["seconds"] / plain, 3), "pyav": av.__version__, "machine": platform.machine(),
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
