"""Frames of many kinds of video files against ffmpeg's own: the right picture at the right time.

Makes files with ffmpeg (5.1 or newer, needed on the path) in a temporary folder: codecs, containers, joins, trims,
display matrices, variable rates, clock jumps, damage. Reads every frame with keye, all of them and every seventh, and
compares picture and time, on the container's clock, with what `ffmpeg -fps_mode passthrough` gives. Prints JSON. Run:
    python -m benchmarks.media_frames [--only TEXT] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.media_files import CASES, Folder
from keye.errors import KeyeError
from keye.media.info import VideoInfo
from keye.media.plan import VideoPlan
from keye.media.source.fetch import fetch_source
from keye.media.video import VideoReader

#: Largest difference of the mean of a block of pixels: decoders and scalers round differently, pictures differ more.
PICTURE_TOLERANCE = 24.0
#: Seconds: containers of whole milliseconds round.
TIME_TOLERANCE = 0.0021
_BLOCKS = (8, 20)
_TIMES = re.compile(r"n: *\d+ pts: *\S+ +pts_time:(\S+)")


@dataclass(frozen=True)
class Frames:
    """Times in seconds on the container's clock, and block means [frames, rows, columns, 3] of the pictures."""

    times: list[float]
    pictures: NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the cases with this text in their name")
    parser.add_argument("--keep", type=Path, help="make the files here and leave them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Folder(options.keep or Path(temporary))
        names = [name for name in CASES if options.only in name]
        misses = {name: faults for name in names if (faults := check(CASES[name](folder, name)))}
    result = {"benchmark": "media_frames", "files": len(names), "right": len(names) - len(misses), "misses": misses}
    print(json.dumps(result, indent=2))


def check(path: Path) -> list[str]:
    """What is wrong with keye's frames of a file; nothing where they are ffmpeg's."""
    try:
        with warnings.catch_warnings(), VideoReader(fetch_source(path)) as reader:
            warnings.simplefilter("ignore")
            info = reader.info
            expected = ffmpeg_frames(path, info.width, info.height)
            every = range(info.frame_count)
            faults = [*differences("", expected, read(reader, info, every))]
            if not faults:
                some = [*every[::7], *every[-1:]] if info.frame_count % 7 != 1 else [*every[::7]]
                part = Frames([expected.times[i] for i in some], expected.pictures[some])
                faults = [*differences("of every seventh ", part, read(reader, info, some))]
    except KeyeError as error:
        return [str(error)]
    return faults


def read(reader: Any, info: VideoInfo, indices: Any) -> Frames:
    """keye's frames `indices` of a file."""
    plan = VideoPlan.of(info, indices, (info.height, info.width), tokens_per_frame=0, rate=1)
    pictures = [block_means(frame) for frame in reader.frames(plan)]
    return Frames(list(plan.timestamps), np.stack(pictures))


def ffmpeg_frames(path: Path, width: int, height: int) -> Frames:
    """ffmpeg's frames of a file, scaled to a size."""
    command = ["ffmpeg", "-hide_banner", "-nostats", "-i", str(path), "-an", "-sn", "-dn", "-fps_mode", "passthrough",
               "-vf", f"showinfo,scale={width}:{height}", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]  # fmt: skip
    # Where there is sound it takes part in the clock.
    run = subprocess.run([*command, "-map", "0:a", "-f", "null", "-"], capture_output=True, check=False)
    if run.returncode:
        run = subprocess.run(command, capture_output=True, check=False)
    times = [float(time) for time in _TIMES.findall(run.stderr.decode(errors="replace"))]
    frames = np.frombuffer(run.stdout, np.uint8).reshape(-1, height, width, 3)
    if len(frames) != len(times):
        raise RuntimeError(f"ffmpeg names {len(times)} times and writes {len(frames)} frames of {path.name}")
    # Of times that do not ascend keye makes some that do.
    times = list(np.maximum.accumulate(times))
    return Frames(times, np.stack([block_means(frame) for frame in frames]))


def block_means(frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Means of a grid of blocks, float32 [rows, columns, 3]."""
    rows = np.array_split(frame.astype(np.float32), _BLOCKS[0], axis=0)
    return np.stack([[b.mean((0, 1)) for b in np.array_split(row, _BLOCKS[1], axis=1)] for row in rows])


def differences(which: str, expected: Frames, got: Frames) -> Iterator[str]:
    """Sentences on what differs."""
    if len(got.times) != len(expected.times):
        yield f"{len(got.times)} frames {which}instead of {len(expected.times)}"
    count = min(len(got.times), len(expected.times))
    late = [i for i in range(count) if abs(got.times[i] - expected.times[i]) > TIME_TOLERANCE]
    if late:
        first = late[0]
        yield (
            f"{len(late)} frames {which}at other times, the first {first}: "
            f"{got.times[first]:.4f} instead of {expected.times[first]:.4f}"
        )
    gaps = np.abs(got.pictures[:count] - expected.pictures[:count]).max((1, 2, 3))
    other = np.flatnonzero(gaps > PICTURE_TOLERANCE)
    if len(other):
        yield f"{len(other)} frames {which}show another picture: {other[:8].tolist()}"


if __name__ == "__main__":
    main()
