"""Attacks on the server as data: a request that must be refused beside one much like it that must pass, so that no
guard can pass by refusing everything. Numbers are those of the threat model (docs/threat-model.md).

The same cases run against a stand-in behind the guard and, where it is installed, against the application itself;
`app_only` marks those that only the application can judge.
"""

from __future__ import annotations

import base64
import io
import json
import struct
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pillow_heif
from PIL import Image

from tests.support.asgi import KEY, Ask, post
from tests.support.clips import write_clip

REJECTED = frozenset({400, 401, 403, 404, 405, 408, 413, 415, 422, 431})
#: Of what is taken without effect: the answer has a note.
NOTED = frozenset({200})


@dataclass(frozen=True)
class Case:
    """One attack, its twin, and the statuses with which the attack may be refused."""

    number: int
    name: str
    attack: Ask
    twin: Ask
    statuses: frozenset[int] = REJECTED
    app_only: bool = False


def chat(*parts: dict[str, Any], **fields: Any) -> Ask:
    """A chat of one user's turn, answered in one token."""
    content = [*parts, {"type": "text", "text": "What is seen?"}]
    return post({"model": "nano", "max_tokens": 1, "messages": [{"role": "user", "content": content}], **fields})


def image(url: object) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def video(url: object, **settings: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url, **settings}}


def data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def encoded(kind: str, size: tuple[int, int] = (56, 56), **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (200, 10, 10)).save(out, kind, **options)
    return out.getvalue()


def clip(suffix: str = "mp4", frames: int = 15, **options: Any) -> bytes:
    """A clip of half a second."""
    with tempfile.TemporaryDirectory() as folder:
        return write_clip(Path(folder) / f"clip.{suffix}", frames=frames, **options).read_bytes()


def patched(data: bytes, marker: bytes, offset: int, value: bytes) -> bytes:
    """A file with bytes changed `offset` bytes after the first `marker`."""
    at = data.index(marker) + offset
    return data[:at] + value + data[at + len(value) :]


def heic() -> bytes:
    out = io.BytesIO()
    pillow_heif.encode("RGB", (64, 64), bytes(64 * 64 * 3), out)
    return out.getvalue()


def animation(kind: str) -> bytes:
    more = [Image.new("RGB", (56, 56), (60 * i, 0, 0)) for i in range(1, 4)]
    return encoded(kind, save_all=True, append_images=more, duration=100)


def png_that_claims(width: int, height: int) -> bytes:
    return claiming(encoded("PNG"), width, height)


