"""Subtitles: what files and tracks of all kinds say and when, and what malformed ones cost."""

from __future__ import annotations

import random
from pathlib import Path

import av
import numpy as np
import pytest

from keye.errors import KeyeError, MediaError
from keye.media import subtitles
from keye.media.decode.subtitle_worker import text_of
from keye.media.source.fetch import fetch_source, untrusted
from keye.media.subtitles import (
    Subtitles,
    find_sidecars,
    list_tracks,
    load_subtitles,
    load_track,
    parse_subtitles,
    to_lines,
)

SRT = "1\n00:00:01,000 --> 00:00:02,500\n<i>A red</i> &amp; blue box\n\n2\n01:00:03,000 --> 01:00:04,250\ntwo\nrows\n"


def rows(read: Subtitles | None) -> list[tuple[float, float, str]]:
    assert read is not None
    return [(line.start, line.end, line.text) for line in read.lines]


EXPECTED = [(1.0, 2.5, "A red & blue box"), (3603.0, 3604.25, "two rows")]


@pytest.mark.parametrize(
    "data",
    [
        SRT.encode(),
        SRT.replace("\n", "\r\n").encode(),
        b"\xef\xbb\xbf" + SRT.encode(),
        b"\xff\xfe" + SRT.encode("utf-16-le"),
        b"\xfe\xff" + SRT.encode("utf-16-be"),
        ("WEBVTT - title\n\nSTYLE\n::cue { color: red }\n\nNOTE\na note\n\n" + SRT.replace(",", ".")).encode(),
        SRT.replace("\n\n", "\n").encode(),
        SRT.replace("02,500", "02,500  X1:1 position:90%").encode(),
    ],
    ids=["srt", "crlf", "bom", "utf-16-le", "utf-16-be", "vtt", "no-blank-rows", "settings"],
)
def test_files_of_all_forms_are_read(data: bytes) -> None:
    read = parse_subtitles(data)
    assert rows(read) == EXPECTED and read.notes == ()


def test_text_that_is_not_utf_8_is_read_and_said() -> None:
    read = parse_subtitles("1\n00:01 --> 00:02\nun café\n".encode("latin-1"))
    assert rows(read) == [(1.0, 2.0, "un café")] and "UTF-8" in read.notes[0]


def test_malformed_blocks_are_left_out_and_counted() -> None:
    text = SRT + "\n3\n00:00:09,000 --> 00:00:08,000\nbackwards\n\n4\nsoon --> later\nno times\n\n5\nno arrow\n"
    read = parse_subtitles(text.encode(), "talk.srt")
    assert rows(read) == EXPECTED
    assert read.notes == ("2 blocks of talk.srt could not be read: left out",)


def test_markup_and_control_characters_are_no_text() -> None:
    text = "1\n00:01 --> 00:02\n<v Ann><b>x</b>{\\an8}y\x1b[31m\u202eevil &lt;z&gt; 3 < 4\n"
    assert rows(parse_subtitles(text.encode()))[0][2] == "xy [31m evil <z> 3 < 4"


@pytest.mark.parametrize("data", [b"", b"hello", b"\0" * 100, b"%PDF-1.7 -->", b"WEBVTT\n"])
def test_what_holds_no_line_is_an_error(data: bytes) -> None:
    with pytest.raises(MediaError, match="no subtitle"):
        parse_subtitles(data)


def test_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MediaError, match="limit"):
        parse_subtitles(b"x" * (subtitles.MOST_BYTES + 1))
    long_line = parse_subtitles(b"1\n00:01 --> 00:02\n" + b"word " * 100_000)
    assert len(long_line.lines[0].text) <= subtitles.MOST_CHARACTERS
    monkeypatch.setattr(subtitles, "MOST_LINES", 1)
    assert parse_subtitles(SRT.encode(), "a.srt").notes == ("only the first 1 lines of a.srt were read",)


def test_any_bytes_are_read_or_rejected() -> None:
    """Nothing but lines in order or one error comes of damaged files, and nothing takes long."""
    draw = random.Random(0)
    pieces = [b"-->", b"\n", b"\n\n", b"00:00:01,000", b"<" * 50, b"{\\", b"&#99999999;", b"NOTE", b"\r", b"1", b"\xff",
              b"99:99:99.999999999", b" " * 100, "文".encode(), b"WEBVTT", b"\0"]  # fmt: skip
    for _ in range(400):
        data = b"".join(draw.choice(pieces) for _ in range(draw.randrange(200)))
        mixed = bytearray(SRT.encode() * 3)
        for _ in range(draw.randrange(20)):
            mixed[draw.randrange(len(mixed))] = draw.randrange(256)
        for tried in (data, bytes(mixed)):
            try:
                read = parse_subtitles(tried)
            except MediaError:
                continue
            assert all(0 <= line.start < line.end and line.text.isprintable() for line in read.lines)
            assert [line.start for line in read.lines] == sorted(line.start for line in read.lines)


