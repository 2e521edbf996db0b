"""Hard cuts that `keye.find_scenes` finds, against authored ones, and what finding them costs.

Three parts, all by default. `formats`: a short film with known cuts in every format of `benchmarks.media_files` that
ffmpeg (5.1 or newer, needed on the path) makes: codecs, containers, trims, joins, variable rates, interlacing, high
dynamic range. `motion`: ten minutes of pans, flashes, textures, fades, shaking, noise, zooms and large objects without
a cut, and a film in which shots of all these kinds follow one another. `cost`: processor time against a plain decode of
the same file. Prints JSON. Run:
    python -m benchmarks.scenes [--part formats|motion|cost] [--only TEXT] [--seconds 30] [--shots 200] [--seed 1]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from benchmarks.media_files import CASES, HEIGHT, WIDTH, Case, Folder, encoded
from benchmarks.scene_clips import MOTIONS, Picture, drawing, pan, photo, still
from keye import find_scenes
from keye.errors import KeyeError
from keye.media.plan import VideoPlan
from keye.media.scenes import SceneScan
from keye.media.source.fetch import fetch_source
from keye.media.video import VideoReader

#: Lengths of shots in frames, again and again; colours of the bar that tells which shot a picture belongs to.
SHOTS = (13, 19, 10, 24, 16)
BITS = 4
SIZE, RATE = (320, 180), 25
#: Mean difference of levels below which two shots that follow one another are hardly distinguished by people either.
VISIBLE = 8.0


class Film(Folder):
    """Makes the cases of `benchmarks.media_files` of a film with cuts; a bar at the bottom tells which shot it is."""

    def pictures(self, first: int, count: int, rate: str) -> list[str]:
        path = self.path / f"film-{first}-{count}.rgb"
        if not path.exists():
            path.write_bytes(b"".join(picture.tobytes() for picture in film(first, count)))
        return ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", rate, "-i", str(path)]


def film(first: int, count: int) -> Iterator[Picture]:
    """Pictures `first`, `first` + 1, ... of a film without end, whose shots move and stand still by turns."""
    number, start = 0, 0
    while start < first + count:
        length = SHOTS[number % len(SHOTS)]
        if start + length > first:
            rng = np.random.default_rng(number)
            shot = list((pan if number % 2 else still)(rng, length, (WIDTH, HEIGHT)))
            for picture in shot[max(first - start, 0) : first + count - start]:
                yield with_bar(picture, number)
        number, start = number + 1, start + length


def with_bar(picture: Picture, number: int) -> Picture:
    """The picture with the lowest bits of a number as black and white columns at its bottom."""
    marked, column = picture.copy(), picture.shape[1] // BITS
    for bit in range(BITS):
        marked[-HEIGHT // 8 :, bit * column : (bit + 1) * column] = 235 if number >> bit & 1 else 16
    return marked


def read_bar(picture: Picture) -> int:
    height, width, _ = picture.shape
    row = picture[height - height // 16]
    return sum(int(row[int((bit + 0.5) * width / BITS)].mean() > 127) << bit for bit in range(BITS))


def check_format(path: Path) -> list[str]:
    """What is wrong with the cuts of a file of `film`: those missing and those too many, in frames. Its own frames tell
    which shot each belongs to."""
    with warnings.catch_warnings(), VideoReader(fetch_source(path)) as reader:
        warnings.simplefilter("ignore")
        info = reader.info
        plan = VideoPlan.of(info, range(info.frame_count), (info.height, info.width), tokens_per_frame=0, rate=1)
        scan = SceneScan(info)
        shots = [read_bar(frame) for frame in reader.frames(plan, scan=scan)]
    expected = [i for i in range(1, len(shots)) if shots[i] != shots[i - 1]]
    # A bar that differs in one frame only is that of a picture which shows two shots, or of a damaged one.
    expected = [i for n, i in enumerate(expected) if n + 1 == len(expected) or expected[n + 1] > i + 1]
    cuts = [info.timestamps.index(cut) for cut in scan.finish().cuts]
    return list(differences(expected, cuts))


def differences(expected: Sequence[int], cuts: Sequence[int]) -> Iterator[str]:
    """Sentences on cuts that are missing and that are too many; one frame beside counts as right."""
    if missing := [i for i in expected if not any(abs(i - cut) <= 1 for cut in cuts)]:
        yield f"missing cuts at frames {missing}"
    if false := [cut for cut in cuts if not any(abs(i - cut) <= 1 for i in expected)]:
        yield f"false cuts at frames {false}"


def animation(folder: Film, name: str) -> Path:
    pictures = [Image.fromarray(picture) for picture in film(0, 60)]
    path = folder.path / name
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40, **lossless)
    return path


_X264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p")
#: Formats that `benchmarks.media_files` has not.
MORE: dict[str, Case] = {
    "hdr.mp4": encoded("-c:v", "libx265", "-preset", "ultrafast", "-pix_fmt", "yuv420p10le",
                       "-color_primaries", "bt2020", "-color_trc", "smpte2084", "-colorspace", "bt2020nc"),
    "grey.mkv": encoded("-c:v", "ffv1", "-pix_fmt", "gray"),
    "grey.mp4": encoded("-c:v", "libx264", "-pix_fmt", "gray"),
    "ten-bit.mkv": encoded("-c:v", "libx264", "-pix_fmt", "yuv422p10le"),
    "hevc-b.mkv": encoded("-c:v", "libx265", "-preset", "fast", "-pix_fmt", "yuv420p"),
    "low-rate.mp4": encoded("-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "40"),
    "low-rate.mpg": encoded("-c:v", "mpeg2video", "-q:v", "20"),
    "telecine.ts": encoded("-vf", "telecine", "-c:v", "mpeg2video", "-flags", "+ildct+ilme", "-q:v", "3", rate="24"),
    "blended.mp4": encoded("-vf", "minterpolate=fps=25:mi_mode=blend:scd=none", *_X264),
    "double-rate.mp4": encoded("-r", "60", *_X264),
    "animation.png": animation, "animation.webp": animation, "animation.gif": animation,
}  # fmt: skip


#: Cases in which the bar does not tell where a cut is, and why.
ODD = {
    "gif.gif": "it has pictures of its own",
    "edits.mp4": "its edit list jumps inside a shot, which is a cut that no bar tells of",
    "lost-three.ts": "the cut lies among pictures that are lost",
}


def formats(only: str) -> dict[str, Any]:
    misses, cuts, skipped = dict[str, list[str]](), 0, dict(ODD)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Film(Path(temporary))
        cases = {**CASES, **MORE}
        for name in [name for name in cases if only in name and name not in ODD]:
            try:
                path = cases[name](folder, name)
            except (subprocess.CalledProcessError, ValueError):
                skipped[name] = "ffmpeg does not make it of this film"
                continue
            try:
                faults = check_format(path)
            except KeyeError as error:
                faults = [str(error)]
            if faults:
                misses[name] = faults
            cuts += 1
    return {"files": cuts, "right": cuts - len(misses), "misses": misses, "left out": skipped}


def write(path: Path, pictures: Iterable[Picture], size: tuple[int, int] = SIZE) -> Path:
    """An H.264 file of pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "crf": "26"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def motion(only: str, seconds: float, shots: int, seed: int) -> dict[str, Any]:
    false, minutes = dict[str, list[float]](), 0.0
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "clip.mp4"
        for name in [name for name in MOTIONS if only in name]:
            rng = np.random.default_rng(seed)
            write(path, MOTIONS[name](rng, round(seconds * RATE), SIZE))
            minutes += seconds / 60
            if cuts := find_scenes(path).cuts:
                false[name] = list(cuts)
        expected, kinds = list[int](), list[str]()
        write(path, montage(shots, seed, expected, kinds))
        cuts = [round(cut * RATE) for cut in find_scenes(path).cuts]
    faults = list(differences(expected, cuts))
    meetings = {i: kind for i, kind in zip(expected, kinds, strict=True) if any(str(i) in fault for fault in faults)}
    authored = {"authored cuts": len(expected), "faults": faults, "kinds": meetings}
    return {"minutes without cuts": round(minutes, 2), "false cuts": false, "film": authored}


