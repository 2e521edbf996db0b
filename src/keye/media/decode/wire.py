"""Messages between a worker process and the side that started it. Standard library only; knows no media.

A worker writes messages on standard output: a header (one byte of kind, eight bytes of length, little endian) and a
body. It reads requests on standard input, one line of JSON each."""

from __future__ import annotations

import json
import struct
import sys
import traceback
from types import TracebackType
from typing import BinaryIO

HEADER = struct.Struct("<cQ")
INFO, FRAME, THUMBNAILS, SOUND, END, ERROR, CRASH = b"I", b"F", b"T", b"S", b"N", b"E", b"X"
#: Longest body of an ERROR or CRASH message, in bytes.
MAX_WORDS = 1 << 16

#: Sample rates that every encoder and player of AAC knows; what has another one is resampled.
_RATES = frozenset({8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000})
_USUAL_RATE = 48_000


class WorkerError(Exception):
    """What is wrong with the file and what to do, without its name: a sentence, with `{}` for each option named after
    it, which each interface spells in its own way."""


def sound_form(rate: int, channels: int) -> tuple[int, int]:
    """Sample rate and channels in which sound of a file is given."""
    return rate if rate in _RATES else _USUAL_RATE, min(channels, 2)


def send(out: BinaryIO, kind: bytes, body: bytes) -> None:
    """Writes one message."""
    out.write(HEADER.pack(kind, len(body)))
    out.write(body)
    out.flush()


def send_error(out: BinaryIO, sentence: str, *options: str) -> None:
    """Writes the message that ends the conversation: a JSON list of a `WorkerError`'s sentence and options."""
    send(out, ERROR, json.dumps([sentence, *options]).encode())


def report_crashes(out: BinaryIO) -> None:
    """Makes an uncaught exception a CRASH message with its traceback: a confined worker cannot write to its log."""

    def crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        send(out, CRASH, text.encode(errors="replace")[-MAX_WORDS:])

    sys.excepthook = crash
