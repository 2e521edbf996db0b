"""Video files of many kinds, made with ffmpeg for `media_frames`. Frame i shows the number i as a bar code.

`CASES` maps a file's name to the function that makes it in a folder; the suffix of the name is the container.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT, BITS = 160, 96, 10
_X264 = ["-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p", "-threads", "1"]
_X265 = ["-c:v", "libx265", "-preset", "ultrafast", "-pix_fmt", "yuv420p"]
_MPEG4 = ["-c:v", "mpeg4", "-g", "12", "-q:v", "3"]
_MPEG2 = ["-c:v", "mpeg2video", "-g", "12", "-q:v", "3"]
_VP8 = ["-c:v", "libvpx", "-deadline", "realtime", "-cpu-used", "8", "-b:v", "1M", "-g", "20"]
_VP9 = ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-b:v", "1M", "-g", "20"]
_AV1 = ["-c:v", "libsvtav1", "-preset", "12", "-g", "20"]
_HIGH = ["-q:v", "3"]


class Folder:
    """A folder with the pictures that the cases encode."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def pictures(self, first: int, count: int, rate: str) -> list[str]:
        """Input arguments for pictures `first`, `first` + 1, ..."""
        path = self.path / f"{first}-{count}.grey"
        if not path.exists():
            path.write_bytes(b"".join(coded_picture(index).tobytes() for index in range(first, first + count)))
        return ["-f", "rawvideo", "-pix_fmt", "gray", "-s", f"{WIDTH}x{HEIGHT}", "-r", rate, "-i", str(path)]

    def encode(self, name: str, *arguments: str, first: int = 0, count: int = 60, before: list[str] | None = None,
               sound: float = 0.0, rate: str = "30") -> Path:  # fmt: skip
        """Encodes pictures, with `sound` seconds of a tone where it is above 0, into file `name`."""
        tone = ["-f", "lavfi", "-i", f"sine=d={sound}:r=44100"] if sound else []
        self.ffmpeg(*(before or []), *self.pictures(first, count, rate), *tone, *arguments, name)
        return self.path / name

    def ffmpeg(self, *arguments: str) -> None:
        if (self.path / arguments[-1]).exists():
            return  # made before
        command = ["ffmpeg", "-hide_banner", "-loglevel", "error", "-y", *arguments]
        subprocess.run(command, check=True, cwd=self.path, stdin=subprocess.DEVNULL)

    def join(self, name: str, *parts: Path) -> Path:
        """The parts one after another, as `cat` joins them."""
        path = self.path / name
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
        return path


Case = Callable[[Folder, str], Path]


def coded_picture(index: int) -> np.ndarray:
    """A grey picture: the bits of `index` as columns above a texture that moves."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    picture = (96 + 40 * np.sin((x + 3 * index) / 9) + 30 * np.sin((y - index) / 7)).astype(np.uint8)
    column = WIDTH // BITS
    for bit in range(BITS):
        picture[: HEIGHT // 2, bit * column : (bit + 1) * column] = 235 if index >> bit & 1 else 16
    return picture


def encoded(*arguments: str, count: int = 60, before: list[str] | None = None, sound: float = 0.0,
            rate: str = "30") -> Case:  # fmt: skip
    return lambda folder, name: folder.encode(name, *arguments, count=count, before=before, sound=sound, rate=rate)


def joined(arguments: list[str], *parts: list[str], suffix: str = "ts", sound: float = 0.0) -> Case:
    """Files with other pictures, each encoded with arguments of its own too, joined as `cat` does."""

    def make(folder: Folder, name: str) -> Path:
        files = [
            folder.encode(f"{name}.{i}.{suffix}", *arguments, *part, first=256 * i, count=45, sound=sound)
            for i, part in enumerate(parts)
        ]
        return folder.join(name, *files)

    return make


def copied(*arguments: str, of: Case, source: str, before: list[str] | None = None) -> Case:
    """A copy without encoding of another case's file; `before` stands before the input."""

    def make(folder: Folder, name: str) -> Path:
        total = of(folder, f"{name}.{source}")
        folder.ffmpeg(*(before or []), "-i", str(total), "-c", "copy", *arguments, name)
        return folder.path / name

    return make


