"""`data:` URLs as browsers and clients write them."""

from __future__ import annotations

import base64
from urllib.parse import quote, quote_from_bytes

import numpy as np
import pytest

from keye.errors import MediaError
from keye.media.source.fetch import FetchPolicy, decode_list, fetch_source, parse_data_url

#: All bytes, a length that needs padding, and both letters in which the two alphabets differ.
DATA = bytes(range(256)) + b"\xfb\xef\xbe\xff"
TEXT = base64.b64encode(DATA).decode()
assert "+" in TEXT and "/" in TEXT and TEXT.endswith("=")


@pytest.mark.parametrize(
    "url",
    [
        f"data:video/webm;base64,{TEXT}",
        f"data:video/webm;codecs=vp8,opus;base64,{TEXT}",
        f'data:video/webm;codecs="vp8,opus";base64,{TEXT}',
        f'data:video/mp4; codecs="avc1.42E01E, mp4a.40.2"; base64,{TEXT}',
        f"data:video/webm;codecs=vp8%2Copus;base64,{TEXT}",
        f"data:video/mp4;base64;name=clip.mp4,{TEXT}",
        f"DATA:VIDEO/MP4;BASE64,{TEXT}",
        f"data:;base64,{TEXT}",
        f"data:video/mp4;base64,{TEXT.rstrip('=')}",
        f"data:video/mp4;base64,{base64.urlsafe_b64encode(DATA).decode()}",
        f"data:video/mp4;base64,{base64.urlsafe_b64encode(DATA).decode().rstrip('=')}",
        f"data:video/mp4;base64,{quote(TEXT, safe='')}",
        "data:video/mp4;base64," + base64.encodebytes(DATA).decode(),
        "data:video/mp4;base64, " + "\r\n ".join(TEXT[i : i + 76] for i in range(0, len(TEXT), 76)) + "\t",
        "data:video/mp4," + quote_from_bytes(DATA, safe=""),
        'data:video/mp4;codecs="a,b",' + quote_from_bytes(DATA, safe=""),
    ],
)
def test_all_forms_give_the_same_bytes(url: str) -> None:
    assert fetch_source(url).data == DATA
    assert FetchPolicy().fetch(url).data == DATA
    result = parse_data_url(url)
    assert result is not None
    assert len(DATA) <= result.most_bytes <= len(DATA) + 2
    assert result.head(64) == DATA[: len(result.head(64))] != b""


@pytest.mark.parametrize(
    "body",
    [TEXT[:50] + "!" + TEXT[50:], TEXT + "A", TEXT[:-5] + "=" + TEXT[-4:], "QQ==QQ==", "QQ=", "A", "é" * 4, "\ud800AAA",
     "%3", "%%%%", "QQ=%3", "data:video/mp4;base64,AAAA", "=" * 4, "====AAAA"],
)  # fmt: skip
def test_what_is_not_base64_is_rejected(body: str) -> None:
    with pytest.raises(MediaError, match="not valid base64; encode the file again"):
        fetch_source("data:video/mp4;base64," + body)


@pytest.mark.parametrize("pad", [0, 1, 2])
@pytest.mark.parametrize("escaped", [False, True])
def test_bodies_of_many_pieces(pad: int, escaped: bool) -> None:
    data = np.random.default_rng(0).bytes(300 + pad)
    text = base64.b64encode(data).decode()
    for piece in (3, 7, 64):
        body = quote(text, safe="") if escaped else "\n".join(text)
        for url in (f"data:;base64,{body}", "data:," + quote_from_bytes(data, safe="")):
            parsed = parse_data_url(url)
            assert parsed is not None and parsed.decode(letters_at_once=piece) == data


def test_a_comma_in_a_plain_url_belongs_to_its_text() -> None:
    assert fetch_source("data:text/plain,a;base64,b").data == b"a;base64,b"
    assert fetch_source("data:,a,b%2C").data == b"a,b,"


def test_lists_of_pictures() -> None:
    assert decode_list(f"data:video/jpeg;base64,{TEXT},QQ==,QUI") == [DATA, b"A", b"AB"]
    assert decode_list("data:video/jpeg;base64,QQ==") == [b"A"]
    assert decode_list(f"data:video/webm;codecs=vp8,opus;base64,{TEXT}") is None
    assert decode_list("data:video/jpeg,QQ==,QQ==") is None
    assert decode_list("clip, second.mp4") is None


def test_sizes_are_bounded_before_decoding() -> None:
    few, many = "%41" * 1000, "%41" * 1004
    policy = FetchPolicy(video_bytes=1000)
    for head, text in (("data:,", few), ("data:;base64,", "QUFB\n" * 333)):
        assert policy.fetch(head + text).size <= 1000
    for head, text in (("data:,", many), ("data:;base64,", "QUFB\n" * 336), ("data:;base64,", quote("+" * 1400))):
        with pytest.raises(MediaError, match="more than the limit"):
            policy.fetch(head + text)