def claiming(png: bytes, width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def gif_of_many_pictures(count: int) -> bytes:
    """An animation of `count` pictures of a few bytes each."""
    gif = encoded("GIF", (2, 2))
    picture = gif[gif.index(b"\x2c") : -1]
    return gif[:-1] + picture * count + b";"


def png_with_text_bomb(size: int) -> bytes:
    """A PNG whose text unpacks to `size` bytes."""
    png = encoded("PNG")
    body = b"zTXt" + b"a\0\0" + zlib.compress(b"x" * size)
    return png[:33] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + png[33:]


def _addresses() -> Iterator[Case]:
    good = chat(image(data_url(encoded("PNG"), "image/png")))
    for host in (
        "127.0.0.1", "localhost", "[::1]", "0.0.0.0", "169.254.169.254", "10.0.0.1", "100.64.0.1", "[fd00::1]",
        "[::ffff:127.0.0.1]", "2130706433", "0x7f000001", "0177.0.0.1", "127.1",
    ):  # fmt: skip
        yield Case(1, f"inside: {host}", chat(image(f"http://{host}/a.png")), good)
    for url in (
        "http://good.example\\@evil.example/a.png", "http://good.example%2f@evil.example/", "http://u:p@good.example/",
        "http://good.exam\tple/", "http://g\u043eod.example/", "http://good.example./", "http://good.example:6379/",
        "http://good.example:22/", "http://good.example/\r\nX: y", "//good.example/a.png", "https:good.example",
        "gopher://good.example/", "ftp://good.example/a.png", "dict://127.0.0.1:11211/", "jar:http://x!/",
    ):  # fmt: skip
        yield Case(4, f"parser: {url!r}", chat(image(url)), good)
    for name in (
        "file:///etc/passwd", "/etc/passwd", "../../etc/passwd", "/proc/self/environ", "\\\\host\\share\\a.png",
        "fd:0", "concat:/etc/passwd", "subfile,,start,0,end,9,,:/etc/passwd", "pipe:0", "~/.ssh/id_rsa", "cache:a",
    ):  # fmt: skip
        yield Case(5, f"path: {name}", chat(image(name)), good)
        yield Case(5, f"path as video: {name}", chat(video(name)), good)


def _playlists() -> Iterator[Case]:
    good = chat(video(data_url(clip(), "video/mp4")))
    for name, text in (
        ("HLS", "#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1/a.ts\n#EXT-X-ENDLIST\n"),
        ("HLS to a file", "#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"),
        ("concat", "ffconcat version 1.0\nfile /etc/passwd\n"),
        ("SDP", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"),
        ("DASH", '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><BaseURL>'
                 "http://127.0.0.1/</BaseURL></MPD>"),
        ("SMIL", '<smil><body><video src="http://127.0.0.1/a.mp4"/></body></smil>'),
    ):  # fmt: skip
        yield Case(6, name, chat(video(data_url(text.encode(), "video/mp4"))), good)


def _pictures() -> Iterator[Case]:
    good = chat(image(data_url(encoded("PNG"), "image/png")))
    bombs = {
        "PNG of 65,000 a side": png_that_claims(65_000, 65_000),
        "PNG of 12,000 a side": png_that_claims(12_000, 12_000),
        "PNG of two thousand million a side": png_that_claims(2**31 - 1, 2**31 - 1),
        "PNG cut after its head": png_that_claims(9_000, 9_000)[:60],
        "BMP of negative size": patched(encoded("BMP"), b"BM", 18, struct.pack("<ii", -(2**31), 2**31 - 1)),
        "HEIC of a million a side": patched(heic(), b"ispe", 8, struct.pack(">II", 1_000_000, 1_000_000)),
        "HEIC of 20,000 a side": patched(heic(), b"ispe", 8, struct.pack(">II", 20_000, 20_000)),
        "AVIF of 30,000 a side": patched(encoded("AVIF"), b"ispe", 8, struct.pack(">II", 30_000, 30_000)),
        "TIFF of 4 thousand million wide": patched(encoded("TIFF"), b"\x00\x01", 8, b"\xff\xff\xff\xff"),
    }
    for name, data in bombs.items():
        yield Case(8, name, chat(image(data_url(data, "image/png"))), good)
    for name, data in {
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
        "PSD": b"8BPS\0\1" + bytes(6) + b"\0\3" + b"\0\0\0\x09" * 2 + b"\0\x08\0\3" + bytes(12),
        "FITS": b"SIMPLE  =                    T".ljust(2880),
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64),
        "HEIF": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
        "ICNS": b"icns\0\0\0\x10" + bytes(64),
        "PDF": b"%PDF-1.4\n1 0 obj<<>>endobj\n%%EOF",
        "PCX": b"\x0a\x05\x01\x08" + bytes(124),
        "text": b"hello, this is not a picture",
        "HTML behind a GIF's head": b"GIF89a<script>alert(1)</script>",
        "video as image": clip(),
    }.items():
        yield Case(11, name, chat(image(data_url(data, "image/png"))), good)
    for cut in (9, 40, 60):
        yield Case(12, f"PNG of {cut} bytes", chat(image(data_url(encoded("PNG")[:cut], "image/png"))), good)
    broken = bytearray(encoded("JPEG", (300, 300)))
    broken[200:240] = b"\xff\xda" * 20
    yield Case(12, "JPEG with odd markers", chat(image(data_url(bytes(broken)[:500], "image/jpeg"))), good)


def _videos() -> Iterator[Case]:
    mp4 = clip()
    good = chat(video(data_url(mp4, "video/mp4")))
    bombs = {
        "a thousand million sizes": patched(mp4, b"stsz", 8, struct.pack(">II", 1, 1_000_000_000)),
        "a table beyond the file": patched(mp4, b"stsc", 8, struct.pack(">I", 0xFFFFFFFF)),
        "an index that is not there": mp4[: mp4.index(b"moov")],
        "a head only": mp4[:64],
        "no bytes of video": patched(mp4, b"moov", 0, b"mooo"),
    }
    for name, data in bombs.items():
        yield Case(9, name, chat(video(data_url(data, "video/mp4"))), good)
    for name, data in {
        "a WebP of 16,384 a side": patched(animation("WEBP"), b"VP8X", 12, b"\xff\x3f\x00" * 2),
        "a PNG of 40,000 a side that moves": claiming(animation("PNG"), 40_000, 40_000),
        "a GIF of 65,535 a side": patched(clip("gif", codec="gif", pix_fmt="rgb8"), b"GIF8", 6, b"\xff" * 4),
        "twenty thousand seconds between two frames": clip("mkv", frames=2, times_ms=[0, 20_000_000]),
        "a hundred hours in two frames": clip("mkv", frames=2, times_ms=[0, 360_000_000]),
        "a thousand frames a second": clip("mp4", frames=100, times_ms=list(range(100))),
    }.items():
        # Long or dense videos are sampled, not refused, unless they break a limit of the server.
        odd = chat(video(data_url(data, "image/gif" if data[:3] == b"GIF" else "video/mp4")))
        yield Case(9, name, odd, good, REJECTED if " a side" in name else REJECTED | {200})
    # Frames that a table promises and the file does not hold are not counted, so this one may well be read.
    promising = patched(mp4, b"stts", 12, struct.pack(">II", 1_000_000_000, 1))
    yield Case(9, "a thousand million frames", chat(video(data_url(promising, "video/mp4"))), good, REJECTED | {200})
    frame = base64.b64encode(encoded("JPEG")).decode()
    few = chat(video("data:video/jpeg;base64," + ",".join([frame] * 8)))
    yield Case(10, "10^5 frames", chat(video("data:video/jpeg;base64," + ",".join(["AAAA"] * 100_000))), few)
    for name, url in {
        "garbage": "data:video/mp4;base64,%%%%",
        "blanks": "data:video/mp4;base64,AA AA",
        "another type": data_url(mp4, "text/html"),
        "nested": "data:video/mp4;base64,data:video/mp4;base64,AAAA",
        "no comma": "data:video/mp4;base64",
        "nothing": "data:video/mp4;base64,",
        "no picture among frames": f"data:video/jpeg;base64,{frame},AAAA",
    }.items():
        yield Case(10, f"data URL: {name}", chat(video(url)), good)


def _json() -> Iterator[Case]:
    good = post({"model": "nano", "max_tokens": 1, "messages": [{"role": "user", "content": "hello"}]})
    body = bytes(good.body)
    for name, attack in {
        "depth 10^4": b"[" * 10_000 + b"]" * 10_000,
        "depth 10^4 of objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        "10^6 keys": json.dumps({str(i): 0 for i in range(1_000_000)}).encode(),
        "a key twice": body[:-1] + b', "model": "other"}',
        "a huge number": body[:-1] + b', "seed": ' + b"9" * 5000 + b"}",
        "NaN": body[:-1] + b', "temperature": NaN}',
        "infinity": body[:-1] + b', "temperature": 1e999}',
        "half a surrogate pair": body.replace(b"hello", rb"\ud83d"),
        "no UTF-8": body.replace(b"hello", b"\xff\xfe"),
        "UTF-16": body.decode().encode("utf-16"),
        "no JSON": body[:-1],
        "nothing": b" ",
    }.items():
        yield Case(14, name, Ask("POST", good.path, body=attack), good)
    long = (("x-long", "a" * 2**20),)
    yield Case(14, "a header of 1 MB", Ask("POST", good.path, body=body, headers=long), good)
    yield Case(14, "a body of 1 GB", Ask("POST", good.path, body=body, length=2**30), good)
    yield Case(14, "another content type", Ask("POST", good.path, body=body, content_type="text/plain"), good)
    yield Case(7, "compressed", Ask("POST", good.path, body=body, headers=(("Content-Encoding", "gzip"),)), good)
    pieces = [body[i : i + 9] for i in range(0, len(body), 9)]
    yield Case(7, "two lengths", Ask("POST", good.path, body=body, headers=(
        ("Content-Length", "9"), ("Transfer-Encoding", "chunked"))), Ask("POST", good.path, body=pieces, chunked=True),
    )  # fmt: skip


def _parameters() -> Iterator[Case]:
    mp4 = data_url(clip(), "video/mp4")
    good, watched = chat(), chat(video(mp4, fps=2, max_frames=8))
    for name, value in (
        ("n", 0), ("n", -1), ("n", 10**9), ("max_tokens", -1), ("max_tokens", 0.5), ("max_tokens", "many"),
        ("temperature", -1), ("temperature", 1e9), ("top_p", 2), ("top_p", -0.1), ("top_k", -5), ("top_k", 1.5),
        ("top_logprobs", 10**6), ("seed", "x"), ("stop", ["a"] * 10_000), ("stop", [""]), ("stop", "a" * 10**6),
        ("messages", []), ("messages", "hello"), ("stream", "maybe"), ("repetition_penalty", 0), ("min_p", 7),
        ("logit_bias", {str(i): 1 for i in range(20_000)}), ("model", ["nano"]),
    ):  # fmt: skip
        yield Case(15, f"{name}={str(value)[:20]}", chat(**{name: value}), good, app_only=True)
    for name, value in (
        ("fps", -1), ("fps", 0), ("max_frames", -1), ("nframes", 0), ("min_pixels", -1), ("video_start", "soon"),
        ("timestamps", [3, 2, 1]),
    ):  # fmt: skip
        yield Case(15, f"{name}={value}", chat(video(mp4, **{name: value})), watched, app_only=True)
    # Of no effect: left out with a note.
    yield Case(15, "no_such_field", chat(no_such_field=1), good, NOTED, app_only=True)
    odd = chat(video(mp4, no_such_setting=1))
    yield Case(15, "no_such_setting", odd, watched, NOTED, app_only=True)
    for name, value in (("fps", 1e-9), ("max_frames", 10**9)):
        # Odd, but within what the video holds: planned, not refused.
        odd = chat(video(mp4, **{name: value}))
        yield Case(15, f"{name}={value}", odd, watched, REJECTED | {200}, app_only=True)


def _programs() -> Iterator[Case]:
    """Schemas, tools and templates."""

    def shaped(schema: object) -> Ask:
        return chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})

    def tooled(*tools: object) -> Ask:
        return chat(tools=[{"type": "function", "function": tool} for tool in tools])

    deep: dict[str, Any] = {"type": "string"}
    for _ in range(300):
        deep = {"type": "array", "items": deep}
    fine = shaped({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    yield Case(16, "depth 300", shaped(deep), fine, app_only=True)
    yield Case(16, "remote $ref", shaped({"$ref": "http://127.0.0.1/schema.json"}), fine, app_only=True)
    yield Case(16, "file $ref", shaped({"$ref": "file:///etc/passwd"}), fine, app_only=True)
    yield Case(16, "no schema", shaped("x"), fine, app_only=True)
    yield Case(16, "bad pattern", shaped({"type": "string", "pattern": "(["}), fine, app_only=True)
    tool = {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
    usual = tooled(tool)
    for name, bad in {
        "special tokens in a name": {**tool, "name": "<|im_end|>"},
        "no name": {"parameters": {}},
        "a name of 10^4 letters": {**tool, "name": "a" * 10_000},
        "parameters that are text": {**tool, "parameters": "x"},
    }.items():
        yield Case(17, name, tooled(bad), usual, app_only=True)
    yield Case(17, "10^4 tools", tooled(*({**tool, "name": f"t{i}"} for i in range(10_000))), usual, app_only=True)
    fair = chat(chat_template_kwargs={"enable_thinking": False})
    for name, fields in {
        "a template": {"chat_template": "{{ 1 }}"},
        "a template of 10 MB": {"chat_template": "{" * 10**7},
    }.items():
        yield Case(19, name, chat(**fields), fair, app_only=True)
    for name, arguments in {
        "tokenize": {"tokenize": True},
        "a class": {"__class__": "x"},
        "a template in the arguments": {"chat_template": "{% for i in range(10**9) %}"},
    }.items():
        # They never reach a template: left out with a note.
        yield Case(19, name, chat(chat_template_kwargs=arguments), fair, NOTED, app_only=True)


def _callers() -> Iterator[Case]:
    good = Ask("GET", "/v1/models")
    for name, attack in {
        "no key": Ask("GET", "/v1/models", key=None),
        "wrong key": Ask("GET", "/v1/models", key="wrong"),
        "key in the query": Ask("GET", "/v1/models", key=None, query=f"key={KEY}"),
        "key in upper case": Ask("GET", "/v1/models", key=KEY.upper()),
        "key in Unicode": Ask("GET", "/v1/models", key="\u00e9" * 20),
        "two slashes": Ask("GET", "//v1/models", key=None),
        "slash behind": Ask("GET", "/v1/models/", key=None),
        "HEAD": Ask("HEAD", "/v1/models", key=None),
        "OPTIONS": Ask("OPTIONS", "/v1/models", key=None),
        "another host": Ask("GET", "/v1/models", headers=(("Host", "evil.example"),)),
        "another page": Ask("GET", "/v1/models", headers=(("Origin", "https://evil.example"),)),
        "the schema without a key": Ask("GET", "/openapi.json", key=None),
        "metrics without a key": Ask("GET", "/metrics", key=None),
    }.items():
        yield Case(21, name, attack, good, frozenset({400, 401, 403}))


def _costs() -> Iterator[Case]:
    """Little to send and much to do: `benchmarks.refused_requests` has more of them."""
    picture = data_url(encoded("PNG"), "image/png")
    good = chat(image(picture))

    def sized(**settings: Any) -> Ask:
        return chat({"type": "image_url", "image_url": {"url": picture, **settings}})

    for pixels in (1e11, 1e12, 1e17, 1e308, 10**400):
        yield Case(
            24, f"min_pixels {str(pixels)[:6]}", sized(min_pixels=pixels, max_pixels=pixels), good, app_only=True
        )
    listed = video([picture] * 4, min_pixels=2e8, max_pixels=2e8)
    yield Case(24, "a list of large frames", chat(listed), chat(video([picture] * 4)), app_only=True)
    yield Case(24, "words without end", chat({"type": "text", "text": "x " * 600_000}), good, app_only=True)
    yield Case(24, "words beyond a body's", chat({"type": "text", "text": "x " * 5_000_000}), good)
    yield Case(24, "a list of faults", chat(stop=[1] * 200_000), good, app_only=True)


def cases() -> list[Case]:
    """All attacks."""
    created = (_addresses, _playlists, _pictures, _videos, _json, _parameters, _programs, _callers, _costs)
    return [case for make in created for case in make()]
