"""Times in replies: only what was looked at is a moment of the video."""

from __future__ import annotations

from typing import Any

import pytest

from keye.chat.replies import Region, Window, collect_windows, keep_moments, keep_regions

PLAN = {"timestamps": [30.0, 30.5, 31.0], "sample_fps": 2.0, "duration": 60.0}


@pytest.mark.parametrize(
    ("plan", "relative", "window"),
    [
        (PLAN, False, (30.0, 31.5)),
        (PLAN | {"duration": 31.2}, False, (30.0, 31.2)),
        (PLAN, True, (0.0, 1.5, (0.0,), (30.0,))),
        ({"timestamps": [4.0], "duration": 60.0, "sample_fps": 0.1}, False, (4.0, 14.0)),
        (PLAN | {"part": [30.2, 38.0]}, False, (30.2, 38.0)),
        (PLAN | {"part": [30.25, 38.0]}, True, (0.25, 8.0, (0.0,), (30.0,))),
        (PLAN | {"label_times": [0.0, 0.5, 1.0]}, False, (0.0, 1.5, (0.0, 0.5, 1.0), (30.0, 30.5, 31.0))),
    ],
)
def test_the_window_of_a_plan(plan: dict[str, Any], relative: bool, window: tuple[object, ...]) -> None:
    assert collect_windows([{"width": 28}, plan, {"timestamps": []}], relative=relative) == (Window(*window),)


def test_moments_are_within_what_was_looked_at() -> None:
    windows = [Window(30.0, 40.0)]
    intervals = [(31.0, 33.5), (0.0, 0.0), (25.0, 31.0), (39.0, 40.04), (39.0, 50.0), (3000.0, 3005.0), (32.0, 32.0)]
    remaining, notes = keep_moments(intervals, windows)
    assert remaining == [(31.0, 33.5), (30.0, 31.0), (39.0, 40.04), (39.0, 40.0)], "a tenth of a second is rounding"
    sentences = [str(note) for note in notes]
    assert len(sentences) == 3
    assert "0.0 s to 0.0 s, 32.0 s to 32.0 s: without length" in sentences[0]
    assert "50:00.0 to 50:05.0: outside what was looked at (30.0 s to 40.0 s)" in sentences[1]
    assert "25.0 s to 31.0 s, 39.0 s to 50.0 s: in part outside" in sentences[2]


def test_moments_without_a_window_are_kept() -> None:
    assert keep_moments([(1.0, 2.0)], []) == ([(1.0, 2.0)], [])
    assert keep_moments([(0.0, 0.0)], [])[0] == []


def test_moments_of_several_videos() -> None:
    windows = [Window(0.0, 10.0), Window(100.0, 110.0)]
    assert keep_moments([(5.0, 12.0), (101.0, 102.0), (50.0, 60.0)], windows)[0] == [(5.0, 10.0), (101.0, 102.0)]


def test_marked_clips_are_moments_too() -> None:
    point = Region("point", ((1.0, 1.0),))
    clips = [Region("clip", (), interval=(1.0, 3.0)), Region("clip", (), interval=(50.0, 51.0))]
    remaining = keep_regions([point, *clips], [Window(2.0, 10.0)])
    assert remaining == [point, Region("clip", (), interval=(2.0, 3.0))]


def test_times_that_a_model_counts_otherwise_become_those_of_players() -> None:
    """Labels of the official code at a variable rate: 2 frames a second on average, shown at other times."""
    labels, displayed = (0.0, 0.5, 1.0, 1.5), (5.0, 6.0, 12.0, 12.5)
    window = Window(0.0, 2.0, labels, displayed)
    remaining, notes = keep_moments([(0.0, 0.5), (0.75, 1.5), (1.5, 2.0), (1.0, 9.0)], [window])
    assert remaining == [(5.0, 6.0), (9.0, 12.5), (12.5, 13.0), (12.0, 13.0)]
    assert "the reply names 1.0 s to 9.0 s: in part outside what was looked at (0.0 s to 2.0 s)" in str(notes[0])
    relative = collect_windows([PLAN], relative=True)
    assert keep_moments([(0.5, 1.2)], relative)[0] == [(30.5, 31.2)], "Preview counts from the first sampled frame"
    clip = Region("clip", (), interval=(0.5, 1.2))
    assert keep_regions([clip], relative) == [Region("clip", (), interval=(30.5, 31.2))]


def test_what_rounding_leaves_is_not_a_moment() -> None:
    """A time of one decimal at the end of what was looked at shares some hundredths with it."""
    remaining, notes = keep_moments([(20.0, 21.0), (20.03, 30.0)], [Window(0.0, 20.03)])
    assert remaining == [] and "20.0 s to 21.0 s, 20.0 s to 30.0 s: outside" in str(notes[0])
    assert keep_moments([(4.0, 4.04)], [Window(0.0, 20.0)])[0] == [(4.0, 4.04)]


def test_a_moment_that_is_named_again_is_one() -> None:
    remaining, notes = keep_moments([(3.0, 4.0), (1.0, 2.0), (3.0, 4.0), (5.0, 5.0), (5.0, 5.0)], [Window(0.0, 9.0)])
    assert remaining == [(3.0, 4.0), (1.0, 2.0)]
    assert str(notes[0]).startswith("the reply names 5.0 s to 5.0 s: without length")
