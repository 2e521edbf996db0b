"""What samples become: tokens, frames, what is learnt, and times that are those of the files."""

from __future__ import annotations

from pathlib import Path

import pytest

from keye.chat.messages import Medium
from keye.errors import MediaError
from keye.media.packet_times import read_packet_times
from keye.media.source.fetch import fetch_source
from keye.train.finetune.measure import Measured, Spread, measure
from tests.support.clips import write_clip
from tests.support.layouts import moving_frames, nano_layout, sample

#: A variable rate: frames as players show them, in milliseconds.
TIMES = [0, 100, 200, 900, 1700, 1800, 2500, 3300]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "uneven.mp4", frames=8, times_ms=TIMES, size=(56, 56))


@pytest.fixture(scope="module")
def measured(uneven: Path) -> Measured:
    samples = [
        sample((Medium("video", str(uneven), {"nframes": 4}), "when?"), "[[0.9, 1.8]]"),
        sample("a question", "an answer", line=2),
        sample((Medium("video", moving_frames(0, 40), {"max_pixels": 112 * 112}), "what?"), "long", line=3),
        sample((Medium("video", "/no/such/file.mp4"), "what?"), "missing", line=4),
        sample((Medium("video", str(uneven), {"nframes": 4, "strict_official": True}), "when?"), "x", line=5),
    ]
    return measure(samples, nano_layout(max_tokens=300))


def test_what_a_prompt_says_of_times_is_compared_with_the_file(measured: Measured) -> None:
    """The last sample counts frames as the official code does, at the average rate: that is not when they are shown."""
    assert measured.times.compared == 8 and measured.times.without == 0
    assert 0 < measured.times.different <= 4
    assert all(fault.startswith("data.jsonl:5: ") and "uneven.mp4 shows at" in fault for fault in measured.times.faults)


def test_lengths_frames_and_spacing(measured: Measured) -> None:
    assert measured.samples == 5 and len(measured.lengths) == 3
    assert measured.tokens == Spread.of(measured.lengths) and measured.tokens.least == 37
    assert (measured.frames.least, measured.frames.most, measured.spacing.count) == (4, 4, 6)
    assert measured.spacing.most > 2 * measured.spacing.least
    assert measured.visual_share == 32 / sum(measured.lengths)


def test_what_is_left_out_is_named(measured: Measured) -> None:
    (long,) = measured.too_long
    assert long.startswith("data.jsonl:3: the sample takes") and "max_length is 300" in long
    (missing,) = measured.skipped
    assert str(missing.place) == "data.jsonl:4" and "/no/such/file.mp4" in missing.reason


def test_the_text_says_what_is_learnt(measured: Measured) -> None:
    video, text, _ = measured.texts
    assert [run.text for run in video.runs if run.learnt] == ["[[0.9, 1.8]]<|im_end|>"]
    assert "".join(run.text for run in text.runs) == (
        "<|im_start|>user\na question<|im_end|>\n<|im_start|>assistant\nan answer<|im_end|>"
    )
    assert sum("visual tokens]" in run.text for run in video.runs) == 4


def test_no_further_sample_is_begun_after_the_time_is_over() -> None:
    assert measure([sample("a", "b")] * 5, nano_layout(), seconds=0.0).samples == 1
    assert measure([sample("a", "b")] * 5, nano_layout(), most=3).samples == 3


def test_packet_times_are_those_that_were_written(uneven: Path, tmp_path: Path) -> None:
    times = read_packet_times(fetch_source(uneven))
    assert times.steady and times.seconds == pytest.approx([time / 1000 for time in TIMES], abs=1e-4)
    (tmp_path / "none.mp4").write_bytes(b"no video at all" * 50)
    with pytest.raises(MediaError, match=r"none\.mp4 is not a video that can be read"):
        read_packet_times(fetch_source(tmp_path / "none.mp4"))
