"""`data:` URLs as programs write them, to bytes: RFC 2397, and what browsers and clients make of it.

A type may have parameters whose values hold commas (`video/webm;codecs=vp8,opus`), quoted or not. Base64 may be broken
into lines, lack its padding, use the alphabet for URLs, or be escaped with percent signs; anything else that is no
base64 is an error. Sizes are bounded from the length of the text, before anything is decoded.
"""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from keye.errors import MediaError

_SCHEME = "data:"
#: Longest type with parameters.
_MAX_HEADER = 4096
#: Letters that are decoded at once.
PIECE = 1 << 20
_BASE64 = re.compile(r";[ \t]*base64[ \t]*(?:;[^,;]*)*,", re.IGNORECASE)
#: A type and parameters; values that are not in quotes may hold commas.
_PARAMETERS = re.compile(r'[^;,"]*(?:;[^;,="]*(?:=(?:[ \t]*"[^"]*"[ \t]*|[^;"]*))?)*')
_PLAIN = re.compile(r'(?:"[^"]*"|[^",])*,')
_BLANKS = " \t\r\n\f"
_STANDARD = bytes.maketrans(b"-_", b"+/")


@dataclass(frozen=True)
class DataUrl:
    """A `data:` URL, taken apart. `media_type` is in lower case, without parameters, and empty where there is none; the
    content is `text` from `start` on."""

    media_type: str
    is_base64: bool
    text: str = field(repr=False)
    start: int

    @property
    def most_bytes(self) -> int:
        """Bytes that the content can have at most, from the number of its letters."""
        letters = len(self.text) - self.start - 2 * self.text.count("%", self.start)
        if not self.is_base64:
            return letters * (1 if self.text.isascii() else 4)
        blanks = sum(self.text.count(blank, self.start) for blank in _BLANKS)
        return (letters - blanks) * 3 // 4

    @property
    def parts(self) -> int:
        """How many files the content is, parted by commas: base64 has none of its own."""
        return 1 + self.text.count(",", self.start) if self.is_base64 else 1

    def decode(self, letters_at_once: int = PIECE) -> bytes:
        """The content. Raises `MediaError` for what is not base64."""
        return self._decode_base64(self.start, len(self.text), letters_at_once)

    def decode_parts(self) -> list[bytes]:
        """The files of a URL that holds several."""
        pieces, begin = [], self.start
        for _ in range(self.parts):
            end = self.text.find(",", begin) if self.is_base64 else -1
            end = len(self.text) if end < 0 else end
            pieces.append(self._decode_base64(begin, end))
            begin = end + 1
        return pieces

    def head(self, count: int) -> bytes:
        """The first bytes of the content, about `count`; empty where they cannot be decoded."""
        text = self.text[self.start : self.start + 6 * count]  # Escapes and line breaks take more than four thirds.
        if not self.is_base64:
            return _unescape(text)[:count]
        letters = _unescape(text.partition(",")[0]).translate(_STANDARD, _BLANKS.encode())
        try:
            return _base64(letters[: 4 * (count // 3)])
        except MediaError:
            return b""

    def _decode_base64(self, begin: int, end: int, letters_at_once: int = PIECE) -> bytes:
        out, rest, padded = io.BytesIO(), b"", False
        while begin < end:
            stop = min(begin + letters_at_once, end)
            if stop < end and "%" in self.text[stop - 2 : stop]:
                stop = self.text.rindex("%", stop - 2, stop)  # An escape stays in one piece.
            piece = _unescape(self.text[begin:stop])
            begin = stop
            if not self.is_base64:
                out.write(piece)
                continue
            letters = rest + piece.translate(_STANDARD, _BLANKS.encode())
            if letters and padded:
                raise _explain_invalid()
            usable = len(letters) if begin == end else len(letters) // 4 * 4
            rest, padded = letters[usable:], b"=" in letters[:usable]
            out.write(_base64(letters[:usable]))
        return out.getvalue()


def parse_data_url(reference: object) -> DataUrl | None:
    """A `data:` URL taken apart, None for anything else. Raises `MediaError` for one without a comma."""
    if not isinstance(reference, str) or reference[: len(_SCHEME)].lower() != _SCHEME:
        return None
    head = reference[len(_SCHEME) : len(_SCHEME) + _MAX_HEADER]
    mark = _BASE64.search(head)
    if mark is not None and _PARAMETERS.fullmatch(head[: mark.start()]):
        return DataUrl(_type(head), True, reference, len(_SCHEME) + mark.end())
    plain = _PLAIN.match(head)
    if plain is None:
        raise MediaError("the data: URL has no comma; write it as data:<type>;base64,<data>")
    return DataUrl(_type(head), False, reference, len(_SCHEME) + plain.end())


def decode_list(reference: object) -> list[bytes] | None:
    """The files in a data URL that holds several, parted by commas (`data:video/jpeg;base64,FIRST,SECOND,...`), which
    is how clients send the frames of a video; None for anything else."""
    url = parse_list(reference)
    return None if url is None else url.decode_parts()


def parse_list(reference: object) -> DataUrl | None:
    """A data URL that holds several files, or frames of a video of which there is one; None for anything else."""
    if not isinstance(reference, str) or "," not in reference:
        return None
    url = parse_data_url(reference)
    if url is None or not url.is_base64 or (url.parts == 1 and url.media_type != "video/jpeg"):
        return None
    return url


def _type(head: str) -> str:
    return re.split("[;,]", head, maxsplit=1)[0].strip().lower()


def _unescape(text: str) -> bytes:
    return unquote_to_bytes(text) if "%" in text else text.encode(errors="replace")


def _base64(letters: bytes) -> bytes:
    """Bytes of base64 in the standard alphabet, with or without padding."""
    if len(letters) % 4 > 1 and b"=" not in letters:
        letters += b"=" * (-len(letters) % 4)
    try:
        return base64.b64decode(letters, validate=True)
    except ValueError:
        raise _explain_invalid() from None


def _explain_invalid() -> MediaError:
    return MediaError("the data: URL is not valid base64; encode the file again")
