"""What a file is, by its content: images, videos, and one sentence for everything else."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.errors import MediaError
from keye.media.image import plan_image
from keye.media.source.fetch import fetch_source, media_kind, untrusted
from keye.media.video import VideoReader
from tests.support.clips import write_clip, write_sound

CONFIG = ProcessorConfig()


def shade(level: int) -> Image.Image:
    return Image.new("RGB", (32, 16), (level, 255 - level, 40))


def saved(kind: str, count: int = 1, **options: object) -> bytes:
    out = io.BytesIO()
    pictures = [shade(20 * i) for i in range(count)]
    more = {"save_all": True, "append_images": pictures[1:]} if count > 1 else {}
    pictures[0].save(out, kind, **more, **options)
    return out.getvalue()


def box(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", 8 + len(body)) + kind + body


def brand(major: bytes, *others: bytes, then: bytes = b"meta") -> bytes:
    return box(b"ftyp", major + bytes(4) + b"".join(others)) + box(then, bytes(64))


def archive(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr(name, "content")
    return out.getvalue()


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        file.addfile(tarfile.TarInfo("clip.mp4"))
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (saved("PNG"), "image"),
        (saved("PNG", 3, duration=100), "video"),
        (saved("WEBP"), "image"),
        (saved("WEBP", 3, duration=100), "video"),
        (saved("GIF", 3), "video"),
        (saved("TIFF", 3), "image"),
        (saved("TIFF", big_tiff=True), "image"),
        (saved("BMP"), "image"),
        (saved("ICO", sizes=[(16, 8)]), "image"),
        (saved("JPEG"), "image"),
        (saved("JPEG") * 3, "video"),
        (saved("MPO", 2), "image"),
        (saved("JPEG") + b"\0" * 100 + saved("JPEG"), "image"),
        (brand(b"heic", b"mif1", b"heic"), "image"),
        (brand(b"mif1", b"mif1", b"heic"), "image"),
        (brand(b"avif", b"mif1", b"miaf"), "image"),
        (brand(b"msf1", b"hevc", b"heic"), "image"),
        (brand(b"heic", b"msf1", then=b"moov"), "image"),
        (brand(b"msf1", b"hevc", then=b"moov"), "video"),
        (brand(b"hevc", b"mif1", then=b"moov"), "video"),
        (brand(b"avis", b"avif", then=b"moov"), "video"),
        (brand(b"isom", b"avc1", then=b"moov"), "video"),
        (brand(b"qt  ", then=b"moov"), "video"),
        (b"YUV4MPEG2 W16 H16 F25:1\nFRAME\n" + b"P" * 5000, "video"),
        (b"", "video"),
    ],
)  # fmt: skip
def test_images_and_videos(data: bytes, kind: str) -> None:
    if data:
        assert media_kind(fetch_source(data)) == kind


OTHERS = [
    (b"%PDF-1.7\n\xe2\xe3\xcf\xd3\n", "a PDF document, which is not read; convert its pages to PNG"),
    (b"\n\n junk %PDF-1.4\n", "a PDF document"),
    (archive("word/document.xml"), "a Word document"),
    (archive("ppt/presentation.xml"), "a PowerPoint document"),
    (archive("clip.mp4"), "a ZIP archive, which is not read; unpack it"),
    (tar(), "a TAR archive"),
    (gzip.compress(b"x", mtime=0), "a gzip archive"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n", "a PostScript document"),
    (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
    (b"<!DOCTYPE html><html></html>", "a web page"),
    (b"#EXTM3U\n#EXTINF:2,\nclip.ts\n", "a playlist"),
    (b'<?xml version="1.0"?><MPD profiles="urn:mpeg:dash"></MPD>', "a playlist"),
    (b"1\n00:00:01,000 --> 00:00:02,000\nHello\n", "a subtitle file"),
    (b"\xef\xbb\xbf1\r\n00:00:01,000 --> 00:00:02,000\r\nHello\r\n", "a subtitle file"),
    (b"WEBVTT\n\n00:01.000 --> 00:02.000\nHello\n", "a subtitle file"),
    (b"[Script Info]\nTitle: x\n", "a subtitle file"),
    (b"{10}{50}Hello\n", "a subtitle file"),
    ("Grüße aus dem Text\n".encode() * 500, "a text file"),
    ("Grüße, ein langer Brief mit wenigen Umlauten\n".encode("latin-1"), "a text file"),
    (b"\x1b[31m ANSI art \x1b[0m\n", "a text file"),
    (b"BMW cars are not bitmaps, whatever the letters say", "a text file"),
    ("text".encode("utf-16"), "a text file"),
    (b"\0\x01\0\0\0\x0f\0\x80", "a font"),
    (b"ID3\x04\0\0\0\0\0\0", "a sound file"),
    (b"RIFF\x24\0\0\0WAVEfmt ", "a sound file"),
    (bytes(128) + b"DICM", "a DICOM picture"),
    (b"P6\n16 16\n255\n" + bytes(768), "a Netpbm picture"),
    (b"8BPS\0\x01", "a Photoshop picture"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture"),
    (b"\x8aMNG\r\n\x1a\n", "an MNG animation"),
    (brand(b"crx "), "a camera's raw picture"),
    (b"II*\0\x10\0\0\0CR\x02\0", "a camera's raw picture"),
    (b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 50706, 1, 4, 1), "a camera's raw picture"),
    (saved("PNG") * 2, "a row of PNG pictures in one file"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "what"), OTHERS, ids=[what[:24] for _, what in OTHERS])
def test_what_is_neither_gets_one_sentence(data: bytes, what: str) -> None:
    source = fetch_source(data)
    for use in (media_kind, VideoReader, lambda file: plan_image(file, CONFIG)):
        for item in (source, untrusted(source)):
            with pytest.raises(MediaError, match=rf"^<bytes> is {what}[^;]*(; [^;]+)?$"):
                use(item)


def test_an_image_is_not_a_video(tmp_path: Path) -> None:
    (tmp_path / "photo.mp4").write_bytes(saved("JPEG"))
    with pytest.raises(MediaError, match=r"photo.mp4 is an image, not a video; give it as an image"):
        VideoReader(tmp_path / "photo.mp4")


def test_a_video_is_not_an_image(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="clip.mp4 is not an image that can be read"):
        plan_image(write_clip(tmp_path / "clip.mp4", frames=3), CONFIG)


def test_a_row_of_jpeg_pictures_is_a_video() -> None:
    pictures = b"".join(saved_at(level) for level in (0, 100, 200))
    for source in (fetch_source(pictures), untrusted(fetch_source(pictures))):
        with VideoReader(source) as reader:
            assert reader.info.frame_count == 3
            assert [str(note) for note in reader.info.notes] == ["it tells no times; 25 frames a second are assumed"]
            frames = reader.read(reader.plan(CONFIG, MediaOptions(nframes=3)))
        assert [round(float(frame[..., 0].mean()), -1) for frame in frames] == [0, 100, 200]


def saved_at(level: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((32, 64, 3), level, dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


@pytest.mark.skipif("AVIF" not in Image.SAVE, reason="this Pillow writes no AVIF")
def test_an_animated_avif_is_a_video_without_its_still() -> None:
    with VideoReader(fetch_source(saved("AVIF", 5, duration=100))) as reader:
        assert (reader.info.frame_count, reader.info.duration, reader.info.notes) == (5, 0.5, ())


def test_sound_in_a_container_of_videos(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="has no video stream"):
        VideoReader(write_sound(tmp_path / "sound.mp4"))