def write_video(path: Path, text: str, language: str = "ger") -> Path:
    """A video of two seconds, with a text track where there is text."""
    srt = path.with_suffix(".txt")
    srt.write_text(text)
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=5)
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        packets = []
        if text:
            with av.open(str(srt), format="srt") as lines:
                track = container.add_stream_from_template(lines.streams[0])
                track.metadata["language"] = language
                for packet in lines.demux():
                    if packet.size:
                        packet.stream = track
                        packets.append(packet)
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * i, np.uint8), "rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        container.mux(packets)
    srt.unlink()
    return path


LINES = "1\n00:00:00,200 --> 00:00:00,500\nerste <i>Zeile</i>\n\n2\n00:00:00,900 --> 00:00:01,400\nzweite\n"


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("captioned") / "talk.mkv", LINES)


def test_text_tracks_are_read_from_untrusted_files(captioned: Path) -> None:
    source = untrusted(fetch_source(captioned))
    (track,) = list_tracks(source)
    assert (track.id, track.origin, track.language) == ("1", "track", "de")
    expected = [(0.2, 0.5, "erste Zeile"), (0.9, 1.4, "zweite")]
    assert [rows(load_track(source, choice)) for choice in (None, "1", "de", "ger")] == [expected] * 4
    for choice in ("2", "fr"):
        with pytest.raises(KeyeError, match="has no subtitles"):
            load_track(source, choice)


def test_files_beside_a_video_come_before_its_tracks(captioned: Path, tmp_path: Path) -> None:
    video = tmp_path / "talk [1].mkv"
    video.write_bytes(captioned.read_bytes())
    for name in ("talk [1].zh-Hans.vtt", "talk [1].srt", "talk [1].notes.txt", "talk [1].commentary.srt", "talk.srt"):
        (tmp_path / name).write_text("WEBVTT\n\n00:01.000 --> 00:02.000\n" + name)
    assert [path.name for path in find_sidecars(video)] == ["talk [1].srt", "talk [1].zh-Hans.vtt"]
    assert [(track.id, track.language) for track in list_tracks(video)] == [
        ("talk [1].srt", None), ("talk [1].zh-Hans.vtt", "zh-Hans"), ("1", "de"),
    ]  # fmt: skip
    assert rows(load_subtitles(video)) == [(1.0, 2.0, "talk [1].srt")]
    assert rows(load_subtitles(video, "zh"))[0][2] == "talk [1].zh-Hans.vtt"
    assert rows(load_subtitles(video, tmp_path / "talk.srt"))[0][2] == "talk.srt"
    assert load_subtitles(video, "none") is None
    # Of an upload nothing beside it is looked at, and no name is a path.
    source = untrusted(fetch_source(video))
    assert [track.id for track in list_tracks(source)] == ["1"]
    with pytest.raises(KeyeError, match="has no subtitles"):
        load_track(source, str(tmp_path / "talk.srt"))


def test_a_video_without_tracks_has_none_and_other_files_are_errors(tmp_path: Path) -> None:
    video = write_video(tmp_path / "plain.mkv", "")
    assert list_tracks(video) == [] and load_subtitles(video) is None
    (tmp_path / "noise.mkv").write_bytes(b"noise" * 200)
    with pytest.raises(MediaError):
        list_tracks(tmp_path / "noise.mkv")
    with pytest.raises(KeyeError, match="not a line"):
        to_lines([(3, 2, "backwards")])
    assert to_lines([(1, 2, "a")])[0].text == "a"


@pytest.mark.parametrize(
    ("codec", "data", "text"),
    [
        ("mov_text", b"\x00\x05helloSTYL", "hello"),
        ("mov_text", b"\x00\x00", ""),
        ("mov_text", b"", ""),
        ("ass", b"0,0,Default,,0,0,0,,one, two\\Nthree", "one, two\nthree"),
        ("webvtt", "日本".encode(), "日本"),
        ("subrip", b"\xff", "\ufffd"),
    ],
)
def test_the_text_in_packets_of_all_codecs(codec: str, data: bytes, text: str) -> None:
    assert text_of(data, codec) == text
