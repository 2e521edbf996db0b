"""Frames of files whose packets do not tell plainly when they are shown: joined, trimmed, untimed, damaged ones."""

from __future__ import annotations

import io
import os
import signal
import warnings
from pathlib import Path

import av
import numpy as np
import pytest

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.errors import KeyeError, KeyeWarning, MediaError
from keye.media.container.completeness import ends_early
from keye.media.container.timeline import BETWEEN, CLOSED, HIDDEN, JOIN, KEY, NONE, Joiner, Packets, Timeline, lay_out
from keye.media.info import VideoInfo
from keye.media.plan import VideoPlan
from keye.media.source.fetch import fetch_source
from keye.media.video import VideoReader, plan_video
from tests.support.clips import damage_avi, read_code, trim_mp4, write_clip

CONFIG = ProcessorConfig(video_min_tokens=16, video_max_tokens=60)
slow = pytest.mark.slow
REFRESH = {"tune": "zerolatency", "x264-params": "intra-refresh=1:keyint=20"}


def read(path: Path, step: int = 1, first: int = 0) -> tuple[VideoInfo, list[int], list[float]]:
    """Facts, and of every `step`th frame from `first` on the number that it shows and its time."""
    with VideoReader(fetch_source(path)) as reader:
        info = reader.info
        plan = VideoPlan.of(info, range(first, info.frame_count, step), (96, 160), tokens_per_frame=0, rate=1)
        return info, [read_code(frame) for frame in reader.frames(plan)], list(plan.timestamps)


