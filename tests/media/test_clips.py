"""Clips show exactly the frames of their interval, for exactly as long."""

from __future__ import annotations

from pathlib import Path

import pytest

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.errors import KeyeError
from keye.media.clips import clip_prefixes, cut_clips, fit_interval
from keye.media.source.fetch import Source, fetch_source
from keye.media.video import VideoReader
from tests.support.clips import read_code, write_clip, write_with_sound


def codes_and_times(path: Path) -> tuple[list[int], list[float], float]:
    """The numbers that the frames show, their times, and the length of the file."""
    with VideoReader(fetch_source(path)) as reader:
        plan = reader.plan(ProcessorConfig(), MediaOptions(nframes=reader.info.frame_count))
        codes = [read_code(frame) for frame in reader.read(plan)]
        return codes, [round(time, 3) for time in plan.timestamps], reader.info.duration


def test_a_clip_holds_the_frames_of_its_interval(tmp_path: Path) -> None:
    source = fetch_source(write_clip(tmp_path / "source.mp4", frames=30, fps=10))
    seen: list[tuple[int, int]] = []
    paths = cut_clips(source, [(0.5, 1.5), (1.0, 3.0)], tmp_path / "out", progress=lambda *done: seen.append(done))
    assert [path.name for path in paths] == ["source-001-0.5s-1.5s.mp4", "source-002-1.0s-3.0s.mp4"]
    codes, times, length = codes_and_times(paths[0])
    assert codes == list(range(5, 15))
    assert times == [i / 10 for i in range(10)] and length == pytest.approx(1.0)
    assert codes_and_times(paths[1])[0] == list(range(10, 30))
    assert seen[-1] == (3, 3)


def test_clips_of_videos_of_the_same_name_do_not_replace_each_other(tmp_path: Path) -> None:
    for folder in ("day1", "day2"):
        (tmp_path / folder).mkdir()
    sources = [fetch_source(write_clip(tmp_path / folder / "a.mp4", frames=10, fps=10)) for folder in ("day1", "day2")]
    names = [
        cut_clips(source, [(0.0, 1.0)], tmp_path / "out", prefix=prefix)[0].name
        for source, prefix in zip(sources, clip_prefixes(sources), strict=True)
    ]
    assert names == ["1-a-001-0.0s-1.0s.mp4", "2-a-001-0.0s-1.0s.mp4"]
    assert clip_prefixes(sources[:1]) == [""]


def test_clips_of_what_was_piped_in_have_a_name_that_says_so(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "keye-stdin-x7a.mp4", frames=10, fps=10)
    piped = Source("standard input", path.stat().st_size, path=path, keep=path)
    assert [clip.name for clip in cut_clips(piped, [(0.0, 0.5)], tmp_path)] == ["standard-input-001-0.0s-0.5s.mp4"]


def test_irregular_times_are_kept(tmp_path: Path) -> None:
    times = [0, 100, 700, 1000, 1900, 2000]
    source = fetch_source(write_clip(tmp_path / "source.mkv", frames=6, times_ms=times))
    (path,) = cut_clips(source, [(0.4, 1.95)], tmp_path)
    # The clip begins with the frame on display at 0.4 s.
    codes, displayed, _ = codes_and_times(path)
    assert (codes, displayed) == ([1, 2, 3, 4], [0.0, 0.3, 0.6, 1.5])


def test_odd_sizes_lose_a_line(tmp_path: Path) -> None:
    source = fetch_source(write_clip(tmp_path / "source.mkv", codec="ffv1", pix_fmt="bgr0", frames=10, size=(161, 97)))
    (path,) = cut_clips(source, [(0.0, 1.0)], tmp_path)
    with VideoReader(fetch_source(path)) as reader:
        assert (reader.info.width, reader.info.height) == (160, 96)


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((2.0, 4.0), (2.0, 4.0)),
        ((2.0, 40.0), (2.0, 10.0)),
        ((3.0, 3.0), (2.75, 3.25)),
        ((0.0, 0.1), (0.0, 0.5)),
        ((9.9, 10.0), (9.5, 10.0)),
        ((10.0, 11.0), None),
        ((12.0, 13.0), None),
    ],
)
def test_intervals_are_fitted(interval: tuple[float, float], expected: tuple[float, float] | None) -> None:
    assert fit_interval(interval, 0.0, 10.0) == expected


def test_a_video_shorter_than_a_clip_is_taken_whole() -> None:
    assert fit_interval((0.1, 0.1), 0.0, 0.3) == (0.0, 0.3)


def test_intervals_before_the_first_picture() -> None:
    assert fit_interval((0.0, 3.0), 5.0, 10.0) is None
    assert fit_interval((3.0, 7.0), 5.0, 10.0) == (5.0, 7.0)
    assert fit_interval((4.9, 5.1), 5.0, 10.0) == (5.0, 5.5)


def test_clips_are_cut_by_the_clock_of_players(tmp_path: Path) -> None:
    source = fetch_source(write_with_sound(tmp_path / "late.mp4", video_start=1.5))
    first, second = cut_clips(source, [(0.0, 2.0), (3.0, 4.0), (0.2, 1.0)], tmp_path)
    assert (first.name, second.name) == ("late-001-1.5s-2.0s.mp4", "late-002-3.0s-4.0s.mp4")
    assert codes_and_times(first)[0] == [0, 1, 2, 3, 4]
    assert codes_and_times(second)[0] == list(range(15, 25))


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    source = fetch_source(write_clip(tmp_path / "source.mp4", frames=10, fps=10))
    (tmp_path / "file").touch()
    with pytest.raises(KeyeError, match="file cannot be written"):
        cut_clips(source, [(0.0, 1.0)], tmp_path / "file")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_clips(source, [(0.0, 1.0)], tmp_path / "deep" / "out", progress=stop)
    assert not (tmp_path / "deep").exists()


def test_only_clips_are_replaced(tmp_path: Path) -> None:
    source = fetch_source(write_clip(tmp_path / "source.mp4", frames=10, fps=10))
    out, pairs = tmp_path / "out", [(0.0, 0.5), (0.5, 1.0)]
    first, second = cut_clips(source, pairs, out)
    assert cut_clips(source, pairs, out) == [first, second], "our own are made again"
    remaining, before = b"a letter", first.read_bytes()
    second.write_bytes(remaining)
    first.write_bytes(b"")
    with pytest.raises(KeyeError, match=rf"{second.name} exists and is not an earlier output .* overwrite"):
        cut_clips(source, pairs, out)
    assert second.read_bytes() == remaining and first.read_bytes() == b"" and len(list(out.iterdir())) == 2
    cut_clips(source, pairs, out, overwrite=True)
    assert first.read_bytes() == before and len(list(out.iterdir())) == 2
