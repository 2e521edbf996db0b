"""How answers and plans look."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from keye.commands.shared.show import filled_cells, listed_times, print_stream, timeline, usage_line, video_length
from keye.errors import KeyeWarning, warn
from keye.sessions.answer import Answer, AnswerStream, Usage
from keye.units import one_line, printable


def answer(**changed: Any) -> Answer:
    fields: dict[str, Any] = {
        "text": "[[3.0, 8.5]]", "reasoning": None, "intervals": ((3.0, 8.5),), "usage": Usage(640, 512, 9),
        "plan": ({"name": "v.mp4", "duration": 16.0, "timestamps": [0.0, 8.0]},), "model": "nano",
        "attention": "sparse", "finish_reason": "stop", "seconds": {"media": 0.25, "prefill": 0.5, "generate": 0.05},
    }  # fmt: skip
    return Answer(**{**fields, **changed})


def test_warnings_come_after_the_line_of_the_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pieces() -> Iterator[str | Answer]:
        yield "[[3.0, 3.0]]"
        warn(KeyeWarning("without length"))
        yield answer()

    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: print(message))
    assert print_stream(AnswerStream(pieces()), "").text == "[[3.0, 8.5]]"
    assert capsys.readouterr().out == "[[3.0, 3.0]]\nwithout length\n"


def test_a_timeline_has_a_bar_and_a_line_for_each_interval() -> None:
    bar, first, second = (line.plain for line in timeline([(4.0, 8.0), (12.0, 16.0)], 16.0, 39))
    assert bar == "0.0 s ▕──────██████──────██████▏ 16.0 s"
    assert (first, second) == ("  4.0 s to 8.0 s  (4.0 s)", "  12.0 s to 16.0 s  (4.0 s)")


def test_without_a_length_no_bar_is_shown() -> None:
    assert [line.plain for line in timeline([(1.0, 2.0)], None, 80)] == ["  1.0 s to 2.0 s  (1.0 s)"]


def test_an_interval_after_the_end_makes_the_bar_longer() -> None:
    assert timeline([(1.0, 90.0)], 16.0, 80)[0].plain.endswith("▏ 1:30.0")


@pytest.mark.parametrize(
    ("intervals", "length", "expected"),
    [
        ([(0.0, 0.0)], 10.0, "#---------"),
        ([(10.0, 10.0)], 10.0, "---------#"),
        ([(2.5, 2.6)], 10.0, "--#-------"),
        ([(0.0, 10.0)], 10.0, "##########"),
        ([(5.0, 7.0), (1.0, 2.0), (6.0, 8.0)], 10.0, "-#---###--"),
        ([(0.0, 0.0)], 0.0, "##########"),
    ],
)
def test_filled_cells(intervals: list[tuple[float, float]], length: float, expected: str) -> None:
    assert "".join("#" if on else "-" for on in filled_cells(intervals, length, 10)) == expected


def test_usage_is_one_line() -> None:
    expected = "2 frames · 640 prompt tokens (512 visual) · 9 generated · sparse attention · 0.8 s"
    assert usage_line(answer(), 64) == expected
    dense = usage_line(answer(attention="dense", finish_reason="length"), 64)
    assert "9 generated, cut at --max-tokens" in dense
    assert "dense attention (over more than the 64 tokens that nano was trained to select)" in dense
    assert "(over" not in usage_line(answer(attention="dense"), 1000)
    assert "(over" not in usage_line(answer(attention="dense"), None)


def test_the_length_of_the_only_video() -> None:
    video, image = {"duration": 16.0}, {"visual_tokens": 4}
    assert video_length([video, image]) == 16.0
    assert video_length([video, video]) is None
    assert video_length([image]) is None


def test_long_lists_of_times_lose_their_middle() -> None:
    assert listed_times([0.0, 0.5]) == "0.0 0.5"
    times = listed_times([i / 2 for i in range(1000)]).split()
    assert len(times) == 49 and times[24] == "..." and times[-1] == "499.5"


def test_nothing_printed_steers_the_terminal() -> None:
    assert (
        printable("a\x1b]0;title\x07\n\tb\u202e")
        == "a\N{REPLACEMENT CHARACTER}]0;title\N{REPLACEMENT CHARACTER}\n\tb\N{REPLACEMENT CHARACTER}"
    )
    assert one_line(" a\n b\x00 ") == "a b\N{REPLACEMENT CHARACTER}"
