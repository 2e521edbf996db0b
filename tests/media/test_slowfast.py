"""Slow and fast frames of 1.5: colours, similarity, types, and budgets."""

from __future__ import annotations

import colorsys
import gc
import json
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.media import sizes
from keye.media.pixels.slowfast import FAST, SLOW, SlowFastClassifier, frame_types, similarity, to_hsv
from keye.releases.base import find_tokens_per_frame

CONFIG = ProcessorConfig.of("1.5")
PLAIN = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/slow_fast.py"))

#: Two palettes whose patches are dissimilar: saturated reds and bluish greys.
RED, GREY = (230, 10, 10), (110, 115, 120)


def scene(colour: tuple[int, int, int], height: int = 112, width: int = 168) -> np.ndarray:
    """Blocks of 28 pixels in shades of one colour."""
    shades = np.array(colour) + np.random.default_rng(0).integers(-5, 6, (height // 28, width // 28, 3))
    return np.kron(shades.astype(np.uint8), np.ones((28, 28, 1), dtype=np.uint8))


def hsv(rgb: np.ndarray) -> np.ndarray:
    return to_hsv(torch.from_numpy(rgb).permute(2, 0, 1)).permute(1, 2, 0).numpy()


def test_hsv_of_known_colours() -> None:
    """Values that OpenCV gives; the whole cube of 256^3 colours was compared with its version 5.0.0 once."""
    colours = [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255), (1, 2, 3), (200, 17, 99), (250, 3, 9)]
    expected = [(0, 0, 0), (0, 0, 255), (0, 255, 255), (60, 255, 255), (120, 255, 255), (105, 170, 3), (167, 233, 200),
                (179, 252, 250)]  # fmt: skip
    assert hsv(np.array([colours], dtype=np.uint8))[0].tolist() == [list(e) for e in expected]


def test_hsv_of_the_colour_cube() -> None:
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, len(levels), 3)
    assert np.array_equal(hsv(cube), PLAIN["plain_hsv"](cube))


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_hsv_is_near_the_formula(rgb: tuple[int, int, int]) -> None:
    h, s, v = (int(x) for x in hsv(np.array([[rgb]], dtype=np.uint8))[0, 0])
    hue, saturation, value = colorsys.rgb_to_hsv(*(x / 255 for x in rgb))
    assert min(abs(h - hue * 180), 180 - abs(h - hue * 180)) <= 0.51
    assert abs(s - saturation * 255) <= 0.51
    assert v == round(value * 255)


def test_similarity_counts_patches() -> None:
    first, second = scene(RED), scene(RED)
    second[:28, :56] = scene(GREY)[:28, :56]
    assert similarity(first, first) == 1.0
    assert similarity(first, second) == pytest.approx(22 / 24)
    # Patches that are black in both do not count; black in one only is a difference.
    first[28:] = second[28:] = 0
    assert similarity(first, second) == pytest.approx(4 / 6)
    assert similarity(first, np.zeros_like(first)) == 0.0
    assert similarity(np.zeros_like(first), first) == 0.0
    assert np.isnan(similarity(np.zeros_like(first), np.zeros_like(first)))


def test_a_cut_makes_a_slow_frame() -> None:
    frames = [scene(RED)] * 3 + [scene(GREY)] * 2 + [np.zeros_like(scene(RED))] * 2 + [scene(RED)]
    assert frame_types(frames, CONFIG) == [SLOW, FAST, FAST, SLOW, FAST, SLOW, FAST, SLOW]
    assert frame_types(frames, CONFIG, 0.0) == [SLOW] + [FAST] * 7


def test_frames_are_compared_with_the_latest_slow_one() -> None:
    """A slow drift makes a new slow frame as soon as it is far from the last, however small each step is."""
    frames = []
    for step in range(12):
        frame = scene(RED)
        frame[:, : 14 * step] = scene(GREY)[:, : 14 * step]
        frames.append(frame)
    types = frame_types(frames, CONFIG)
    assert types[0] == SLOW
    assert 1 < types.count(SLOW) < 12


def test_only_the_latest_slow_frame_is_kept() -> None:
    """Memory does not grow with the video: after each frame, tensors of one frame are alive."""
    classifier = SlowFastClassifier(CONFIG)
    alive = []
    for colour in (RED, GREY) * 3:
        assert classifier.push(scene(colour)) == SLOW
        alive.append(sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor and t.ndim == 5))
    assert len(set(alive)) == 1


@pytest.mark.parametrize("size", [(112, 168), (96, 130), (300, 200)])
def test_the_plain_transcription_agrees(size: tuple[int, int]) -> None:
    frames = PLAIN["make_clip"](40, *size)
    types, resized = PLAIN["plain"](frames)
    ours, pictures = PLAIN["ours"](frames)
    assert ours == types
    assert {SLOW, FAST} == set(types)
    assert all(np.array_equal(a, b) for a, b in zip(pictures, resized, strict=True))


def test_the_plain_transcription_on_recorded_cases() -> None:
    folder = Path(os.environ.get("KEYE_GOLDEN") or Path(__file__).parents[2].parent / "shared/golden") / "preprocess"
    cases = [path for path in folder.glob("case-1[0-5].json") if "threshold" in path.read_text()]
    if not cases:
        pytest.skip(f"{folder} holds no recorded frame types")
    for path in cases:
        stored, meta = load_file(path.with_suffix(".safetensors")), json.loads(path.read_text())
        frames = [np.ascontiguousarray(f) for f in stored["frames"].transpose(0, 2, 3, 1)]
        assert PLAIN["plain_types"](frames, meta["threshold"]) == stored["frame_types"].tolist()
        assert frame_types(frames, CONFIG, meta["threshold"]) == stored["frame_types"].tolist()


@given(st.integers(1, 400), st.integers(0, 1000), st.integers(48, 900), st.integers(1000, 100_000))
def test_the_budget_is_met_but_for_one_token(slow: int, fast: int, high: int, budget: int) -> None:
    result = find_tokens_per_frame(slow, 48, high, budget, fast=fast)
    cost = slow * (result - 1) + fast * max(int(0.3 * (result - 1)), 48)
    assert result in (48, high) or cost <= budget


def test_fast_frames_are_smaller() -> None:
    result = sizes.compute_frame_sizes(480, 640, 2, CONFIG, MediaOptions(video_total_pixels=15680000), fast=3)
    assert (result.slow, result.fast) == ((476, 644), (252, 336))
    assert sizes.compute_frame_sizes(480, 640, 5, ProcessorConfig.of("2.0")).fast == (364, 504)
