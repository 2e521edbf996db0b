"""Clips keep their sound: exactly as long as the picture and in step with it. Shapes of pixels and turns stay right."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from keye.errors import KeyeWarning
from keye.media.clips import cut_clips
from keye.media.source.fetch import fetch_source
from keye.media.video import VideoReader, probe
from tests.support.clips import MILLI, coded_frame, read_code, rotate_mp4, write_clip

#: The tone sounds from here on for so many seconds, once a second.
BURST_AT, BURST = 0.5, 0.1


def write_bursts(
    path: Path, *, codec: str = "aac", rate: int = 48_000, layout: str = "stereo", sound_start: float = 0.0,
    video_start: float = 0.0, seconds: float = 4.0, fps: int = 25,
) -> Path:  # fmt: skip
    """A clip of coded frames and a tone at `BURST_AT` of each second of the file's own clock."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
        assert isinstance(video, av.VideoStream)
        video.width, video.height, video.pix_fmt = 160, 96, "yuv420p"
        video.codec_context.time_base = MILLI
        sound = container.add_stream(codec, rate=rate, layout=layout)
        assert isinstance(sound, av.AudioStream)
        packets = []
        for index in range(int(seconds * fps)):
            frame = av.VideoFrame.from_ndarray(coded_frame(index), format="rgb24")
            frame.pts, frame.time_base = round(1000 * (video_start + index / fps)), MILLI
            packets += video.encode(frame)
        packets += video.encode()
        times = sound_start + np.arange(int(seconds * rate)) / rate
        tone = 0.5 * np.sin(2 * np.pi * 1000 * times) * ((times - BURST_AT) % 1.0 < BURST)
        channels = sound.codec_context.layout.nb_channels
        form = sound.codec_context.format.name
        for start in range(0, len(tone), 1024):
            part = np.tile(tone[None, start : start + 1024], (channels, 1))
            if form == "s16":
                part = np.ascontiguousarray((part.T.reshape(1, -1) * 32767).astype(np.int16))
            piece = av.AudioFrame.from_ndarray(part.astype(np.int16 if form == "s16" else np.float32), form, layout)
            piece.sample_rate, piece.pts, piece.time_base = rate, round(sound_start * rate) + start, Fraction(1, rate)
            packets += sound.encode(piece)
        packets += sound.encode()
        for packet in sorted(packets, key=lambda packet: (packet.dts or 0) * packet.time_base):
            container.mux(packet)
    return path


