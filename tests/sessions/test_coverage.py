"""What an answer about one video says of where it looked."""

from __future__ import annotations

from typing import Any

from keye.sessions.coverage import coverage_of, moments_of


def plan(**changes: Any) -> dict[str, Any]:
    return {"duration": 60.0, "timestamps": [10.0, 20.0, 30.0], "part": (10.0, 32.5), "visual_tokens": 57, **changes}


def test_what_lies_outside_the_part_was_not_looked_at() -> None:
    coverage = coverage_of([plan()], 12)
    assert coverage is not None and coverage.to_dict()["seen"] == [
        {"start": 10.0, "end": 32.5, "spacing": 10.0, "close": False}
    ]
    assert coverage.unseen == ((0.0, 10.0), (32.5, 60.0)) and (coverage.frames, coverage.index_tokens) == (3, 57)
    assert coverage.share == 22.5 / 60


def test_only_one_video_with_times_has_a_coverage() -> None:
    image = {"visual_tokens": 4, "width": 8}
    assert coverage_of([], 1) is coverage_of([image], 1) is coverage_of([plan(), plan()], 1) is None
    assert coverage_of([plan(duration=None)], 1) is None
    single = coverage_of([plan(timestamps=[10.0], part=None)], 1)
    assert single is not None and single.seen[0].spacing == 50.0


def test_moments_are_in_order_and_unchecked() -> None:
    first, second = moments_of([(1.0, 2.0), (5.0, 6.5)])
    assert (first.rank, second.rank, second.end) == (1, 2, 6.5)
    assert first.probability is None and first.checked == "no" and first.id != second.id
