"""Damaged media through the readers as the server uses them, for a time: does the process survive, are all failures
sentences for people that give nothing away, does anything leak?

Makes small files of every common kind, damages them (bits, bytes, numbers in headers, cuts, pieces moved, repeated or
taken from another file), plans and reads each as an untrusted file, prints JSON. Run:
    python benchmarks/fuzz_media.py [--minutes 10] [--seed 0] [--keep FOLDER] --json
Exit code 1 when something was found; `--keep` saves the files that did it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pillow_heif
from PIL import Image

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.errors import KeyeError, MediaError
from keye.media.image import plan_image, read_image
from keye.media.source.fetch import fetch_source, media_kind, untrusted
from keye.media.video import DecodeLimits, VideoReader

CONFIG = ProcessorConfig()
LIMITS = DecodeLimits(memory_bytes=1 << 30, cpu_seconds=10, wait_seconds=20.0, total_seconds=30.0, frames=100_000,
                      duration=24 * 3600.0)  # fmt: skip
OPTIONS = MediaOptions(max_frames=8, min_frames=4, max_pixels=40_000)
#: What a sentence for an untrusted user must not contain: addresses, paths, names of our software, traces.
LEAK = re.compile(
    r"\b0x[0-9a-f]{4}|/(?:tmp|usr|home|root|work|proc|opt)/|\.py\b|Traceback|site-packages|PIL|libav|<_io"
)
VIDEOS = [
    ("mp4", "libx264", "yuv420p"), ("webm", "libvpx-vp9", "yuv420p"), ("webm", "libvpx", "yuv420p"),
    ("mkv", "libx264", "yuv420p"), ("avi", "mpeg4", "yuv420p"), ("ts", "mpeg2video", "yuv420p"),
    ("mp4", "libx265", "yuv420p"), ("mov", "mjpeg", "yuvj420p"), ("gif", "gif", "rgb8"), ("flv", "flv", "yuv420p"),
]  # fmt: skip
IMAGES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "AVIF", "HEIF")
#: Those that hold several pictures here: animations, pages, and the pictures beside the main one.
SEVERAL = ("WEBP", "TIFF", "AVIF", "HEIF")
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 1_000_000_000)


pillow_heif.register_heif_opener()


def seeds() -> list[tuple[str, bytes]]:
    """A small sound file of every kind."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)
    result = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix, codec, form in VIDEOS:
            path = Path(folder) / f"seed.{suffix}"
            with av.open(str(path), "w") as container:
                options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
                stream = container.add_stream(codec, rate=12, options=options)
                assert isinstance(stream, av.VideoStream)
                stream.width, stream.height, stream.pix_fmt = 64, 48, form
                for index, picture in enumerate(pixels):
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    frame.pts, frame.time_base = index, Fraction(1, 12)
                    container.mux(stream.encode(frame))
                container.mux(stream.encode(None))
            result.append((f"{suffix}-{codec}", path.read_bytes()))
    for kind in IMAGES:
        out = io.BytesIO()
        frames = [Image.fromarray(picture) for picture in pixels[:3]]
        many: dict[str, Any] = {"save_all": True, "append_images": frames[1:]} if kind in SEVERAL else {}
        exif = Image.Exif()
        exif[0x0112] = 6
        if kind in ("JPEG", "WEBP", "PNG", "TIFF", "HEIF"):
            many["exif"] = exif
        frames[0].save(out, kind, **many)
        result.append((kind.lower(), out.getvalue()))
        if kind in SEVERAL or kind == "PNG":
            out = io.BytesIO()
            moving = {"save_all": True, "append_images": frames[1:], "duration": 50} if kind == "PNG" else {}
            frames[0].save(out, kind, **moving)
            result.append((f"{kind.lower()}-{'moving' if moving else 'single'}", out.getvalue()))
    return result + deep()