def turned(*matrix: float) -> Case:
    """An MP4 file with a display matrix (a, b, c, d)."""

    def make(folder: Folder, name: str) -> Path:
        path = folder.encode(name, *_X264, count=20)
        data = bytearray(path.read_bytes())
        a, b, c, d = (round(value * 65536) for value in matrix)
        struct.pack_into(">9i", data, data.index(b"tkhd") + 4 + 40, a, b, 0, c, d, 0, 0, 0, 1 << 30)
        path.write_bytes(data)
        return path

    return make


def variable(times: str, *arguments: str, count: int = 60) -> Case:
    """Frames at times given by an expression of ffmpeg's setpts filter."""
    return encoded("-vf", f"settb=1/1000,setpts='{times}'", "-fps_mode", "passthrough", "-enc_time_base",
                   "1/1000", *arguments, count=count)  # fmt: skip


def damage(of: Case, source: str, change: Callable[[bytes], bytes]) -> Case:
    def make(folder: Folder, name: str) -> Path:
        path = folder.path / name
        path.write_bytes(change(of(folder, f"{name}.{source}").read_bytes()))
        return path

    return make


def renamed(of: Case, box: bytes) -> Case:
    """An MP4 file without the boxes of a name."""
    return damage(of, "mp4", lambda data: data.replace(box, b"free"))


def edited(of: Case, *edits: tuple[int, int]) -> Case:
    """An MP4 file with another edit list: (milliseconds, first tick or -1 for nothing) of each edit."""

    def change(data: bytes) -> bytes:
        file = bytearray(data)
        place = file.index(b"elst") - 4
        size = int.from_bytes(file[place : place + 4], "big")
        entries = b"".join(struct.pack(">IiI", length, first, 1 << 16) for length, first in edits)
        box = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
        file[place : place + size] = box
        for name in (b"edts", b"trak", b"moov"):
            around = file.rindex(name, 0, place + 8) - 4
            longer = int.from_bytes(file[around : around + 4], "big") + len(box) - size
            file[around : around + 4] = longer.to_bytes(4, "big")
        return bytes(file)

    return damage(of, "mp4", change)


def all_keys(data: bytes) -> bytes:
    """The index of an AVI file in which every picture is called a key."""
    file, place = bytearray(data), data.index(b"idx1") + 8
    for entry in range(place, len(file) - 15, 16):
        file[entry + 4] |= 0x10
    return bytes(file)


def without_packets(*places: float) -> Callable[[bytes], bytes]:
    """Leaves packets of a transport stream out."""

    def change(data: bytes) -> bytes:
        packets = [data[i : i + 188] for i in range(0, len(data), 188)]
        lost = {int(place * len(packets)) for place in places}
        return b"".join(packet for i, packet in enumerate(packets) if i not in lost)

    return change


def segments(folder: Folder, name: str, *numbers: int) -> Path:
    """DASH pieces: the initialisation and later segments."""
    total = folder.encode(f"{name}.whole.mp4", *_X264, "-g", "30", count=120)
    base = name.split(".", maxsplit=1)[0]
    folder.ffmpeg("-i", str(total), "-c", "copy", "-f", "dash", "-seg_duration", "1", "-init_seg_name", f"{base}-i.m4s",
                  "-media_seg_name", f"{base}-$Number$.m4s", f"{base}.mpd")  # fmt: skip
    return folder.join(name, folder.path / f"{base}-i.m4s", *(folder.path / f"{base}-{n}.m4s" for n in numbers))


def hls_piece(folder: Folder, name: str) -> Path:
    base = name.split(".", maxsplit=1)[0]
    total = folder.encode(f"{name}.whole.mp4", *_X264, "-g", "30", count=120)
    folder.ffmpeg("-i", str(total), "-c", "copy", "-f", "hls", "-hls_time", "1", "-hls_segment_filename",
                  f"{base}-%d.ts", f"{base}.m3u8")  # fmt: skip
    return folder.join(name, folder.path / f"{base}-2.ts")