def join(path: Path, *parts: Path) -> Path:
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Transport streams: one that begins at 1.4 s, and ones whose clock begins elsewhere, in seconds."""
    folder = tmp_path_factory.mktemp("parts")
    offsets = {"a": 0.0, "hours": 36_000.0, "gap": 4.0, "end": 2**33 / 90_000 - 1}
    return {
        name: write_clip(folder / f"{name}.ts", frames=45, gop=15,
                         container_options={"output_ts_offset": str(offset)})
        for name, offset in offsets.items()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "second"),
    [
        (("a", "a"), 1.5),
        (("a", "hours"), 1.5),
        (("hours", "a"), 1.5),
        (("end", "a"), 1.5),
        (("a", "gap"), 4.0 - 2 / 30),  # less than ten seconds are a gap
    ],
)
def test_parts_of_a_stream_make_one_clock(
    tmp_path: Path, parts: dict[str, Path], names: tuple[str, ...], second: float
) -> None:
    path = join(tmp_path / "joined.ts", *(parts[name] for name in names))
    times = [i / 30 for i in range(45)] + [second + i / 30 for i in range(45)]
    for step, first in ((1, 0), (11, 0), (1, 70)):
        info, codes, seen = read(path, step, first)
        assert codes == [*range(45), *range(45)][first::step]
        assert seen == pytest.approx(times[first::step], abs=1e-4)
        assert info.duration == pytest.approx(second + 1.5, abs=1e-4)
        assert not info.cut_short
        assert info.damage == () or names == ("a", "gap")


def test_a_clock_that_runs_over(parts: dict[str, Path]) -> None:
    info, codes, times = read(parts["end"])
    assert codes == list(range(45))
    assert times == pytest.approx([i / 30 for i in range(45)], abs=1e-4)
    assert info.duration == pytest.approx(1.5, abs=1e-4)


def test_a_part_of_a_joined_stream(tmp_path: Path, parts: dict[str, Path]) -> None:
    path = join(tmp_path / "joined.ts", parts["a"], parts["hours"])
    with VideoReader(fetch_source(path)) as reader:
        plan = reader.plan(CONFIG, MediaOptions(video_start=2.0, video_end=2.5, fps=10))
        assert [read_code(frame) for frame in reader.frames(plan)] == [i - 45 for i in plan.frame_indices]
    assert plan.timestamps[0] == pytest.approx(2.0, abs=1e-3)


@pytest.mark.parametrize(
    ("codec", "bframes"),
    [
        pytest.param("libx264", "0", marks=slow),
        ("libx264", "2"),
        pytest.param("libx265", "2", marks=slow),
        pytest.param("mpeg4", "2", marks=slow),
    ],
)
def test_a_trim_shows_the_frames_from_its_start_on(tmp_path: Path, codec: str, bframes: str) -> None:
    """What comes before the start inside its group of pictures is decoded and not shown."""
    options = {"x265-params": f"bframes={bframes}:log-level=none"} if codec == "libx265" else {"bf": bframes}
    path = trim_mp4(write_clip(tmp_path / "clip.mp4", codec=codec, options=options, gop=24), 30)
    for step in (1, 7):
        info, codes, times = read(path, step)
        assert info.frame_count == 30
        assert codes == list(range(30, 60))[::step]
        assert times == pytest.approx([i / 30 for i in range(30)][::step], abs=1e-6)


@pytest.mark.parametrize(
    "name", [pytest.param("clip.mp4", marks=slow), pytest.param("clip.mkv", marks=slow), "clip.ts"]
)
def test_recovery_points_are_no_keys(tmp_path: Path, name: str) -> None:
    path = write_clip(tmp_path / name, frames=100, options=REFRESH)
    every = read(path)[1]
    assert every == list(range(100))
    assert read(path, 30, 50)[1] == [50, 80]


def test_a_stream_that_begins_inside_a_refresh(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.ts", frames=60, options=REFRESH)
    path.write_bytes(path.read_bytes()[188 * 40 :])
    with av.open(str(path)) as container:
        count = sum(1 for _ in container.decode(video=0))
    info, codes, _ = read(path)
    assert info.frame_count == count > 0
    assert codes == list(range(60 - count, 60))
    assert read(path, 13)[1] == codes[::13]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_avi_with_b_frames(tmp_path: Path, codec: str) -> None:
    """AVI tells when frames are decoded; the first is shown when those it is reordered with have come."""
    path = write_clip(tmp_path / "clip.avi", frames=90, codec=codec, gop=30, options={"bf": "2"})
    for step, first in ((1, 0), (17, 5), (1, 70)):
        info, codes, times = read(path, step, first)
        assert info.frame_count == 90
        assert codes == list(range(90))[first::step]
        assert np.diff(times) == pytest.approx(step / 30, abs=1e-5)
    assert 0 < info.start_offset < 0.1


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("clip.h264", "libx264"),
        pytest.param("clip.hevc", "libx265", marks=slow),
        pytest.param("clip.m4v", "mpeg4", marks=slow),
        pytest.param("clip.m2v", "mpeg2video", marks=slow),
    ],
)
def test_rates_of_raw_pictures(tmp_path: Path, name: str, codec: str) -> None:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = write_clip(tmp_path / name, frames=90, codec=codec, options=options, gop=30)
    info, codes, times = read(path)
    assert codes == list(range(90))
    assert info.fps == pytest.approx(30)
    assert times[-1] - times[0] == pytest.approx(89 / 30, abs=1e-3)
    assert read(path, 17, 5)[1] == codes[5::17]


def test_one_lost_packet(tmp_path: Path) -> None:
    full = write_clip(tmp_path / "clip.ts", frames=90, gop=30, size=(320, 192)).read_bytes()
    packets = [full[i : i + 188] for i in range(0, len(full), 188)]
    del packets[len(packets) // 2]
    path = tmp_path / "lost.ts"
    path.write_bytes(b"".join(packets))
    with VideoReader(fetch_source(path)) as reader:
        ((begin, end),) = reader.info.damage
        assert 1.0 < begin < end <= 2.1
        with pytest.warns(KeyeWarning, match=rf"damaged or missing: its pictures at {begin:.1f} to {end:.1f} s are"):
            plan = reader.plan(CONFIG, MediaOptions(fps=10))
        for frame, time in zip(reader.frames(plan), plan.timestamps, strict=True):
            assert begin <= time <= end or read_code(frame) == round(time * 30)
        with pytest.raises(MediaError, match=r"lost.ts is damaged at 1.* s; download it again or leave strict"):
            reader.plan(CONFIG, MediaOptions(strict_media=True))


def test_damage_that_only_decoding_shows(tmp_path: Path) -> None:
    path = damage_avi(write_clip(tmp_path / "clip.avi", frames=120, codec="mpeg4", gop=12, size=(640, 384)), 70)
    with VideoReader(fetch_source(path)) as reader, warnings.catch_warnings():
        warnings.simplefilter("error", KeyeWarning)
        plan, strict = (
            reader.plan(CONFIG, MediaOptions(fps=10, video_end=end, strict_media=end < 2)) for end in (3.9, 1.0)
        )
        reader.read(strict)  # the damage comes later
        with pytest.raises(KeyeWarning, match=r"its pictures at 2.[34] s are made up from those around"):
            reader.read(plan)
        with pytest.raises(
            MediaError, match=r"clip.avi is damaged near 2.[34] s; download it again or leave strict_media"
        ):
            reader.read(reader.plan(CONFIG, MediaOptions(fps=10, strict_media=True)))


def test_pieces_of_a_recording(tmp_path: Path) -> None:
    """Fragments without those before them, as segments of a stream are stored."""
    movflags = {"movflags": "frag_keyframe+empty_moov+default_base_moof+dash"}
    data = write_clip(tmp_path / "clip.mp4", frames=90, gop=30, container_options=movflags).read_bytes()
    places = [place - 4 for place in range(len(data)) if data.startswith(b"moof", place)]
    assert len(places) == 3
    path = tmp_path / "piece.mp4"
    for begin, end, first in ((places[1], places[2], 30), (places[2], len(data), 60)):
        path.write_bytes(data[: places[0]] + data[begin:end])
        info, codes, times = read(path)
        assert codes == list(range(first, first + 30))
        assert times == pytest.approx([i / 30 for i in range(30)], abs=1e-4)
        assert not info.cut_short
        plan_video(fetch_source(path), CONFIG, MediaOptions(strict_media=True))


def test_what_is_there_of_a_file_that_ends_early(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", frames=150, container_options={"movflags": "faststart"}, gop=15)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.6)])
    source = fetch_source(path)
    info, codes, times = read(path)
    assert info.cut_short
    assert info.duration < 4.5
    assert codes == [round(time * 30) for time in times]
    for options in ({}, {"video_start": 1.0, "video_end": 4.9}):
        with pytest.raises(MediaError, match=r"clip.mp4 is cut short: .* of 5.0 s can be read; .* pass video_end="):
            plan_video(source, CONFIG, MediaOptions(**options))
    with pytest.warns(KeyeWarning, match=r"clip.mp4: the file declares 5.0 s and 150 frames; its pictures end at"):
        plan_video(source, CONFIG, MediaOptions(video_end=1.0))
    with pytest.raises(MediaError, match=r"clip.mp4 is cut short: .* of 5.0 s can be read; .* leave strict_media out"):
        plan_video(source, CONFIG, MediaOptions(video_end=1.0, strict_media=True))


def mp4(*boxes: tuple[bytes, int]) -> bytes:
    return b"".join((size + 8).to_bytes(4, "big") + kind + bytes(size) for kind, size in boxes)


def mkv(size: bytes, content: int) -> bytes:
    return b"\x1a\x45\xdf\xa3\x84\0\0\0\0" + b"\x18\x53\x80\x67" + size + bytes(content)


def avi(size: int, content: int) -> bytes:
    return b"RIFF" + size.to_bytes(4, "little") + b"AVI " + bytes(content)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (mp4((b"ftyp", 8), (b"moov", 50), (b"mdat", 100)), False),
        (mp4((b"ftyp", 8), (b"moov", 50), (b"mdat", 100))[:-1], True),
        (mp4((b"styp", 8), (b"moof", 50), (b"mdat", 100)) * 3, False),
        (mp4((b"ftyp", 8)) + b"\0\0\0\0mdat" + bytes(20), False),
        (mp4((b"ftyp", 8)) + b"\0\0\0\1mdat" + (116).to_bytes(8, "big") + bytes(100), False),
        (mp4((b"ftyp", 8)) + b"\0\0\0\1mdat" + (117).to_bytes(8, "big") + bytes(100), True),
        (mp4((b"ftyp", 8), (b"mdat", 100)) + b"\1", False),
        (mp4((b"ftyp", 8), (b"mdat", 100)) + b"\0\0\1", False),
        (mp4((b"ftyp", 8)) + b"\0\0\0\3junk" + bytes(20), None),
        (mkv(b"\x40\x64", 100), False),
        (mkv(b"\x40\x64", 99), True),
        (mkv(b"\xff", 99), None),
        (mkv(b"\x01" + b"\xff" * 7, 99), None),
        (avi(104, 100), False),
        (avi(104, 90), True),
        (avi(0, 99), None),
        (avi(104, 100) + avi(104, 100), False),
        (avi(104, 100) + avi(104, 50), True),
        (b"FLV\1" + bytes(9) + b"\x09\0\0\5" + bytes(12) + b"\0\0\0\x10", False),
        (b"FLV\1" + bytes(9) + b"\x09\0\0\5" + bytes(12) + b"\0\0\0", True),
        (b"GIF89a" + bytes(20) + b";" + bytes(3), False),
        (b"GIF89a" + bytes(20) + b"x", True),
        (b"G" * 188, None),
        (b"", None),
    ],
)
def test_files_that_tell_whether_bytes_are_missing(data: bytes, expected: bool | None) -> None:
    assert ends_early(io.BytesIO(data)) is expected


def test_frames_are_asked_for_again_after_an_iterator_was_left(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", frames=200, size=(320, 192))
    with VideoReader(fetch_source(path)) as reader:
        plan = reader.plan(CONFIG, MediaOptions(fps=30))
        for count in (0, 1, 5):
            for place, frame in enumerate(reader.frames(plan)):
                assert read_code(frame) == plan.frame_indices[place]
                if place == count:
                    break
        early, late = reader.frames(plan), reader.frames(plan)
        next(early)
        assert read_code(next(late)) == 0
        with pytest.raises(KeyeError, match="frames of another plan were asked for meanwhile"):
            next(early)
        assert [read_code(frame) for frame in late] == list(plan.frame_indices[1:])
        assert [read_code(frame) for frame in reader.read(plan)] == list(plan.frame_indices)


def test_a_worker_that_was_killed_does_not_blame_the_file(tmp_path: Path) -> None:
    with VideoReader(fetch_source(write_clip(tmp_path / "clip.mp4"))) as reader:
        os.kill(reader.worker.process.pid, signal.SIGKILL)
        with pytest.raises(MediaError, match=r"the video decoder of clip.mp4 was ended from outside, perhaps because"):
            reader.read(reader.plan(CONFIG))


def test_frames_of_vp8_that_are_not_shown(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.ivf", frames=20, codec="libvpx", options={"auto-alt-ref": "0"})
    data = bytearray(path.read_bytes())
    place = 32  # of the header of a file; that of a frame has 12 bytes
    for number in range(20):
        if number in (7, 8, 15):
            assert data[place + 12] & 1, "a key"
            data[place + 12] &= ~0x10
        place += 12 + int.from_bytes(data[place : place + 4], "little")
    path.write_bytes(bytes(data))
    for step in (1, 5):
        info, _, times = read(path, step)
        assert info.frame_count == 17
        displayed = [i for i in range(20) if i not in (7, 8, 15)]
        assert times == pytest.approx([i / 30 for i in displayed][::step], abs=1e-6)


def packets(*entries: tuple[int, int, int]) -> Packets:
    """Packets of (pts, dts, flags), each one unit long."""
    result = Packets()
    for pts, dts, flags in entries:
        result.add(None if pts == NONE else pts, None if dts == NONE else dts, 1, flags)
    return result


def timeline(result: Packets, *, codec: str = "h264", delay: int = 0, step: int = 1, reorders: bool = True) -> Timeline:
    return lay_out(result, codec, delay, step, lambda: reorders)


def test_times_ascend_in_each_part() -> None:
    result = timeline(packets((0, 0, KEY), (3, 1, 0), (2, 2, 0), (3, 3, KEY | JOIN), (4, 4, 0), (5, 5, 0)), delay=1)
    assert list(result.times) == [0, 2, 3, 4, 5, 6]
    assert result.stamps is not None
    assert list(result.stamps) == [0, 3, 2, 4, 5, 6]


def test_where_decoding_begins() -> None:
    """A frame shown before the key that it comes after in the file needs the group before."""
    entries = ((0, 0, KEY), (1, 1, 0), (4, 2, KEY), (2, 3, 0), (3, 4, 0), (5, 5, 0))
    result = timeline(packets(*entries), delay=2)
    assert list(result.times) == [0, 1, 2, 3, 4, 5]
    assert [result.starts[result.start(time)] for time in (0, 1, 2, 3, 4, 5)] == [0, 0, 0, 0, 2, 2]


def test_what_comes_before_the_first_key_is_left_out() -> None:
    result = packets((0, 0, 0), (5, 1, KEY), (3, 2, 0), (6, 3, 0), (7, 4, HIDDEN))
    assert result.leads(1, 5)
    assert not result.leads(1, 2)
    assert list(timeline(result, delay=1).times) == [3, 5, 6]  # whether 3 can be decoded is for the decoder to say


def test_times_of_decoding_given_as_times_of_showing() -> None:
    entries = [(i, i, KEY | CLOSED if i % 4 == 0 else 0) for i in range(8)]
    counted = timeline(packets(*entries), delay=2)
    assert counted.stamps is None
    assert list(counted.times) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert [counted.starts[counted.start(time)] for time in (2, 5, 6, 9)] == [0, 0, 4, 4]
    assert list(timeline(packets(*entries), delay=2, reorders=False).times) == list(range(8))


def test_packed_pictures_are_shown_at_the_times_of_decoding() -> None:
    """As XviD packs them: a time is missing after each, and the decoder holds one frame back."""
    result = timeline(packets((NONE, 0, KEY), (NONE, 2, 0), (NONE, 3, 0), (NONE, 5, 0)), codec="mpeg4", delay=1)
    assert list(result.times) == [2, 3, 5, 6]
    assert result.exact


def test_frames_without_any_time_are_counted() -> None:
    result = timeline(packets(*[(NONE, NONE, KEY)] * 4), delay=1, step=5)
    assert list(result.times) == [0, 5, 10, 15]
    assert not result.exact


def test_frames_that_are_counted_begin_with_the_first_key() -> None:
    entries = (
        (NONE, NONE, 0),
        (NONE, NONE, 0),
        (NONE, NONE, KEY | CLOSED),
        (NONE, NONE, 0),
        (NONE, NONE, KEY | CLOSED),
    )
    result = timeline(packets(*entries), delay=1, step=5)
    assert list(result.times) == [0, 5, 10]
    assert (list(result.starts), list(result.begins)) == ([2, 4], [0, 2])


def test_references_of_mpeg_are_shown_after_the_pictures_between() -> None:
    entries = ((1, 0, KEY), (NONE, 1, 0), (NONE, 2, BETWEEN), (NONE, 3, BETWEEN), (NONE, 4, 0))
    result = timeline(packets(*entries), codec="mpeg2video", delay=1)
    assert result.stamps is not None
    assert list(result.stamps) == [1, 4, 2, 3, 5]


def shifted(joiner: Joiner, *times: int) -> list[int]:
    return [joiner.shift(time, None, 1)[0] for time in times]


def test_where_a_clock_begins_again() -> None:
    assert shifted(Joiner(1.0, jumps=True), 5, 6, 7, 0, 1, 1000, 1001) == [5, 6, 7, 8, 9, 10, 11]
    assert shifted(Joiner(1.0, jumps=True), 0, 1, 11, 12) == [0, 1, 11, 12]  # ten seconds at most are a gap
    assert shifted(Joiner(1.0, jumps=False), 0, 1, 1000, 1001) == [0, 1, 1000, 1001]
    assert shifted(Joiner(1.0, jumps=False), 9, 10, 3, 4) == [9, 10, 11, 12]


def test_a_gap_in_the_pictures_while_sound_goes_on() -> None:
    joiner = Joiner(1.0, jumps=True)
    assert shifted(joiner, 0, 1) == [0, 1]
    for second in range(60):
        joiner.follow(1, second, 1.0)
    assert shifted(joiner, 60, 61) == [60, 61]
    joiner.follow(1, 5000.0, 1.0)  # it jumps as well
    assert shifted(joiner, 5000, 5001) == [62, 63]