def read_clip(path: Path) -> tuple[list[int], NDArray, int, Fraction, Fraction]:
    """Frame numbers, samples of the first channel from time 0 on, their rate, and the lengths of picture and sound."""
    with av.open(str(path)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        lengths: list[Any] = [stream.duration * stream.time_base for stream in (video, sound)]
        codes: list[int] = []
        pieces: list[tuple[float, NDArray]] = []
        for packet in container.demux():
            for frame in packet.decode():
                if isinstance(frame, av.VideoFrame):
                    codes.append(read_code(frame.to_ndarray(format="rgb24")))
                else:
                    pieces.append((frame.time, frame.to_ndarray()[0]))
    rate = sound.rate
    out = np.zeros(round(float(lengths[1]) * rate), np.float32)
    for time, samples in pieces:
        start = round(time * rate)
        begin, end = max(start, 0), min(start + len(samples), len(out))
        out[begin:end] = samples[begin - start : end - start]
    return codes, out, rate, lengths[0], lengths[1]


def find_bursts(samples: NDArray[np.float32], rate: int) -> list[float]:
    """Seconds at which the tone begins."""
    loud = np.abs(samples) > 0.2
    places = np.flatnonzero(loud)
    starts = places[np.diff(places, prepend=-rate) > rate // 4]
    return [place / rate for place in starts]


@pytest.mark.parametrize(
    ("suffix", "codec", "rate", "layout", "sound_start", "video_start"),
    [
        ("mp4", "aac", 48_000, "stereo", 0.0, 0.0),
        ("mkv", "aac", 44_100, "mono", 0.0, 0.0),
        ("ts", "aac", 48_000, "stereo", 0.0, 0.3),
        ("mov", "pcm_s16le", 48_000, "stereo", 0.3, 0.0),
        ("mkv", "pcm_s16le", 11_025, "mono", 0.0, 0.5),
    ],
)
def test_sound_is_exactly_as_long_and_in_step(
    tmp_path: Path, suffix: str, codec: str, rate: int, layout: str, sound_start: float, video_start: float
) -> None:
    path = write_bursts(tmp_path / f"source.{suffix}", codec=codec, rate=rate, layout=layout, sound_start=sound_start,
                        video_start=video_start)  # fmt: skip
    info = probe(path)
    assert info.sound is not None and info.sound.is_readable
    start, end = 1.02, 3.24
    (clip,) = cut_clips(path, [(start, end)], tmp_path / "out")
    codes, samples, found_rate, picture, sound = read_clip(clip)
    assert found_rate == rate and abs(picture - Fraction(end - start)) < 1e-3
    assert abs(sound - picture) <= Fraction(1, 1000)
    # In the source a burst begins on the frame that shows this number; in the clip too.
    with VideoReader(fetch_source(path)) as reader:
        times = reader.info.timestamps
    zero = info.start_offset - video_start  # the clock of players begins where the first stream does
    expected = [BURST_AT + second + zero - start for second in range(5)]
    expected = [time for time in expected if 0.01 < time < end - start - BURST]
    assert find_bursts(samples, rate) == pytest.approx(expected, abs=0.02) and len(expected) == 2
    first = max(i for i, time in enumerate(times) if time <= start + 1e-6)
    assert codes[0] == first and len(codes) == sum(start - 0.04 + 1e-6 < time < end for time in times)


def test_sound_outside_the_interval_is_silence_or_left_out(tmp_path: Path) -> None:
    path = write_bursts(tmp_path / "source.mkv", sound_start=2.0, codec="pcm_s16le")
    first, second = cut_clips(path, [(0.0, 1.5), (1.0, 3.0)], tmp_path / "out")
    with av.open(str(first)) as container:
        assert not container.streams.audio
    _, samples, rate, _, sound = read_clip(second)
    assert sound == 2 and find_bursts(samples, rate) == pytest.approx([1.5], abs=0.02)


def test_more_than_two_channels_become_two(tmp_path: Path) -> None:
    path = write_bursts(tmp_path / "source.mkv", layout="5.1", codec="aac")
    (clip,) = cut_clips(path, [(0.0, 1.0)], tmp_path / "out")
    with av.open(str(clip)) as container:
        assert container.streams.audio[0].codec_context.layout.name == "stereo"


def test_a_clip_without_sound_has_no_track_of_it(tmp_path: Path) -> None:
    (clip,) = cut_clips(write_clip(tmp_path / "source.mp4", frames=30), [(0.0, 1.0)], tmp_path / "out")
    with av.open(str(clip)) as container:
        assert [stream.type for stream in container.streams] == ["video"]


def test_damaged_sound_is_left_out_with_a_note(tmp_path: Path) -> None:
    path = write_bursts(tmp_path / "source.mkv", codec="aac")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        places = [(p.pos, p.size) for p in container.demux(container.streams.audio[0]) if p.size]
    for place, size in places:
        data[place + 4 : place + size + 4] = b"\xff" * size
    path.write_bytes(bytes(data))
    with pytest.warns(KeyeWarning, match=r"source.mkv: its sound from 0.5 to 1.5 s is damaged"):
        (clip,) = cut_clips(path, [(0.5, 1.5)], tmp_path / "out")
    with av.open(str(clip)) as container:
        assert container.streams.video[0].frames >= 25 and not container.streams.audio


def test_pixels_that_are_not_square_and_turned_pictures_keep_their_shape(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "wide.mp4", frames=10, fps=10)
    wide = tmp_path / "wide.mkv"
    with av.open(str(wide), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        for index in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(coded_frame(index), format="rgb24")))
        container.mux(stream.encode())
    rotate_mp4(path, 1)
    for name, size in (("wide.mkv", (320, 96)), ("wide.mp4", (96, 160))):
        info = probe(tmp_path / name)
        assert (info.width, info.height) == size
        (clip,) = cut_clips(tmp_path / name, [(0.0, 1.0)], tmp_path / f"out-{name}")
        copy = probe(clip)
        assert (copy.width, copy.height, copy.rotation, copy.stored_size) == (*size, 0, None)


@pytest.mark.parametrize(("suffix", "drop"), [("mov", True), ("mp4", True), ("mkv", True), ("mov", False)])
def test_the_first_timecode_is_read(tmp_path: Path, suffix: str, drop: bool) -> None:
    label = "10:00:00;00" if drop else "10:00:00:00"
    path = tmp_path / f"source.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(30_000, 1001), options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        stream.metadata["timecode"] = label
        for index in range(8):
            frame = av.VideoFrame.from_ndarray(coded_frame(index), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert probe(path).timecode == label


def test_what_is_no_timecode_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "source.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        stream.metadata["timecode"] = "\x1b[31m 99:99:99"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(coded_frame(0), format="rgb24")))
        container.mux(stream.encode())
    assert probe(path).timecode is None and probe(path).sound is None