def montage(shots: int, seed: int, cuts: list[int], kinds: list[str]) -> Iterator[Picture]:
    """Shots of 8 to 60 frames of all kinds; `cuts` gets the number of the first frame of each but the first, `kinds`
    what meets there."""
    rng, place = np.random.default_rng(seed + 100), 0
    last: tuple[str, Picture] | None = None
    for _ in range(shots):
        while True:
            name = str(rng.choice(list(MOTIONS)))
            shot = list(MOTIONS[name](rng, int(rng.integers(8, 60)), SIZE))
            if last is None or np.abs(shot[0].astype(int) - last[1]).mean() >= VISIBLE:
                break
        if last is not None:
            cuts.append(place)
            kinds.append(f"{last[0]} to {name}")
        yield from shot
        place, last = place + len(shot), (name, shot[-1])


def cost() -> dict[str, Any]:
    """Processor seconds of a minute of film at 640x360: a plain decode, all frames through the worker, and the cuts."""
    with tempfile.TemporaryDirectory() as temporary:
        path = write(Path(temporary) / "clip.mp4", scenic(60 * RATE, (640, 360)), (640, 360))
        plain = "import av, sys; c = av.open(sys.argv[1]); s = c.streams.video[0]; s.codec_context.thread_count = 1\n"
        programs = {
            "decode": f"{plain}for frame in c.decode(s): pass",
            "probe": "import sys; from keye.media.scenes import VideoReader; VideoReader(sys.argv[1]).close()",
            "scenes": "import keye, sys; keye.find_scenes(sys.argv[1])",
        }
        used = {name: cpu_seconds([sys.executable, "-c", program, str(path)]) for name, program in programs.items()}
    used["scenes"] -= used["probe"]  # starting Python and reading the packets
    result = {name: round(value, 2) for name, value in used.items()}
    return {**result, "ratio": round(used["scenes"] / used["decode"], 2), "frames": 60 * RATE}


def scenic(count: int, size: tuple[int, int]) -> Iterator[Picture]:
    """A cut every four seconds, in pans over photographs and drawings."""
    rng = np.random.default_rng(3)
    for start in range(0, count, 4 * RATE):
        make = photo if start % 3 else drawing
        world = make(rng, size[0] + 4 * 4 * RATE, size[1])
        for i in range(min(4 * RATE, count - start)):
            yield np.ascontiguousarray(world[:, 4 * i : 4 * i + size[0]])


def cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["formats", "motion", "cost"], help="run one part")
    parser.add_argument("--only", default="", help="run the formats or kinds of motion with this text in their name")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each kind of motion")
    parser.add_argument("--shots", type=int, default=200, help="of the film with cuts")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    parts = {
        "formats": lambda: formats(options.only),
        "motion": lambda: motion(options.only, options.seconds, options.shots, options.seed),
        "cost": cost,
    }
    chosen = [options.part] if options.part else list(parts)
    print(json.dumps({"benchmark": "scenes", **{name: parts[name]() for name in chosen}}, indent=2))


if __name__ == "__main__":
    main()
