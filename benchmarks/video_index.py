"""Asking an index of a video against asking the video: 10 minutes of 360p, sampled at 2 frames a second, keye-nano.

    python benchmarks/video_index.py --json

Writes a synthetic video (moving rectangles, H.264), indexes it once, and asks one question of one token of both in
turn, in this process, one thread. `ask_index` is the wall time of `model.ask` with the index, which opens the file and
checks it each time; `open` is that part alone. `ask_video` is media (decoding and resizing) and prefill. Medians of the
repeats, in seconds. `ratio` is the first over the second; the target is at most 1/50. `ask_index_fresh` is the first
question in another process, the model loaded, after the kernel was asked to forget the file: what a reboot leaves.
keye-nano holds 16,384 tokens, so that frames have few pixels; the JSON says what was used.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import av
import numpy as np
import torch

import keye
from keye import Keye
from keye.media.source.fetch import fetch_source
from keye.sessions.video_index import open_video_index

#: Pixels that a visual token stands for.
TOKEN_PIXELS = 28 * 28
SECONDS, SIZE, QUESTION = 600, (640, 360), "at what times is the red circle shown?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object; this is the only form")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="length of the video")
    parser.add_argument("--native-fps", type=int, default=25, help="frames a second of the file")
    parser.add_argument("--frame-tokens", type=int, default=10, help="most visual tokens of a frame")
    parser.add_argument("--kv", default="auto", help="format of keys and values")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fresh", type=Path, help=argparse.SUPPRESS)  # the child process: asks this index once
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.fresh is not None:
        print(json.dumps(ask_fresh(options.fresh)))
        return
    with tempfile.TemporaryDirectory(prefix="keye-index-") as folder:
        print(json.dumps(measure(Path(folder), options), indent=2))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Indexes the video and asks both."""
    video, index = folder / "video.mp4", folder / "video.keye"
    write_video(video, options.seconds, options.native_fps)
    model = keye.load("nano", kv=options.kv)
    pixels, frames = options.frame_tokens * TOKEN_PIXELS, 2 * options.seconds
    sampling = {"fps": 2, "max_frames": frames, "max_pixels": pixels, "video_total_pixels": frames * pixels}
    info = model.index(video, index, media_options=sampling)
    asked_video = [
        cold(model).ask(video, QUESTION, media_options=sampling, max_tokens=1).seconds for _ in range(options.repeats)
    ]
    video_times = [seconds["media"] + seconds["prefill"] for seconds in asked_video]
    source = fetch_source(index)
    index_times = times_of(lambda: model.ask(index, QUESTION, max_tokens=1), options.repeats)
    open_times = times_of(lambda: open_video_index(model.runtime, source), options.repeats)
    drop_cache(index)
    command = [sys.executable, __file__, "--fresh", str(index)]
    fresh = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ask_index, ask_video = statistics.median(index_times), statistics.median(video_times)
    return {
        "video": {"seconds": options.seconds, "size": SIZE, "native_fps": options.native_fps,
                  "megabytes": round(video.stat().st_size / 1e6, 1)},
        "frames": info.plan["frames"],
        "frame_size": [info.plan["width"], info.plan["height"]],
        "tokens_per_frame": info.plan["tokens_per_frame"],
        "tokens": info.tokens,
        "kv": info.kv,
        "index_seconds": dict(info.seconds),
        "index_megabytes": round(info.bytes / 1e6, 1),
        "ask_video": round(ask_video, 3),
        "ask_video_media": round(statistics.median(item["media"] for item in asked_video), 3),
        "ask_index": round(ask_index, 4),
        "open": round(statistics.median(open_times), 4),
        "ask_index_fresh": fresh["seconds"],
        "ratio": round(ask_index / ask_video, 5),
        "speedup": round(ask_video / ask_index, 1),
        "target_ratio": 0.02,
        "same_text": model.ask(index, QUESTION).text == model.ask(video, QUESTION, media_options=sampling).text,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def cold(model: Keye) -> Keye:
    """The model with nothing left in its caches."""
    model.clear_caches()
    return model


def times_of(run: Callable[[], object], repeats: int) -> list[float]:
    """Wall times; one call before is not counted."""
    run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return times


def ask_fresh(index: Path) -> dict[str, float]:
    """One question in this process; the fingerprint of the model, taken once in a process, is part of it."""
    model = keye.load("nano")
    begin = time.perf_counter()
    model.ask(index, QUESTION, max_tokens=1)
    return {"seconds": round(time.perf_counter() - begin, 4)}


def drop_cache(file: Path) -> None:
    """Asks the kernel to forget the file's pages."""
    with file.open("rb") as handle:
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_video(path: Path, seconds: int, rate: int) -> None:
    """Rectangles that move over a background with some texture."""
    random = np.random.default_rng(0)
    background = random.integers(60, 200, (SIZE[1] // 8, SIZE[0] // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    colours = random.integers(0, 256, (5, 3), dtype=np.uint8)
    speeds, starts = random.uniform(10, 60, (5, 2)), random.uniform(0, 300, (5, 2))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "23", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(seconds * rate):
            picture = background.copy()
            for colour, speed, start in zip(colours, speeds, starts, strict=True):
                x, y = (int(v) for v in (start + speed * number / rate) % (SIZE[0] - 80, SIZE[1] - 60))
                picture[y : y + 60, x : x + 80] = colour
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


if __name__ == "__main__":
    main()
