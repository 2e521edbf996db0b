"""Slow and fast frames of Keye-VL 1.5: classification and both resizes of a clip, against a plain transcription.

The transcription takes the steps of the rule one by one, frame by frame and patch by patch, as a reader of the paper
would write them down: all frames are shrunk, then each is compared with the latest slow one, and both are turned into
HSV for it, as officially. The resizes are torch's on both sides and more than half of what keye takes. Tests hold both
to the same recorded cases. Makes its own clip, checks that types, sizes and pixels are equal, prints JSON. Run:
    python benchmarks/slow_fast.py [--frames 120] [--width 854] [--height 480] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from keye.config import ProcessorConfig
from keye.media.pixels.patches import resize_bilinear
from keye.media.pixels.slowfast import frame_types
from keye.media.sizes import FrameSizes, compute_frame_sizes, smart_resize

Pixels = NDArray[np.uint8]
CONFIG = ProcessorConfig.of("1.5")
PATCH, PATCH_THRESHOLD, FRAME_THRESHOLD = 28, 0.7, 0.9


def plain_hsv(rgb: Pixels) -> NDArray[np.int64]:
    """8-bit HSV by the fixed-point formulas, channel by channel."""
    r, g, b = (rgb[..., c].astype(np.int64) for c in range(3))
    v = np.maximum(np.maximum(r, g), b)
    diff = v - np.minimum(np.minimum(r, g), b)
    with np.errstate(divide="ignore"):
        saturation_scale = np.where(v > 0, np.rint((255 << 12) / np.where(v > 0, v, 1)), 0).astype(np.int64)
        hue_scale = np.where(diff > 0, np.rint((180 << 12) / (6.0 * np.where(diff > 0, diff, 1))), 0).astype(np.int64)
    s = (diff * saturation_scale + (1 << 11)) >> 12
    h = np.where(v == r, g - b, np.where(v == g, b - r + 2 * diff, r - g + 4 * diff))
    h = (h * hue_scale + (1 << 11)) >> 12
    return np.stack([np.where(h < 0, h + 180, h), s, v], axis=-1)


def plain_similarity(before: Pixels, now: Pixels) -> float:
    """Share of similar patches among those that are not black in both frames."""
    first, second = plain_hsv(before).astype(np.float32), plain_hsv(now).astype(np.float32)
    similar, counted = 0, 0
    for y in range(0, first.shape[0], PATCH):
        for x in range(0, first.shape[1], PATCH):
            p = first[y : y + PATCH, x : x + PATCH].ravel()
            q = second[y : y + PATCH, x : x + PATCH].ravel()
            norm_p, norm_q = float(np.linalg.norm(p)), float(np.linalg.norm(q))
            if norm_p < 0.01 and norm_q < 0.01:
                continue
            counted += 1
            cosine = float(p @ q) / (norm_p * norm_q) if norm_p and norm_q else 0.0
            similar += cosine > PATCH_THRESHOLD
    return similar / counted if counted else math.nan


def plain_resize(frame: Pixels, height: int, width: int) -> Pixels:
    planes = torch.from_numpy(frame).permute(2, 0, 1).contiguous()[None]
    resized = F.interpolate(planes, [height, width], mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def plain_types(frames: list[Pixels], threshold: float = FRAME_THRESHOLD) -> list[int]:
    """0 for slow and 1 for fast frames."""
    height, width = frames[0].shape[:2]
    size = smart_resize(height, width, factor=PATCH, min_pixels=48 * 784, max_pixels=256 * 784)
    resized = [plain_resize(frame, *size) for frame in frames]
    types, slow = [0], resized[0]
    for now in resized[1:]:
        if plain_similarity(slow, now) < threshold:
            types.append(0)
            slow = now
        else:
            types.append(1)
    return types


def sizes_of(types: list[int], frame: Pixels) -> FrameSizes:
    fast = sum(types)
    return compute_frame_sizes(frame.shape[0], frame.shape[1], len(types) - fast, CONFIG, fast=fast)


def plain(frames: list[Pixels]) -> tuple[list[int], list[Pixels]]:
    """Types and resized frames, by the transcription."""
    types = plain_types(frames)
    result = sizes_of(types, frames[0])
    return types, [plain_resize(f, *(result.fast if t else result.slow)) for f, t in zip(frames, types, strict=True)]


def ours(frames: list[Pixels]) -> tuple[list[int], list[Pixels]]:
    """The same by keye."""
    types = frame_types(frames, CONFIG)
    result = sizes_of(types, frames[0])
    return types, [resize_bilinear(f, result.fast if t else result.slow) for f, t in zip(frames, types, strict=True)]


def make_clip(count: int, height: int, width: int) -> list[Pixels]:
    """Scenes of 6 to 30 frames: a coloured texture, a moving square, a little noise, a black stretch."""
    rng = np.random.default_rng(0)
    frames: list[Pixels] = []
    while len(frames) < count:
        coarse = rng.integers(0, 256, (height // 24, width // 24, 3), dtype=np.uint8)
        scene = np.kron(coarse, np.ones((24, 24, 1), dtype=np.uint8))
        scene = np.pad(scene, ((0, height - scene.shape[0]), (0, width - scene.shape[1]), (0, 0)), mode="edge")
        if len(frames) % 5 == 4:
            scene[:] = 0
        for k in range(int(rng.integers(6, 30))):
            frame = scene.copy()
            frame[40 : height // 2, 10 * k : 10 * k + width // 6] = (
                255 - frame[40 : height // 2, 10 * k : 10 * k + width // 6]
            )
            frames.append(np.clip(frame + rng.integers(-3, 4, frame.shape), 0, 255).astype(np.uint8))
    return frames[:count]


def seconds_of(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Fastest processor time of `repeats` runs, and the result."""
    best, result = math.inf, None
    for _ in range(repeats):
        begin = time.process_time()
        result = run()
        best = min(best, time.process_time() - begin)
    return best, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=120)
    parser.add_argument("--width", type=int, default=854)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    frames = make_clip(options.frames, options.height, options.width)
    ours(frames[:2])
    fast_seconds, (types, resized) = seconds_of(lambda: ours(frames), options.repeats)
    plain_seconds, (plain_kinds, plain_resized) = seconds_of(lambda: plain(frames), options.repeats)
    equal = types == plain_kinds and all(np.array_equal(a, b) for a, b in zip(resized, plain_resized, strict=True))
    print(json.dumps({
        "frames": options.frames, "width": options.width, "height": options.height, "fast_frames": sum(types),
        "keye_cpu_seconds": round(fast_seconds, 3), "plain_cpu_seconds": round(plain_seconds, 3),
        "ratio": round(plain_seconds / fast_seconds, 2), "equal": equal,
        "torch": torch.__version__, "machine": platform.machine(),
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
