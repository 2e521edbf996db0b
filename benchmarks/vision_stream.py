"""Encoding a long video while it is decoded, against decoding all of it first: peak memory and time.

Makes a video of `--frames` sampled frames (2 a second) of FrameForge pictures. Each way runs in a process of its own;
`peak_mib` is its peak resident memory less that of loading the model. `whole` makes patches of all frames, then
encodes; `stream` decodes in a worker and encodes groups as they come, forgetting each; `decode` only decodes. Prints
JSON. Run:
    python benchmarks/vision_stream.py --json [--model nano] [--frames 7200]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import av
import torch

import keye
from keye.config.media import MediaOptions
from keye.data import frameforge
from keye.engine.vision import VisionJob
from keye.media.processor import MediaItem
from keye.media.source.fetch import fetch_source


def write_video(path: Path, frames: int) -> None:
    """`frames` pictures of one clip in a circle, two a second, 112 x 112."""
    pictures = frameforge.render(frameforge.make_clip(5, frames=32, split="train"))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 112, 112, "yuv420p"
        for i in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pictures[i % 32], format="rgb24")))
        container.mux(stream.encode(None))


def run_stream(model: keye.Keye, item: MediaItem) -> None:
    job = VisionJob(model.model, [item])
    while not job.done:
        job.wait()
        job.step(4096)
        job.forget(job.ready)
    job.close()


def run_whole(model: keye.Keye, item: MediaItem) -> None:
    pixels, grids = item.vision.tensors()
    with torch.inference_mode():
        model.model.encode_vision(pixels, grids)


def run_decode(model: keye.Keye, item: MediaItem) -> None:
    reader = item.pixels.open()
    for _ in range(len(item.grid_thw)):
        reader.take(1)
    reader.close()


WAYS: dict[str, Callable[[keye.Keye, MediaItem], None]] = {
    "stream": run_stream, "whole": run_whole, "decode": run_decode
}  # fmt: skip


def measure(way: str, name: str, path: str, frames: int, out: Connection) -> None:
    """Runs one way and sends its figures."""
    model = keye.load(name)
    pixels = 112 * 112
    options = MediaOptions(
        nframes=frames, max_pixels=pixels, min_pixels=pixels, video_total_pixels=frames * pixels
    )  # fmt: skip
    item = model.processor.video_stream(fetch_source(path), options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    WAYS[way](model, item)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    out.send({"seconds": round(seconds, 2), "peak_mib": round(peak / 1024, 1), "frames": item.frame_count})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="on one line")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--frames", type=int, default=7200)
    arguments = parser.parse_args()
    context, result = multiprocessing.get_context("spawn"), {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.mp4"
        write_video(path, arguments.frames)
        for way in WAYS:
            here, there = context.Pipe()
            process = context.Process(
                target=measure, args=(way, arguments.model, str(path), arguments.frames, there)
            )  # fmt: skip
            process.start()
            result[way] = here.recv()
            process.join()
    text = {"frames": arguments.frames, "threads": torch.get_num_threads(), **result}
    print(json.dumps(text, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