def concatenated(*arguments: str, suffix: str, inpoint: float = 0.0) -> Case:
    """Two files joined by ffmpeg's own concat demuxer."""

    def make(folder: Folder, name: str) -> Path:
        lines = "ffconcat version 1.0\n"
        for i in range(2):
            part = folder.encode(f"{name}.{i}.{suffix}", *arguments, first=256 * i, count=45)
            lines += f"file {part.name}\n" + (f"inpoint {inpoint}\n" if inpoint else "")
        (folder.path / f"{name}.txt").write_text(lines)
        folder.ffmpeg("-f", "concat", "-i", f"{name}.txt", "-c", "copy", name)
        return folder.path / name

    return make


def gif(folder: Folder, name: str) -> Path:
    pictures = [Image.fromarray(coded_picture(i)) for i in range(12)]
    times = [100, 100, 900, 40, 40, 100, 200, 20, 30, 100, 100, 500]
    pictures[0].save(folder.path / name, save_all=True, append_images=pictures[1:], duration=times)
    return folder.path / name


def _ts(*arguments: str, count: int = 60, sound: float = 0.0) -> Case:
    return encoded(*_X264, "-g", "30", *arguments, count=count, sound=sound)


_LOW_DELAY = ["-tune", "zerolatency", "-x264-params", "intra-refresh=1:keyint=20"]
_OPEN_264 = ["-x264-params", "open-gop=1:bframes=3:keyint=12:min-keyint=12:scenecut=0"]
_OPEN_265 = ["-x265-params", "open-gop=1:bframes=3:keyint=12:min-keyint=12:scenecut=0:log-level=none"]
_QUIET_265 = ["-x265-params", "log-level=none:keyint=20:bframes=3"]
_JOIN = [*_X264, "-g", "15"]
_GAP = "N*33+10000*gte(N,30)"
_SOUND = ["-c:a", "aac"]
_WRAP = str(2**33 / 90000 - 1.0)

