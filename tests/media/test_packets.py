"""What packets tell of frames where neither their times nor their number do: leading, packed and damaged ones."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.errors import KeyeWarning, MediaError
from keye.media.container.timeline import KEY, NONE, Joiner, Packets, lay_out
from keye.media.info import VideoInfo
from keye.media.plan import VideoPlan
from keye.media.source.fetch import fetch_source
from keye.media.video import VideoReader, plan_video
from tests.support.clips import read_code, write_clip

CONFIG = ProcessorConfig(video_min_tokens=16, video_max_tokens=60)
slow = pytest.mark.slow
OPEN_HEVC = {"x265-params": "open-gop=1:bframes=3:keyint=12:min-keyint=12:scenecut=0:log-level=none"}


def read(path: Path) -> tuple[VideoInfo, list[int], list[float]]:
    """Facts, and of every frame the number that it shows and its time."""
    with VideoReader(fetch_source(path)) as reader:
        info = reader.info
        plan = VideoPlan.of(info, range(info.frame_count), (96, 160), tokens_per_frame=0, rate=1)
        return info, [read_code(frame) for frame in reader.frames(plan)], list(plan.timestamps)


def copy_from(path: Path, source: Path, first: int) -> Path:
    """The packets of a video from number `first` on, in another container."""
    with av.open(str(source)) as value, av.open(str(path), "w") as built:
        stream = built.add_stream_from_template(value.streams.video[0])
        for number, packet in enumerate(packet for packet in value.demux(video=0) if packet.size):
            if number >= first:
                packet.stream = stream
                built.mux(packet)
    return path


@pytest.mark.parametrize("name", ["cut.hevc", pytest.param("cut.mkv", marks=slow), pytest.param("cut.ts", marks=slow)])
def test_leading_pictures_of_hevc_that_lack_what_they_need(tmp_path: Path, name: str) -> None:
    full = write_clip(tmp_path / "whole.mkv", frames=60, codec="libx265", options=OPEN_HEVC)
    with av.open(str(full)) as container:
        key = [i for i, packet in enumerate(container.demux(video=0)) if packet.is_keyframe][2]
    info, codes, times = read(copy_from(tmp_path / name, full, key))
    assert codes == list(range(codes[0], 60))
    assert info.frame_count == len(codes) < 60 - key
    assert np.diff(times) == pytest.approx(1 / 30, abs=2e-3)


def test_leading_pictures_of_mpeg4_in_avi(tmp_path: Path) -> None:
    full = write_clip(tmp_path / "whole.avi", frames=60, codec="mpeg4", gop=12, options={"bf": "2"})
    with av.open(str(full)) as container:
        key = [i for i, packet in enumerate(container.demux(video=0)) if packet.is_keyframe][2]
    info, codes, _ = read(copy_from(tmp_path / "cut.avi", full, key))
    assert codes == list(range(codes[0], 60))
    assert info.frame_count == len(codes)


def test_packed_frames_with_times() -> None:
    """Copying XviD from AVI to MP4 or Matroska gives packets times of showing that are not those of their frames."""
    packets = Packets()
    for pts, dts in ((1, 0), (2, 1), (4, 2), (6, 4), (5, 5), (7, 6)):
        packets.add(pts, dts, 1, KEY if not dts else 0)
    messages = lay_out(packets, "mpeg4", 1, 1, lambda: False)
    counted = lay_out(packets, "mpeg4", 1, 1, lambda: True)
    assert (list(messages.times), list(counted.times)) == ([1, 2, 4, 5, 6, 7], [1, 2, 4, 5, 6, 7])
    assert messages.stamps is not None
    assert counted.stamps is None


@pytest.mark.parametrize("rate", [12, 120])
def test_rates_of_raw_pictures_that_are_guessed_wrong(tmp_path: Path, rate: int) -> None:
    info, codes, times = read(write_clip(tmp_path / "clip.h264", frames=24, fps=rate))
    assert codes == list(range(24))
    assert info.fps == pytest.approx(rate)
    assert times[-1] == pytest.approx(23 / rate, abs=1e-3)


def test_frames_of_hevc_that_do_not_come_are_damage(tmp_path: Path) -> None:
    data = write_clip(
        tmp_path / "clip.ts", frames=60, codec="libx265", options={"x265-params": "keyint=20:log-level=none"}
    ).read_bytes()
    path = tmp_path / "zeros.ts"
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(188 * 2) + data[middle + 188 * 2 :])
    with pytest.warns(KeyeWarning, match="are made up"):
        read(path)


def test_avi_that_ends_early(tmp_path: Path) -> None:
    """Its index is at the end; the length that it declares is the number of its frames."""
    path = write_clip(tmp_path / "clip.avi", frames=120, codec="mpeg4")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.6)])
    with pytest.raises(MediaError, match=r"clip\.avi is cut short: .* of 4\.0 s can be read"):
        plan_video(path, CONFIG)
    with pytest.warns(KeyeWarning, match=r"the file declares 4\.0 s and 120 frames; its pictures end at"):
        plan_video(path, CONFIG, MediaOptions(video_end=1.0))


def test_pictures_that_change_their_size(tmp_path: Path) -> None:
    small = write_clip(tmp_path / "small.ts", frames=10)
    large = write_clip(tmp_path / "large.ts", frames=10, size=(320, 192))
    path = tmp_path / "joined.ts"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    change = r"change their size: 320x192 from 0\.3 s on; all are stretched to the 160x96 of the first"
    with pytest.warns(KeyeWarning, match=change):
        info, codes, _ = read(path)
    assert (info.width, codes) == (160, [*range(10), *range(10)])


def times_of(*pairs: tuple[int, int]) -> list[tuple[int, int]]:
    """(pts, dts) of packets once damaged ones are mended; one unit is a second."""
    packets = Packets()
    for pts, dts in pairs:
        packets.add(pts, dts, 1, 0)
    packets.mend_times(1.0)
    return list(zip(packets.pts, packets.dts, strict=True))


def test_single_times_that_are_damaged() -> None:
    good = [(i, i) for i in range(8)]
    assert times_of(*good) == good
    assert times_of(*good[:4], (9000, 4), *good[5:]) == good
    assert times_of(*good[:4], (4, 9000), *good[5:]) == good
    assert times_of(*good[:4], (9000, 9000), *good[5:]) == good
    assert times_of(*good[:4], (NONE, 2), *good[5:])[4] == (NONE, 4)
    slides = [(0, -600), (1200, 0), (600, 600), (1800, 1200), (3600, 1800)]
    assert times_of(*slides) == slides


def test_a_damaged_time_joins_no_parts() -> None:
    joiner = Joiner(1.0, jumps=True)
    value = [(0, 0), (1, 1), (2, 70_000), (3, 3), (9, 9), (5, 5), (6, 6)]
    result = [joiner.shift(dts, pts, 1) for pts, dts in value]
    assert [pts for _, pts, _ in result] == [0, 1, 2, 3, 9, 5, 6]
    assert not any(joins for _, _, joins in result)