def deep() -> list[tuple[str, bytes]]:
    """Images of 16 and 32 bits and with transparency."""
    ramp = np.linspace(0, 1, 64 * 48).reshape(48, 64)
    result = []
    for name, kind, image in [
        ("grey16", "PNG", Image.fromarray((ramp * 65535).astype(np.uint16))),
        ("float", "TIFF", Image.fromarray((ramp * 1000).astype(np.float32))),
        ("alpha", "PNG", Image.fromarray((ramp[..., None].repeat(2, 2) * 255).astype(np.uint8), "LA")),
        ("alpha", "HEIF", Image.fromarray((ramp[..., None].repeat(4, 2) * 255).astype(np.uint8), "RGBA")),
    ]:
        out = io.BytesIO()
        image.save(out, kind)
        result.append((f"{kind.lower()}-{name}", out.getvalue()))
    return result


def damage(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """The file with one to eight kinds of damage; half of them hit the first 2 KB, where headers are."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        if not out:
            break
        at = rng.randrange(min(len(out), 2048) if rng.random() < 0.5 else len(out))
        kind = rng.randrange(8)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.randrange(256)
        elif kind == 2:
            width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
            number = rng.choice(INTERESTING) & ((1 << 8 * width) - 1)
            out[at : at + width] = number.to_bytes(width, order)
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            del out[at : at + rng.randrange(1, 64)]
        elif kind == 5:
            piece = out[at : at + rng.randrange(1, 256)]
            out[at:at] = piece * rng.randrange(1, 20)
        elif kind == 6:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            out[at : at + 64] = other[start : start + rng.randrange(1, 512)]
        else:
            out[at : at + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(1, 64))
    return bytes(out)


def read(data: bytes) -> str:
    """The result of an untrusted file: `read`, or the sentence that rejects it."""
    source = untrusted(fetch_source(data))
    if media_kind(source) == "image":
        plan_image(source, CONFIG)
        read_image(source)
        return "read"
    with VideoReader(source, LIMITS) as reader:
        for frame in reader.frames(reader.plan(CONFIG, OPTIONS)):
            assert frame.dtype == np.uint8
    return "read"


def resources() -> dict[str, int]:
    """Open descriptors, child processes and resident memory (KiB) of this process."""
    status = Path("/proc/self/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    children = sum(len(task.read_text().split()) for task in Path("/proc/self/task").glob("*/children"))
    return {"descriptors": len(os.listdir("/proc/self/fd")), "children": children, "resident_kib": resident}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--json", action="store_true", required=True)
    arguments = parser.parse_args()
    files, rng = seeds(), random.Random(arguments.seed)
    for _, data in files:
        assert read(data) == "read"
    begin = time.monotonic()
    outcomes: Counter[str] = Counter()
    findings: list[dict[str, str]] = []
    slowest, start = 0.0, resources()
    while time.monotonic() - begin < arguments.minutes * 60:
        name, data = rng.choice(files)
        broken, then = damage(data, [other for _, other in files], rng), time.monotonic()
        outcome, problem = attempt(broken)
        slowest = max(slowest, time.monotonic() - then)
        outcomes[outcome] += 1
        if problem:
            findings.append({"file": name, "problem": problem[:2000]})
            if arguments.keep:
                arguments.keep.mkdir(parents=True, exist_ok=True)
                (arguments.keep / f"{len(findings):03d}-{name}").write_bytes(broken)
    end = resources()
    leaks = {name: [start[name], end[name]] for name in start}
    leaked = end["descriptors"] > start["descriptors"] or end["children"] > start["children"]
    print(
        json.dumps(
            {
                "benchmark": "fuzz_media", "minutes": arguments.minutes, "seed": arguments.seed,
                "files": sum(outcomes.values()), "outcomes": dict(outcomes.most_common()),
                "slowest_seconds": round(slowest, 2), "before_and_after": leaks, "findings": findings,
            },
            indent=2,
        )
    )  # fmt: skip
    return 1 if findings or leaked else 0


def attempt(data: bytes) -> tuple[str, str]:
    """The kind of outcome, and what is wrong with it, if anything. Warnings count as sentences too."""
    try:
        return read(data), ""
    except MediaError as error:
        sentence = str(error)
        kind = re.sub(r"[0-9][0-9.,]*", "N", sentence.partition(";")[0])[:80]
        return kind, f"leaks: {sentence}" if LEAK.search(sentence) else ""
    except KeyeError as error:
        return "KeyeError", f"no MediaError: {error}"
    except Exception as error:  # noqa: BLE001 - whatever else comes out is what is being looked for
        return type(error).__name__, f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
