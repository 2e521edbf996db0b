"""Small video files made with PyAV. Frame i shows the number i as a bar code that survives compression."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

BITS = 10
#: Milliseconds, the time base of clips with given times.
MILLI = Fraction(1, 1000)


def coded_frame(index: int, width: int = 160, height: int = 96) -> NDArray[np.uint8]:
    """A grey frame with the bits of `index` as black and white columns in its upper half."""
    frame = np.full((height, width, 3), 96, dtype=np.uint8)
    column = width // BITS
    for bit in range(BITS):
        frame[: height // 2, bit * column : (bit + 1) * column] = 235 if index >> bit & 1 else 16
    return frame


def read_code(frame: NDArray[np.uint8]) -> int:
    """The number that an upright frame of any size shows."""
    height, width = frame.shape[:2]
    column = width / BITS
    return sum(int(frame[height // 4, int((bit + 0.5) * column)].mean() > 127) << bit for bit in range(BITS))


def write_clip(
    path: Path,
    *,
    frames: int = 60,
    fps: int = 30,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    gop: int | None = None,
    times_ms: list[int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    size: tuple[int, int] = (160, 96),
) -> Path:
    """Writes a clip in the format of its suffix and returns its path; `times_ms` makes the rate variable."""
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        if gop:
            stream.codec_context.gop_size = gop
        if times_ms:
            stream.codec_context.time_base = MILLI
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(coded_frame(index, *size), format="rgb24")
            if times_ms:
                frame.pts, frame.time_base = times_ms[index], MILLI
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path: Path, seconds: float = 1.0) -> Path:
    """A sound file without pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        assert isinstance(stream, av.AudioStream)
        stream.layout = "mono"
        for start in range(0, int(16000 * seconds), 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def rotate_mp4(path: Path, quarter_turns: int) -> None:
    """Writes a display matrix of `quarter_turns` clockwise quarter turns into the track header of an MP4 file."""
    a, b = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarter_turns]
    set_matrix(path, a, b, -b, a)


def set_matrix(path: Path, a: float, b: float, c: float, d: float) -> None:
    """Writes a display matrix into the track header of an MP4 file: (x, y) is shown at (a x + c y, b x + d y)."""
    fixed = [round(value * 65536) for value in (a, b, c, d)]
    matrix = [fixed[0], fixed[1], 0, fixed[2], fixed[3], 0, 0, 0, 1 << 30]
    data = bytearray(path.read_bytes())
    # Version 0 of tkhd: type, version and flags, five numbers, two reserved, four shorts, then the matrix.
    place = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    data[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(bytes(data))


def trim_mp4(path: Path, frames: int, fps: int = 30) -> Path:
    """Makes the edit list of an MP4 file leave out its first frames, and shortens what it declares; the coded frames
    stay. All boxes are of version 0."""
    data = bytearray(path.read_bytes())

    def change(place: int, difference: int) -> None:
        data[place : place + 4] = (int.from_bytes(data[place : place + 4], "big") + difference).to_bytes(4, "big")

    def scale(box: bytes) -> int:
        place = data.index(box) + 4 + 12
        return int.from_bytes(data[place : place + 4], "big")

    shorter = -frames * scale(b"mvhd") // fps
    change(data.index(b"mvhd") + 4 + 16, shorter)
    change(data.index(b"tkhd") + 4 + 20, shorter)
    # One entry of elst after its version, flags and count: duration, media time, rate.
    change(data.index(b"elst") + 4 + 8, shorter)
    change(data.index(b"elst") + 4 + 12, frames * scale(b"mdhd") // fps)
    path.write_bytes(bytes(data))
    return path


def write_with_sound(
    path: Path,
    *,
    frames: int = 40,
    fps: int = 10,
    video_start: float = 0.0,
    sound_start: float | None = 0.0,
    sound_seconds: float = 5.0,
    size: tuple[int, int] = (160, 96),
) -> Path:
    """A clip whose picture and sound begin at these seconds of the file's clock; no sound where its start is None."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps, options={"bf": "2"})
        assert isinstance(video, av.VideoStream)
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        video.codec_context.time_base = MILLI
        audio = None
        if sound_start is not None:
            audio = container.add_stream("aac", rate=16000)
            assert isinstance(audio, av.AudioStream)
            audio.layout = "mono"
        packets = []
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(coded_frame(index, *size), format="rgb24")
            frame.pts, frame.time_base = round(1000 * (video_start + index / fps)), MILLI
            packets += video.encode(frame)
        packets += video.encode()
        if audio is not None and sound_start is not None:
            for start in range(0, int(16000 * sound_seconds), 1024):
                sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
                sound.sample_rate, sound.pts = 16000, start + int(16000 * sound_start)
                packets += audio.encode(sound)
            packets += audio.encode()
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


def damage_avi(path: Path, frame: int) -> Path:
    """Overwrites the coded picture of a frame of an AVI file with zeros, but for its beginning."""
    data = bytearray(path.read_bytes())
    places = [place for place in range(len(data)) if data.startswith(b"00dc", place)]
    begin, end = places[frame] + 30, places[frame + 1]
    data[begin:end] = bytes(end - begin)
    path.write_bytes(bytes(data))
    return path
