"""What sampling a video costs: CPU and memory of the decode worker against a plain sequential PyAV decode.

Makes its own 1080p30 clip, samples 2 frames per second at 448 pixels wide, prints JSON. Run:
    python benchmarks/video_decode.py [--seconds 60] [--threads 1] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from keye.config import ProcessorConfig
from keye.media.source.fetch import fetch_source
from keye.media.video import DecodeLimits, VideoReader

WIDTH, HEIGHT, FPS = 1920, 1080, 30
#: 448 x 252 pixels, 16 x 9 tokens, is the only size this configuration can give a 16:9 frame.
TOKENS = 144
_PLAIN = """
import sys, av
with av.open(sys.argv[1]) as container:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = int(sys.argv[2])
    print(sum(1 for _ in container.decode(stream)))
"""


def scene(index: int, texture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frame `index`: a detailed background that pans, noise, a moving box and the index as a 16-bit bar code."""
    frame = np.roll(texture, (index * 2, index * 5), axis=(0, 1)).copy()
    rng = np.random.default_rng(index)
    y, x = index * 7 % (HEIGHT - 300), index * 11 % (WIDTH - 300)
    frame[y : y + 300, x : x + 300] = rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)
    for bit in range(16):
        frame[:64, bit * 64 : bit * 64 + 64] = 255 if index >> bit & 1 else 0
    return frame


def read_code(frame: NDArray[np.uint8]) -> int:
    """The bar code of a frame at any scale."""
    scale = frame.shape[1] / WIDTH
    return sum(int(frame[int(32 * scale), int((bit * 64 + 32) * scale)].mean() > 127) << bit for bit in range(16))


def write_clip(path: Path, seconds: float) -> None:
    """H.264 with x264's own settings (B-frames, keyframes up to 250 apart), about 8 Mbit/s."""
    coarse = np.random.default_rng(0).integers(0, 256, (HEIGHT // 30, WIDTH // 30, 3), dtype=np.uint8)
    texture = np.repeat(np.repeat(coarse, 30, axis=0), 30, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "b": "8M", "bf": "3"})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(int(seconds * FPS)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(scene(index, texture), format="rgb24")))
        container.mux(stream.encode())


def children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def plain(path: Path, threads: int) -> float:
    """CPU seconds of a process that decodes every frame and keeps none."""
    before = children_cpu()
    subprocess.run([sys.executable, "-c", _PLAIN, str(path), str(threads)], check=True, stdout=subprocess.DEVNULL)
    return children_cpu() - before


def sampled(path: Path, threads: int) -> dict[str, float]:
    """CPU seconds (worker and this side), peak RSS of the worker and right frames of one sampling run."""
    config = ProcessorConfig(video_min_tokens=TOKENS, video_max_tokens=TOKENS, fps=2.0)
    before, before_own = children_cpu(), own_cpu()
    with VideoReader(fetch_source(path), DecodeLimits(threads=threads)) as reader:
        plan = reader.plan(config)
        frames = reader.read(plan)
        status = Path(f"/proc/{reader.worker.process.pid}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    right = sum(read_code(frame) == index for frame, index in zip(frames, plan.frame_indices, strict=True))
    return {
        "worker_cpu_s": children_cpu() - before,
        "parent_cpu_s": own_cpu() - before_own,
        "worker_peak_mb": peak / 1024,
        "width": plan.width,
        "height": plan.height,
        "frames": plan.frames,
        "right_frames": right,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clip", type=Path, help="keep the clip here and use it again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clip = options.clip or Path(folder) / "clip.mp4"
        if not clip.exists():
            write_clip(clip, options.seconds)
        # Alternating, so that a change of the machine's load meets both.
        runs = [(plain(clip, options.threads), sampled(clip, options.threads)) for _ in range(options.repeats)]
    plain_cpu = min(run[0] for run in runs)
    best = min((run[1] for run in runs), key=lambda run: run["worker_cpu_s"] + run["parent_cpu_s"])
    total = best["worker_cpu_s"] + best["parent_cpu_s"]
    result: dict[str, Any] = {
        "benchmark": "video_decode",
        "clip": f"{WIDTH}x{HEIGHT}p{FPS} {options.seconds:g} s H.264",
        "threads": options.threads,
        "plain_decode_cpu_s": plain_cpu,
        "sampling_cpu_s": total,
        "ratio": total / plain_cpu,
        **best,
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
    }
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}, indent=2))


if __name__ == "__main__":
    main()
