"""Pictures are shown as players show them: orientation, shape of pixels, track, interlacing, dynamic range."""

from __future__ import annotations

import itertools
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.engine.media import as_medium, plan_medium
from keye.errors import KeyeError, KeyeWarning, MediaError
from keye.media.clips import cut_clips
from keye.media.content import content_key, probe_cached
from keye.media.decode.display import check_aspect, display_size, interpolate_fields, orientation
from keye.media.info import VideoInfo
from keye.media.pixels.tone_map import to_sdr
from keye.media.plan import VideoPlan
from keye.media.processor import Processor
from keye.media.source.fetch import fetch_source
from keye.media.video import VideoReader, plan_video, probe
from tests.support.clips import set_matrix

CONFIG = ProcessorConfig(video_min_tokens=16, video_max_tokens=60)
#: Colours of the quarters of a picture, so that each orientation looks its own way.
CORNERS = ((220, 40, 40), (40, 200, 40), (40, 40, 220), (230, 230, 230))
ONES = [(a, 0, 0, d) for a, d in itertools.product((1, -1), repeat=2)]
ORIENTATIONS = [*ONES, *((0, b, c, 0) for b, c in itertools.product((1, -1), repeat=2))]


def quarters(width: int = 64, height: int = 48) -> NDArray[np.uint8]:
    picture = np.empty((height, width, 3), dtype=np.uint8)
    for place, colour in enumerate(CORNERS):
        rows, columns = divmod(place, 2)
        picture[rows * height // 2 :, columns * width // 2 :] = colour
    return picture


def write(path: Path, pictures: list[NDArray[np.uint8]], aspect: Fraction | None = None, matrix: int = 0) -> Path:
    """A video of pictures at 10 a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "10", "bf": "0"})
        stream.height, stream.width, _ = pictures[0].shape
        stream.pix_fmt = "yuv420p"
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if matrix:
            stream.set_display_rotation(matrix, hflip=True)
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def read(path: Path, track: int | None = None, **looks: bool) -> tuple[VideoInfo, NDArray[np.int16]]:
    """Facts, and all frames at their own size."""
    with VideoReader(fetch_source(path), track=track) as reader:
        info, options = reader.info, MediaOptions(**looks)  # type: ignore[arg-type]
        size = (info.height, info.width)
        plan = VideoPlan.of(info, range(info.frame_count), size, tokens_per_frame=0, rate=1, options=options)
        return info, reader.read(plan).astype(np.int16)


def planned(path: Path, **options: object) -> tuple[VideoPlan, list[str]]:
    """The plan and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = plan_video(fetch_source(path), CONFIG, MediaOptions(**options))  # type: ignore[arg-type]
    return plan, [str(warning.message) for warning in caught if warning.category is KeyeWarning]


def moved(picture: NDArray[np.uint8], a: int, b: int, c: int, d: int) -> NDArray[np.uint8]:
    """Each pixel where the display matrix shows it."""
    height, width, _ = picture.shape
    y, x = np.mgrid[:height, :width]
    across, down = a * x + c * y, b * x + d * y
    displayed = np.empty((np.ptp(down) + 1, np.ptp(across) + 1, 3), dtype=np.uint8)
    displayed[down - down.min(), across - across.min()] = picture
    return displayed


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_all_orientations(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    path = write(tmp_path / "clip.mp4", [quarters()] * 2)
    set_matrix(path, *matrix)
    expected = moved(quarters(), *matrix)
    info, frames = read(path)
    assert (info.height, info.width) == expected.shape[:2]
    assert np.abs(frames - expected).mean() < 3


def test_clips_are_upright(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", [quarters()] * 2)
    set_matrix(path, 0, 1, 1, 0)
    (clip,) = cut_clips(fetch_source(path), [(0.0, 0.2)], tmp_path / "clips")
    info, pictures = read(clip)
    assert (info.rotation, info.mirrored) == (0, False)
    assert np.abs(pictures - moved(quarters(), 0, 1, 1, 0)).mean() < 4


def test_a_mirrored_turn_in_matroska(tmp_path: Path) -> None:
    """90 degrees counter-clockwise, then mirrored: rows and columns are swapped, from the other corner."""
    _, frames = read(write(tmp_path / "clip.mkv", [quarters()] * 2, matrix=90))
    assert np.abs(frames - np.rot90(quarters())[:, ::-1]).mean() < 3


def test_an_angle_between_quarter_turns_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", [quarters()])
    set_matrix(path, 0.5, 0.866, -0.866, 0.5)  # 60 degrees clockwise
    plan, messages = planned(path)
    assert (plan.rotation, plan.mirrored) == (270, False)
    assert [note for note in messages if "turned by no quarter turn" in note] and "quarter turn" in " ".join(plan.notes)


def test_scaled_and_empty_matrices() -> None:
    assert orientation([0, 131072, 0, -131072, 0, 0, 0, 0, 0]) == orientation([0, 1, 0, -1, 0, 0, 0, 0, 0])
    assert orientation([0] * 9).rotation == 0 and not orientation([0] * 9).mirrored
    assert orientation([65536, 500, 0, -500, 65536, 0, 0, 0, 0]).exact
    assert not orientation([65536, 5000, 0, -5000, 65536, 0, 0, 0, 0]).exact


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", [quarters(72, 58)] * 3, aspect=Fraction(64, 45))
    info, frames = read(path)
    assert (info.width, info.height, info.stored_size) == (102, 58, (72, 58))
    assert np.abs(frames - quarters(102, 58)).mean() < 6
    plan, messages = planned(path)
    assert (plan.source_width, plan.source_height) == (102, 58)
    assert messages == ["clip.mp4: its pixels are not square: 72x58 is shown as 102x58"]
    official, messages = planned(path, strict_official=True)
    assert (official.source_width, official.source_height, messages) == (72, 58, [])
    (clip,) = cut_clips(fetch_source(path), [(0.0, 0.3)], tmp_path / "clips")
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.sample_aspect_ratio) == (102, 58, 1)


def test_turned_pixels_that_are_not_square(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", [quarters(64, 48)], aspect=Fraction(4, 3))
    set_matrix(path, 0, 1, -1, 0)
    assert [(info.width, info.height, info.stored_size) for info in [probe(fetch_source(path))]] == [(48, 85, (48, 64))]


def test_impossible_pixels_are_taken_as_square(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", [quarters()], aspect=Fraction(20))
    plan, messages = planned(path)
    assert (plan.source_width, plan.source_height) == (64, 48)
    assert "pixels are 20:1, which cannot be" in " ".join(messages)
    stored = (None, Fraction(0), Fraction(1280, 1281), Fraction(8, 9), Fraction(1000), Fraction(1, 1000))
    assert [check_aspect(aspect) for aspect in stored] == [1, 1, 1, Fraction(8, 9), None, None]
    # No more pixels than are allowed for the stored picture.
    assert display_size(1000, 1000, Fraction(2), 1_500_000) == (1000, 500)
    assert display_size(1, 1000, Fraction(1, 10), 1_500_000) == (1, 1000)


def two_tracks(path: Path, *marks: str, sizes: tuple[tuple[int, int], ...] = ((48, 32), (96, 64))) -> Path:
    """A file with a video track of each size, of different colours, and with dispositions."""
    with av.open(str(path), "w") as container:
        streams = []
        for (width, height), mark in zip(sizes, marks, strict=True):
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.disposition = av.stream.Disposition[mark] if mark else av.stream.Disposition(0)
            streams.append(stream)
        for _ in range(5):
            for stream, colour in zip(streams, CORNERS, strict=False):
                picture = np.full((stream.height, stream.width, 3), colour, dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("marks", "track"),
    [(("", "default"), 2), (("default", ""), 1), (("default", "default"), 2), (("", "timed_thumbnails"), 1)],
)
def test_the_track_that_players_choose(tmp_path: Path, marks: tuple[str, str], track: int) -> None:
    path = two_tracks(tmp_path / "two.mp4", *marks)
    info, frames = read(path)
    assert info.track == track
    assert np.abs(frames[0, 5, 5] - CORNERS[track - 1]).max() < 12
    plan, messages = planned(path)
    assert (plan.track, len(info.tracks)) == (track, 2)
    assert [f"track {track} is read: choose with track" in note for note in messages] == [True]


def test_a_track_by_its_number(tmp_path: Path) -> None:
    path = two_tracks(tmp_path / "two.mkv", "", "default")
    plan, messages = planned(path, track=1)
    assert (plan.track, plan.source_width, messages) == (1, 48, [])
    item = Processor(CONFIG).video_stream(fetch_source(path), MediaOptions(track=1))
    first = Processor(CONFIG).video(fetch_source(path), plan=plan).vision.pixel_values
    assert np.array_equal(item.vision.pixel_values, first)
    (clip,) = cut_clips(fetch_source(path), [(0.0, 0.5)], tmp_path, options=MediaOptions(track=1))
    assert (read(clip)[0].width, read(clip)[0].height) == (48, 32)
    with pytest.raises(
        MediaError, match=r"has no video track 3; give track one of 1: 48x32 h264; 2: 96x64 h264, default"
    ):
        probe(fetch_source(path), track=3)
    with pytest.raises(KeyeError, match="track is 0"):
        MediaOptions(track=0)


@pytest.mark.filterwarnings("ignore::keye.errors.KeyeWarning")
def test_tracks_and_looks_share_no_cache(tmp_path: Path) -> None:
    source = fetch_source(two_tracks(tmp_path / "two.mp4", "", "default", sizes=((96, 64), (96, 64))))
    assert [probe_cached(source, None, track=n).track for n in (None, 1, 2, None)] == [2, 1, 2, 2]
    keys = set()
    for options in ({}, {"track": 1}, {"track": 2}, {"deinterlace": False}, {"tone_map": True}):
        medium = plan_medium(as_medium(source, options), Processor(CONFIG))
        keys.add(content_key(medium.kind, medium.source, medium.options, medium.plan, CONFIG))
    assert len(keys) == 5


def fields(count: int = 8, width: int = 96, height: int = 64) -> list[NDArray[np.uint8]]:
    """Moments, two for each frame: a bar that moves over a background that does not."""
    y, x = np.mgrid[:height, :width]
    moments = []
    for moment in range(2 * count):
        picture = np.repeat((80 + 60 * np.sin(x / 5) * np.sin(y / 7))[..., None], 3, axis=2).astype(np.uint8)
        picture[:, 6 + 5 * moment % 80 : 18 + 5 * moment % 80] = 235
        moments.append(picture)
    return moments


def write_interlaced(path: Path, moments: list[NDArray[np.uint8]]) -> Path:
    """Frames whose odd lines show one moment and whose even lines show the next, marked as such."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "6", "x264-params": "bff=1"})
        stream.height, stream.width, _ = moments[0].shape
        stream.pix_fmt = "yuv420p"
        for first, second in zip(moments[::2], moments[1::2], strict=True):
            woven = first.copy()
            woven[::2] = second[::2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(woven, format="rgb24")))
        container.mux(stream.encode())
    return path


def combing(frame: NDArray[np.int16]) -> float:
    """How much lines differ from both their neighbours, more than these from one another."""
    above, line, below = frame[:-2, :, 0], frame[1:-1, :, 0], frame[2:, :, 0]
    return float(np.maximum(np.minimum(np.abs(line - above), np.abs(line - below)) - np.abs(above - below), 0).mean())


@pytest.mark.parametrize("name", ["clip.mkv", "clip.ts"])
def test_interlaced_frames_show_one_moment(tmp_path: Path, name: str) -> None:
    moments = fields()
    path = write_interlaced(tmp_path / name, moments)
    _, frames = read(path)
    _, woven = read(path, deinterlace=False)
    assert len(frames) == len(woven) == 8
    for frame, comb, moment in zip(frames, woven, moments[::2], strict=True):
        assert combing(comb) > 5 > 0.5 > combing(frame)
        assert np.abs(frame - moment).mean() < 4 < np.abs(comb - moment).mean()
    with VideoReader(fetch_source(path)) as reader:  # some frames alone are the same as among all
        some = reader.read(reader.plan(CONFIG, MediaOptions(nframes=4, resized_height=56, resized_width=84)))
        every = reader.read(reader.plan(CONFIG, MediaOptions(nframes=8, resized_height=56, resized_width=84)))
    assert [np.abs(every.astype(int) - single).mean(axis=(1, 2, 3)).min() for single in some] == [0.0] * 4
    (clip,) = cut_clips(fetch_source(path), [(0.0, 0.5)], tmp_path)
    assert max(map(combing, read(clip)[1])) < 0.5


def test_what_is_deinterlaced(tmp_path: Path) -> None:
    path = write_interlaced(tmp_path / "clip.mkv", fields())
    assert [planned(path, **options)[0].deinterlace for options in ({}, {"deinterlace": False})] == [True, False]
    assert not planned(path, strict_official=True)[0].deinterlace
    assert planned(path, strict_official=True, deinterlace=True)[0].deinterlace
    with pytest.raises(KeyeError, match="deinterlace is 'no'; give true or false"):
        MediaOptions(deinterlace="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["yuv410p", "yuv420p", "yuv422p10le", "uyvy422", "gray", "bgra", "nv12"])
def test_all_sizes_and_formats_are_deinterlaced(name: str) -> None:
    for width, height in ((2, 2), (15, 40), (16, 16), (65, 49)):
        frame = av.VideoFrame(width, height, name)
        frame.pts, frame.time_base = 0, Fraction(1, 25)
        picture = interpolate_fields(None, frame, frame, 1)
        assert (picture.width, picture.height) == (width, height)
        assert (picture is frame) == (min(width, height) < 16)


def test_progressive_frames_are_left_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", fields())
    assert np.array_equal(read(path)[1], read(path, deinterlace=False)[1])


def pq(light: float) -> int:
    """The coded value of cd/m2 (SMPTE ST 2084)."""
    power = (light / 10_000) ** (2610 / 16384)
    return round(255 * ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32))


def test_tone_mapping() -> None:
    """Dark and middle light keep their place under the white of standard range, brighter light is rolled off."""
    grey = np.array([0, pq(1), pq(20), pq(60), pq(203), pq(1000), 255], dtype=np.uint8)
    mapped = to_sdr(np.repeat(grey[:, None, None], 3, axis=2), "pq")
    assert (np.ptp(mapped, axis=2) <= 1).all()
    values = mapped[:, 0, 0].astype(int)
    remaining = [255 * (light / 203) ** (1 / 2.4) for light in (0, 1, 20, 60)]
    assert values[:4] == pytest.approx(remaining, abs=4)
    assert 205 < values[4] < 235 and list(values[5:]) == [255, 255]
    # HLG: three quarters of the signal are the same white.
    hybrid = to_sdr(np.full((1, 1, 3), round(0.75 * 255), dtype=np.uint8), "hlg")
    assert np.abs(hybrid.astype(int) - values[4]).max() <= 4
    # The red of BT.709 at 60 cd/m2 stays red.
    light = np.linalg.inv([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])[:, 0]
    red = to_sdr(np.array([[[pq(60 * part) for part in light]]], dtype=np.uint8), "pq")[0, 0]
    assert abs(int(red[0]) - remaining[3]) < 8 and red[1:].max() < 40


@pytest.mark.parametrize(("number", "transfer"), [(16, "pq"), (18, "hlg")])
def test_high_dynamic_range(tmp_path: Path, number: int, transfer: str) -> None:
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx265", rate=10, options={"x265-params": "log-level=none"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = number, 9, 9, 1
        for _ in range(3):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 128, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    info, plain = read(path)
    assert info.transfer == transfer and abs(plain.mean() - 128) < 3
    plan, messages = planned(path)
    assert plan.tone_map is None
    assert f"it has high dynamic range ({transfer.upper()})" in messages[0] and "tone_map" in messages[0]
    plan, messages = planned(path, tone_map=True)
    assert (plan.tone_map, messages) == (transfer, [])
    expected = to_sdr(plain[0].astype(np.uint8), transfer)
    assert np.array_equal(read(path, tone_map=True)[1][0], expected)
    (clip,) = cut_clips(fetch_source(path), [(0.0, 0.3)], tmp_path)
    cut, pictures = read(clip)
    assert cut.transfer == "sdr" and abs(pictures.mean() - expected.mean()) < 4
    assert "standard range already, so that tone_map has no effect" in planned(clip, tone_map=True)[1][0]


def test_clips_name_their_colours(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", [quarters(320, 240)] * 3)
    (clip,) = cut_clips(fetch_source(path), [(0.0, 0.3)], tmp_path / "clips")
    with av.open(str(clip)) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)
    assert np.abs(read(clip)[1] - quarters(320, 240)).mean() < 3
