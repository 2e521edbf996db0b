"""Times in replies: only what was looked at is a moment of the video."""

from __future__ import annotations

from typing import Any

import pytest

from keye.chat import Region
from keye.engine.moments import keep_moments, keep_regions, sampled_windows

PLAN = {"timestamps": [30.0, 30.5, 31.0], "sample_fps": 2.0, "duration": 60.0}


@pytest.mark.parametrize(
    ("plan", "relative", "window"),
    [
        (PLAN, False, (30.0, 31.5)),
        (PLAN | {"duration": 31.2}, False, (30.0, 31.2)),
        (PLAN, True, (0.0, 1.5)),
        ({"timestamps": [4.0], "duration": 60.0, "sample_fps": 0.1}, False, (4.0, 14.0)),
        (PLAN | {"part": [30.2, 38.0]}, False, (30.2, 38.0)),
        (PLAN | {"part": [30.25, 38.0]}, True, (0.25, 8.0)),
        (PLAN | {"label_times": [0.0, 0.5, 1.0]}, False, (0.0, 1.5)),
    ],
)
def test_the_window_of_a_plan(plan: dict[str, Any], relative: bool, window: tuple[float, float]) -> None:
    assert sampled_windows([{"width": 28}, plan, {"timestamps": []}], relative=relative) == (window,)


def test_moments_are_within_what_was_looked_at() -> None:
    windows = [(30.0, 40.0)]
    intervals = [(31.0, 33.5), (0.0, 0.0), (25.0, 31.0), (39.0, 40.04), (39.0, 50.0), (3000.0, 3005.0), (32.0, 32.0)]
    kept, notes = keep_moments(intervals, windows)
    assert kept == [(31.0, 33.5), (30.0, 31.0), (39.0, 40.04), (39.0, 40.0)], "a tenth of a second is rounding"
    sentences = [str(note) for note in notes]
    assert len(sentences) == 3
    assert "0.0 s to 0.0 s, 32.0 s to 32.0 s: without length" in sentences[0]
    assert "50:00.0 to 50:05.0: outside what was looked at (30.0 s to 40.0 s)" in sentences[1]
    assert "25.0 s to 31.0 s, 39.0 s to 50.0 s: in part outside" in sentences[2]


def test_moments_without_a_window_are_kept() -> None:
    assert keep_moments([(1.0, 2.0)], []) == ([(1.0, 2.0)], [])
    assert keep_moments([(0.0, 0.0)], [])[0] == []


def test_moments_of_several_videos() -> None:
    windows = [(0.0, 10.0), (100.0, 110.0)]
    assert keep_moments([(5.0, 12.0), (101.0, 102.0), (50.0, 60.0)], windows)[0] == [(5.0, 10.0), (101.0, 102.0)]


def test_marked_clips_are_moments_too() -> None:
    point = Region("point", ((1.0, 1.0),))
    clips = [Region("clip", (), interval=(1.0, 3.0)), Region("clip", (), interval=(50.0, 51.0))]
    kept = keep_regions([point, *clips], [(2.0, 10.0)])
    assert kept == [point, Region("clip", (), interval=(2.0, 3.0))]
