"""Times are those that players show, counted from the container's start; a part is what is on display in it."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from keye.cluster.decode_work import VideoWork
from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.errors import KeyeError, KeyeWarning
from keye.media.info import VideoInfo
from keye.media.plan import VideoPlan, make_plan
from keye.media.processor import Processor
from keye.media.source.fetch import fetch_source
from keye.media.video import VideoReader, plan_video, probe
from tests.support.clips import read_code, trim_mp4, write_clip, write_with_sound

PREVIEW, V15, V20 = (ProcessorConfig.of(name) for name in ("preview", "1.5", "2.0"))  # type: ignore[arg-type]


def read(file: Path | VideoReader, **options: object) -> tuple[VideoInfo, VideoPlan, list[int]]:
    """Info, plan and the number shown by each sampled frame."""
    with warnings.catch_warnings(), ExitStack() as opened:
        warnings.simplefilter("ignore", KeyeWarning)
        reader = opened.enter_context(VideoReader(fetch_source(file))) if isinstance(file, Path) else file
        plan = reader.plan(V20, MediaOptions(**options))  # type: ignore[arg-type]
        return reader.info, plan, [read_code(frame) for frame in reader.read(plan)]


@pytest.mark.parametrize(
    ("suffix", "video", "sound", "offset"),
    [
        ("mp4", 1.5, 0.0, 1.5), ("mp4", 0.3, 0.0, 0.3), ("mp4", 0.0, 1.5, 0.0), ("mp4", 1.5, None, 0.0),
        ("mkv", 1.5, 0.0, 1.5), ("mkv", 0.0, 0.3, 0.0), ("mkv", 1.5, None, 0.0),
        ("ts", 1.5, 0.0, 1.5), ("ts", 0.0, 1.5, 0.0), ("ts", 1.5, None, 0.0),
    ],
)  # fmt: skip
def test_times_count_from_the_start_of_the_container(
    tmp_path: Path, suffix: str, video: float, sound: float | None, offset: float
) -> None:
    path = write_with_sound(tmp_path / f"clip.{suffix}", video_start=video, sound_start=sound)
    info, plan, codes = read(path)
    # Sound in TS begins a frame of AAC before the time that was asked for.
    assert info.start_offset == pytest.approx(offset, abs=0.07 if suffix == "ts" and video and sound == 0 else 1e-3)
    assert codes == list(plan.frame_indices)
    assert plan.timestamps == pytest.approx([info.start_offset + i / 10 for i in plan.frame_indices])
    assert info.duration == pytest.approx(info.start_offset + 4.0)
    assert plan.to_dict()["start_offset"] == info.to_dict()["start_offset"] == info.start_offset


def test_a_late_first_frame_is_noted(tmp_path: Path) -> None:
    source = fetch_source(write_with_sound(tmp_path / "late.mp4", video_start=1.5))
    sentence = "its first frame is shown at 1.5 s; all times count from the start of the file, as players do"
    with pytest.warns(KeyeWarning) as caught:
        item = Processor(V20).video(source)
    assert [str(warning.message) for warning in caught] == [f"late.mp4: {sentence}"]
    assert isinstance(item.plan, VideoPlan) and item.plan.notes == (sentence,)
    assert item.pieces[0] == V20.frame_text.format(seconds=1.5)


def test_notes_come_through_the_decode_service(tmp_path: Path) -> None:
    work = VideoWork(fetch_source(write_with_sound(tmp_path / "late.mp4", video_start=1.5)), V20)
    pixels: list[NDArray[np.uint8]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begun = work.begin()
        rest = begun.write(lambda frame: pixels.append(frame.ravel()))
        begun.close()
    with pytest.warns(KeyeWarning, match="first frame is shown at 1.5 s") as caught:
        built = work.result(rest, np.concatenate(pixels))
    assert len(caught) == 1
    assert built.plan.timestamps[0] == 1.5


def test_parts_are_chosen_by_the_clock_of_players(tmp_path: Path) -> None:
    with VideoReader(fetch_source(write_with_sound(tmp_path / "late.mkv", video_start=1.5))) as reader:
        _, plan, codes = read(reader, video_start=2.0, video_end=3.0, fps=10)
        assert (codes[0], codes[-1]) == (5, 15)
        assert (plan.timestamps[0], plan.timestamps[-1]) == (2.0, 3.0)
        assert read(reader, video_start=0.0, video_end=2.0)[2][0] == 0
        with pytest.raises(
            KeyeError, match="video_end=1 lies before the first frame of the video, which is shown at 1.50"
        ):
            read(reader, video_end=1.0)
        with pytest.raises(KeyeError, match="video_start=6 lies after the end of the video at 5.50 s"):
            read(reader, video_start=6.0)


@pytest.mark.parametrize("times_ms", [None, [i * 4000 for i in range(5)] + [29000]])
def test_a_part_between_two_frames_has_the_one_on_display(tmp_path: Path, times_ms: list[int] | None) -> None:
    """Slides of 4 s each, evenly and with a longer one before the last."""
    with VideoReader(
        fetch_source(write_clip(tmp_path / "slides.mkv", frames=6, times_ms=times_ms or [i * 4000 for i in range(6)]))
    ) as reader:
        for config in (PREVIEW, V15, V20):
            plan = reader.plan(config, MediaOptions(video_start=9.0, video_end=11.0))
            assert plan.timestamps == (8.0,)
        _, plan, codes = read(reader, video_start=9.0, video_end=11.0)
        assert (codes, plan.part) == ([2], (9.0, 11.0))
        assert read(reader, video_start=9.0, video_end=13.0)[2] == [2, 3]
        last = 29 if times_ms else 20
        assert read(reader, video_start=last + 0.01, video_end=last + 1)[2] == [5]
        assert read(reader, video_start=1.0, video_end=4.0)[2] == [0, 1]


def test_a_part_that_begins_within_a_frame_includes_it(tmp_path: Path) -> None:
    with VideoReader(fetch_source(write_clip(tmp_path / "clip.mp4", frames=30, fps=10))) as reader:
        for start, first in ((1.0, 10), (1.04, 10), (1.0999, 11), (1.1, 11)):
            assert read(reader, video_start=start, video_end=2.0, fps=10)[2] == list(range(first, 21))


def test_a_part_of_a_variable_rate_has_a_rate_of_its_own(tmp_path: Path) -> None:
    """30 frames a second with a gap of 10 s: 6.9 a second on the whole."""
    times = [round(i * 1000 / 30) + (10_000 if i >= 45 else 0) for i in range(90)]
    with VideoReader(fetch_source(write_clip(tmp_path / "gap.mkv", frames=90, times_ms=times))) as reader:
        info, plan, codes = read(reader, video_start=0.0, video_end=1.4, fps=2)
        assert info.fps < 7
        assert codes == [0, 42]
        assert plan.sample_fps == pytest.approx(2 / 1.4)
        assert read(reader, video_start=11.5, video_end=12.5, nframes=4)[1].frames == 4
        assert read(reader, video_start=2.0, video_end=11.0)[2] == [44], "one frame is on display all the time"
        _, plan, _ = read(reader, video_start=1.0, video_end=9.0, fps=2)
        assert plan.timestamps == pytest.approx([1.0, 1.467])


def test_a_dense_passage_of_a_slow_video_is_sampled(tmp_path: Path) -> None:
    """A picture each 10 s, and 20 in two seconds among them."""
    times = [0, 10_000, *range(20_000, 22_000, 100), 30_000, 40_000, 50_000]
    _, plan, codes = read(write_clip(tmp_path / "clip.mkv", frames=len(times), times_ms=times), fps=2)
    assert {0, 1, 22, 23, 24} < set(codes)
    assert sum(20.0 <= time <= 22.0 for time in plan.timestamps) == pytest.approx(5, abs=1)


def test_rates_that_no_file_has_are_bounded(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mkv", frames=4, times_ms=[0, 1000, 5000, 9000])
    assert read(path, fps=1e15, video_total_pixels=1e15)[2] == [0, 1, 2, 3]


def test_strict_official_counts_indices_at_the_average_rate(tmp_path: Path) -> None:
    times = [0, 100, 200, 5000, 5100, 9000]
    source = fetch_source(write_clip(tmp_path / "clip.mkv", frames=6, times_ms=times))
    with pytest.warns(KeyeWarning, match=r"labelled as the official code counts, .* up to .* from what players show"):
        item = Processor(V15).video(source, MediaOptions(fps=100, strict_official=True))
    plan, rate = item.plan, probe(source).declared_fps
    assert isinstance(plan, VideoPlan) and rate is not None
    assert plan.label_times == tuple(i / rate for i in plan.frame_indices)
    assert plan.timestamps == pytest.approx([times[i] / 1000 for i in plan.frame_indices])
    labels = [piece.split("<|fast_start|>")[0] for piece in item.pieces if isinstance(piece, str) and "frame" in piece]
    assert [label.removeprefix("<|fast_end|>") for label in labels] == [f"<|frame|>{t:.1f}" for t in plan.label_times]


def test_strict_official_labels_are_free_of_the_rounding_of_mkv(tmp_path: Path) -> None:
    """Times of mkv are rounded to 1 ms: at 29.97 fps some labels change by that."""
    path = write_clip(tmp_path / "clip.mkv", frames=400, times_ms=[round(i * 1001 / 30) for i in range(400)])
    plan = plan_video(fetch_source(path), V15, MediaOptions(strict_official=True))
    info = probe(fetch_source(path))
    assert plan.label_times == tuple(i / (info.declared_fps or 0) for i in plan.frame_indices)
    assert plan.notes == ()


def test_strict_official_counts_from_the_first_picture(tmp_path: Path) -> None:
    source = fetch_source(write_with_sound(tmp_path / "late.mp4", video_start=1.5))
    with pytest.warns(KeyeWarning, match="up to 1.5 s from what players show"):
        plan = plan_video(source, V20, MediaOptions(strict_official=True))
    assert (plan.labels[0], plan.timestamps[0], plan.start_offset) == (0.0, 1.5, 1.5)


def test_preview_receives_no_times(tmp_path: Path) -> None:
    source = fetch_source(write_clip(tmp_path / "clip.mp4", frames=60, fps=10))
    with pytest.warns(KeyeWarning, match=r"count from the first sampled frame, at 2\.0 s"):
        plan = plan_video(source, PREVIEW, MediaOptions(video_start=2.0))
    assert plan.label_times is None


def test_sound_that_goes_on_is_noted(tmp_path: Path) -> None:
    source = fetch_source(write_with_sound(tmp_path / "long.mp4", frames=20, sound_seconds=6.0))
    with pytest.warns(KeyeWarning, match=r"^long.mp4: the file declares 6\.0 s; its pictures end at 2\.0 s$"):
        plan_video(source, V20)
    assert not probe(source).cut_short
    late = write_with_sound(tmp_path / "late.mp4", frames=20, video_start=1.5, sound_seconds=6.0)
    (note,) = probe(fetch_source(late)).notes
    clock = "all times count from the start of the file, as players do"
    assert str(note) == f"the file declares 6.0 s; its pictures run from 1.5 to 3.5 s; {clock}"


def test_frames_that_an_edit_list_leaves_out_are_noted(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", frames=60, gop=60, options={"bf": "0"})
    trim_mp4(path, 30)
    (note,) = probe(fetch_source(path)).notes
    assert str(note) == "the file declares 60 frames; 30 are shown"


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi", "mpg", "flv", "gif"])
def test_ordinary_files_have_no_notes(tmp_path: Path, suffix: str) -> None:
    codec = {"mpg": "mpeg2video", "gif": "gif", "avi": "mpeg4"}.get(suffix, "libx264")
    path = write_clip(
        tmp_path / f"clip.{suffix}", frames=60, codec=codec, pix_fmt="rgb8" if codec == "gif" else "yuv420p"
    )
    assert probe(fetch_source(path)).notes == ()


def test_an_end_beyond_the_video_is_noted(tmp_path: Path) -> None:
    source = fetch_source(write_clip(tmp_path / "clip.mp4", frames=60))
    with pytest.warns(
        KeyeWarning, match=r"^video_end=60 lies after the end of clip.mp4 at 2\.0 s; the part ends there$"
    ):
        plan = plan_video(source, V20, MediaOptions(video_start=1, video_end=60))
    assert plan.timestamps[-1] == pytest.approx(59 / 30)


def described(times_ms: list[int], container_start: float, fps: float, *, constant: bool) -> VideoInfo:
    return VideoInfo(
        name="clip", format="", codec="", width=160, height=96, rotation=0, fps=fps, time_base=Fraction(1, 1000),
        pts=tuple(times_ms), exact_times=True, constant_rate=constant, declared_duration=None,
        container_start=container_start,
    )  # fmt: skip


@given(
    st.lists(st.integers(2000, 200_000), min_size=2, max_size=60, unique=True).map(sorted),
    st.floats(0, 2),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from([0.1, 2.0, 1000.0]),
    st.sampled_from([PREVIEW, V15, V20]),
)
@pytest.mark.filterwarnings("ignore")
def test_any_part_of_any_times_is_what_is_on_display(
    times: list[int], begin: float, first_share: float, other: float, fps: float, config: ProcessorConfig
) -> None:
    info = described(times, begin, (len(times) - 1) / (times[-1] - times[0]) * 1000, constant=False)
    span = info.duration - info.start_offset
    start, end = sorted(info.start_offset + share * span * 0.99 for share in (first_share, other))
    plan = make_plan(info, config, MediaOptions(fps=fps, video_start=start, video_end=end))
    ends = (*info.timestamps[1:], info.duration)
    assert 1 <= plan.frames == len(set(plan.frame_indices)) <= len(times)
    assert info.timestamps[plan.frame_indices[0]] <= start + 1e-3 < ends[plan.frame_indices[0]] + 2e-3
    assert all(info.timestamps[i] <= end + 2e-3 and ends[i] > start - 2e-3 for i in plan.frame_indices)


def test_joined_parts_are_noted(tmp_path: Path) -> None:
    part = write_clip(tmp_path / "part.ts", frames=60).read_bytes()
    (tmp_path / "joined.ts").write_bytes(part * 2)
    (note,) = probe(fetch_source(tmp_path / "joined.ts")).notes
    assert str(note) == "its clock begins again or jumps at 2.0 s; what follows goes on from there without a gap"