CASES: dict[str, Case] = {
    # Codecs and containers.
    "h264.mp4": encoded(*_X264, "-g", "20"),
    "h264-pyramid.mp4": encoded(*_X264, "-x264-params", "bframes=4:b-pyramid=normal:keyint=20:b-adapt=0"),
    "h264-open.mkv": encoded(*_X264, *_OPEN_264),
    "h264-open.ts": encoded(*_X264, *_OPEN_264),
    "h264.mov": encoded(*_X264, "-g", "20", sound=2.0),
    "h264.flv": encoded(*_X264, "-g", "20", sound=2.0),
    "h264.ts": encoded(*_X264, "-g", "20", sound=2.0),
    "h264.m2ts": encoded(*_X264, "-g", "20", "-mpegts_m2ts_mode", "1"),
    "h264-b.avi": encoded(*_X264, "-g", "20", "-bf", "2"),
    "h264.asf": encoded(*_X264, "-g", "20", "-bf", "2", "-f", "asf"),
    "h264.h264": encoded(*_X264, "-g", "20"),
    "h264-50.h264": encoded(*_X264, "-g", "20", rate="50"),
    "h264-fragmented.mp4": encoded(*_X264, "-g", "20", "-movflags", "frag_keyframe+empty_moov"),
    "h264-one.mp4": encoded(*_X264, count=1),
    "hevc.mp4": encoded(*_X265, *_QUIET_265),
    "hevc-open.mkv": encoded(*_X265, *_OPEN_265),
    "hevc-open.ts": encoded(*_X265, *_OPEN_265),
    "hevc.hevc": encoded(*_X265, *_QUIET_265),
    "mpeg4-b.mp4": encoded(*_MPEG4, "-bf", "2"),
    "mpeg4.avi": encoded(*_MPEG4),
    "mpeg4-b.avi": encoded(*_MPEG4, "-bf", "2"),
    "xvid-packed.avi": encoded("-c:v", "libxvid", "-bf", "2", "-g", "20", *_HIGH),
    "xvid-sound.avi": encoded("-c:v", "libxvid", "-bf", "2", "-g", "20", *_HIGH, "-c:a", "mp3", sound=2.0),
    "mpeg4-b.mkv": encoded(*_MPEG4, "-bf", "2"),
    "mpeg4.m4v": encoded(*_MPEG4, "-bf", "2", "-f", "m4v"),
    "mpeg4.ts": encoded(*_MPEG4, "-bf", "2"),
    "mpeg2.ts": encoded(*_MPEG2, "-bf", "2", sound=2.0),
    "mpeg2.mpg": encoded(*_MPEG2, "-bf", "2", sound=2.0),
    "mpeg2.vob": encoded(*_MPEG2, "-bf", "2"),
    "mpeg2.m2v": encoded(*_MPEG2, "-bf", "2"),
    "mpeg2.mkv": encoded(*_MPEG2, "-bf", "2"),
    "mpeg1.mpg": encoded("-c:v", "mpeg1video", "-g", "12", "-bf", "2", *_HIGH),
    "mpeg2-interlaced.ts": encoded(*_MPEG2, "-bf", "2", "-flags", "+ildct+ilme", "-top", "1"),
    "h264-interlaced.ts": encoded(*_X264, "-x264-params", "tff=1:keyint=20"),
    "vp8.webm": encoded(*_VP8),
    "vp8-altref.webm": encoded("-c:v", "libvpx", "-b:v", "300k", "-g", "30", "-auto-alt-ref", "1", "-lag-in-frames",
                               "16", "-arnr-maxframes", "5"),
    "vp8.ivf": encoded(*_VP8),
    "vp9.webm": encoded(*_VP9),
    "vp9-altref.webm": encoded("-c:v", "libvpx-vp9", "-b:v", "300k", "-g", "30", "-auto-alt-ref", "1", "-cpu-used", "8",
                               "-lag-in-frames", "16"),
    "vp9.mp4": encoded(*_VP9),
    "av1.mp4": encoded(*_AV1),
    "av1.webm": encoded(*_AV1),
    "av1.ivf": encoded(*_AV1),
    "mjpeg.avi": encoded("-c:v", "mjpeg", *_HIGH, count=30),
    "mjpeg.mov": encoded("-c:v", "mjpeg", *_HIGH, count=30),
    "gif.gif": gif,
    "theora.ogv": encoded("-c:v", "libtheora", "-g", "20", "-q:v", "8"),
    "wmv2.asf": encoded("-c:v", "wmv2", "-g", "20", *_HIGH, sound=2.0),
    "msmpeg4.avi": encoded("-c:v", "msmpeg4v2", "-g", "20", *_HIGH),
    "flv1.flv": encoded("-c:v", "flv", "-g", "20", *_HIGH),
    "h263.3gp": encoded("-c:v", "h263", "-s", "176x144", "-g", "20", *_HIGH),
    "prores.mov": encoded("-c:v", "prores", count=10),
    "ffv1.mkv": encoded("-c:v", "ffv1", count=20),
    "mpeg2.mxf": encoded(*_MPEG2, "-bf", "2", "-s", "192x96"),
    "raw.avi": encoded("-c:v", "rawvideo", "-pix_fmt", "yuv420p", count=10),
    "raw.y4m": encoded("-pix_fmt", "yuv420p", count=10),
    "dv.avi": encoded("-c:v", "dvvideo", "-s", "720x576", "-r", "25", "-pix_fmt", "yuv420p", count=10),
    # Joins.
    "joined.ts": joined(_JOIN, [], []),
    "joined-sound.ts": joined([*_JOIN, *_SOUND], [], [], sound=1.5),
    "joined-three.ts": joined(_JOIN, [], [], []),
    "joined-overlap.ts": joined(_JOIN, [], ["-output_ts_offset", "0.7"]),
    "joined-close.ts": joined(_JOIN, [], ["-output_ts_offset", "1.5"]),
    "joined-gap.ts": joined(_JOIN, [], ["-output_ts_offset", "4"]),
    "joined-jump.ts": joined(_JOIN, [], ["-output_ts_offset", "36000"]),
    "joined-back.ts": joined(_JOIN, ["-output_ts_offset", "36000"], []),
    "joined-jump-sound.ts": joined([*_JOIN, *_SOUND], [], ["-output_ts_offset", "36000"], sound=1.5),
    "joined-wrap.ts": joined(_JOIN, ["-output_ts_offset", _WRAP], []),
    "joined-open.ts": joined([*_X264, *_OPEN_264], [], []),
    "joined-hevc.ts": joined([*_X265, *_QUIET_265], [], []),
    "joined-mpeg2.ts": joined([*_MPEG2, "-bf", "2"], [], []),
    "joined.m2ts": joined([*_JOIN, "-mpegts_m2ts_mode", "1"], [], [], suffix="m2ts"),
    "joined.vob": joined([*_MPEG2, "-bf", "2"], [], [], suffix="vob"),
    "joined.mpg": joined([*_MPEG2, "-bf", "2"], [], [], suffix="mpg"),
    "joined-jump.vob": joined([*_MPEG2, "-bf", "2"], [], ["-output_ts_offset", "5000"], suffix="vob"),
    "joined-three.vob": joined([*_MPEG2, "-bf", "2"], [], ["-output_ts_offset", "3600"], [], suffix="vob"),
    "joined-late.ts": joined([*_JOIN, *_SOUND], [], ["-output_ts_offset", "3"], sound=1.5),
    "joined.h264": joined(_JOIN, [], [], suffix="h264"),
    "joined.m2v": joined([*_MPEG2, "-bf", "2"], [], [], suffix="m2v"),
    "joined.flv": joined(_JOIN, [], [], suffix="flv"),
    "wrap.ts": _ts("-output_ts_offset", _WRAP),
    "far.ts": _ts("-output_ts_offset", "50000"),
    "concat.mp4": concatenated(*_JOIN, suffix="mp4"),
    "concat.mkv": concatenated(*_JOIN, suffix="mp4"),
    "concat-cut.mp4": concatenated(*_JOIN, suffix="mp4", inpoint=0.5),
    # Trims and pieces.
    "trim.mp4": copied(of=encoded(*_X264, "-g", "20"), source="mp4", before=["-ss", "1"]),
    "trim-b0.mp4": copied(of=encoded(*_X264, "-g", "60", "-bf", "0"), source="mp4", before=["-ss", "0.9"]),
    "trim-sound.mp4": copied(of=encoded(*_X264, "-g", "30", sound=2.0), source="mp4", before=["-ss", "0.5"]),
    "trim.mov": copied(of=encoded(*_X264, "-g", "20"), source="mp4", before=["-ss", "0.5"]),
    "trim.mkv": copied(of=encoded(*_X264, "-g", "20"), source="mp4", before=["-ss", "1"]),
    "trim.ts": copied(of=encoded(*_X264, "-g", "20"), source="mp4", before=["-ss", "1"]),
    "trim-end.mp4": copied("-t", "1.2", of=encoded(*_X264, "-g", "20"), source="mp4", before=["-ss", "0.3"]),
    "trim-open.mp4": copied(of=encoded(*_X264, *_OPEN_264), source="mp4", before=["-ss", "0.9"]),
    "trim-hevc.mp4": copied(of=encoded(*_X265, *_QUIET_265), source="mp4", before=["-ss", "0.9"]),
    "trim-hevc-open.mp4": copied(of=encoded(*_X265, *_OPEN_265), source="mp4", before=["-ss", "0.9"]),
    "trim-vp9.mp4": copied(of=encoded(*_VP9), source="mp4", before=["-ss", "0.9"]),
    "trim-mpeg4.mp4": copied(of=encoded(*_MPEG4, "-bf", "2"), source="mp4", before=["-ss", "0.9"]),
    "trim-zero.mp4": copied("-avoid_negative_ts", "make_zero", of=encoded(*_X264, "-g", "20"), source="mp4",
                            before=["-ss", "1"]),
    "trim-refresh.mp4": copied(of=encoded(*_X264, *_LOW_DELAY), source="mp4", before=["-ss", "1.1"]),
    "edits.mp4": edited(encoded(*_X264, "-g", "20"), (500, 1024), (500, 16384)),
    "edits-back.mp4": edited(encoded(*_X264, "-g", "20"), (500, 16384), (500, 1024)),
    "edits-twice.mp4": edited(encoded(*_X264, "-g", "20"), (500, 8704), (500, 8704)),
    "edits-late.mp4": edited(encoded(*_X264, *_OPEN_264), (700, -1), (400, 6144), (300, 21504)),
    "dash-1.mp4": lambda folder, name: segments(folder, name, 1, 2),
    "dash-3.mp4": lambda folder, name: segments(folder, name, 3),
    "dash-24.mp4": lambda folder, name: segments(folder, name, 2, 4),
    "hls.ts": hls_piece,
    # Display.
    "right.mp4": turned(0, 1, -1, 0),
    "down.mp4": turned(-1, 0, 0, -1),
    "left.mp4": turned(0, -1, 1, 0),
    "mirrored.mp4": turned(-1, 0, 0, 1),
    "upside.mp4": turned(1, 0, 0, -1),
    "transposed.mp4": turned(0, 1, 1, 0),
    "anamorphic.mp4": encoded(*_X264, "-vf", "setsar=4/3", count=20),
    # Times.
    "gap.mp4": variable(_GAP, *_X264, "-g", "20"),
    "gap.mkv": variable(_GAP, *_X264, "-g", "20"),
    "gap.webm": variable(_GAP, *_VP8),
    "variable.mp4": variable("N*33+mod(N*7,29)", *_X264, "-g", "20"),
    "variable.mkv": variable("N*N*5", *_X264, "-g", "20"),
    "slow.mp4": variable("N*4000", *_X264, "-g", "20"),
    "recorder.webm": encoded(*_VP8, "-live", "1"),
    "fast.mkv": encoded(*_X264, "-g", "20", rate="1000"),
    "late.mp4": encoded(*_X264, *_SOUND, before=["-itsoffset", "2"], sound=4.0),
    "late.mkv": encoded(*_X264, *_SOUND, before=["-itsoffset", "2"], sound=4.0),
    "late.ts": encoded(*_X264, *_SOUND, before=["-itsoffset", "2"], sound=4.0),
    "late-silent.mp4": encoded(*_X264, before=["-itsoffset", "2"]),
    "ntsc.mp4": encoded(*_X264, rate="30000/1001"),
    "film.mkv": encoded(*_X264, rate="24000/1001"),
    # Keys that are none, files without a beginning or a packet.
    "refresh.mp4": encoded(*_X264, *_LOW_DELAY),
    "refresh.mkv": encoded(*_X264, *_LOW_DELAY),
    "refresh.ts": encoded(*_X264, *_LOW_DELAY),
    "middle.ts": damage(_ts("-bf", "0", count=90), "ts", lambda data: data[188 * 40 :]),
    "middle-refresh.ts": damage(encoded(*_X264, *_LOW_DELAY), "ts", lambda data: data[188 * 40 :]),
    "middle-open.ts": damage(encoded(*_X264, *_OPEN_264), "ts", lambda data: data[188 * 40 :]),
    "middle-mpeg2.ts": damage(encoded(*_MPEG2, "-bf", "2"), "ts", lambda data: data[188 * 40 :]),
    "all-keys.mp4": renamed(encoded(*_X264, "-g", "20"), b"stss"),
    "all-keys-hevc.mp4": renamed(encoded(*_X265, *_QUIET_265), b"stss"),
    "all-keys-mpeg4.mp4": renamed(encoded(*_MPEG4), b"stss"),
    "all-keys.avi": damage(encoded(*_MPEG4), "avi", all_keys),
    "lost.ts": damage(_ts(), "ts", without_packets(0.4)),
    "lost-three.ts": damage(_ts(), "ts", without_packets(0.2, 0.5, 0.8)),
    "lost-mpeg2.ts": damage(encoded(*_MPEG2, "-bf", "2"), "ts", without_packets(0.4)),
    "cut.avi": damage(encoded(*_MPEG4), "avi", lambda data: data[: len(data) * 6 // 10]),
    "cut.flv": damage(encoded(*_X264, "-g", "20"), "flv", lambda data: data[: len(data) * 6 // 10]),
    "cut.webm": damage(encoded(*_VP8), "webm", lambda data: data[: len(data) * 6 // 10]),
    "cut.ts": damage(_ts(), "ts", lambda data: data[: len(data) * 6 // 10]),
    "cut.mkv": damage(encoded(*_X264, "-g", "20"), "mkv", lambda data: data[: len(data) * 6 // 10]),
    "cut-fragmented.mp4": damage(encoded(*_X264, "-g", "20", "-movflags", "frag_keyframe+empty_moov"), "mp4",
                                  lambda data: data[: len(data) * 6 // 10]),
    "cut.mp4": damage(encoded(*_X264, "-g", "20", "-movflags", "faststart"), "mp4",
                       lambda data: data[: len(data) * 6 // 10]),
}  # fmt: skip
