"""The process that reads the text tracks of video files: demuxes their packets and takes the text out of them, without
decoding. Standard library and PyAV.

Conversation: on start it sends one INFO message with the tracks, a list of (number from 1 on, language, title, whether
it is the default one); for each request line (JSON, the number of a `track`) a FRAME message with its lines, a list of
(start, end, text) in seconds as players show them. An ERROR message ends the conversation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO

import av
from av.container import InputContainer
from av.stream import Discard, Disposition

from keye.media.decode.start import run_worker
from keye.media.decode.video_file import open_container, send_failures
from keye.media.decode.wire import FRAME, INFO, send

#: Codecs whose packets hold text, and the number of commas before it in a line of ASS.
_TEXT = frozenset({"mov_text", "subrip", "srt", "text", "webvtt", "ass", "ssa"})
_ASS_FIELDS = {"ass": 8, "ssa": 8}
#: Seconds for which a line without an end is shown, until the next one at the latest.
_DEFAULT_SECONDS = 5.0


class TextTracks:
    """The text tracks of a container."""

    def __init__(self, file: BinaryIO, options: dict[str, Any]) -> None:
        self._options = options
        self._container: InputContainer = open_container(file, common_only=options["common_only"])
        self._streams = [stream for stream in self._container.streams.subtitles if _codec(stream) in _TEXT]

    def describe(self) -> list[tuple[int, str | None, str, bool]]:
        """What is known of each track."""
        most = self._options["most_tracks"]
        return [
            (number, stream.language, _title(stream)[:200],
             bool(stream.disposition & Disposition.default))
            for number, stream in enumerate(self._streams[:most], 1)
        ]  # fmt: skip

    def read(self, number: int) -> list[tuple[float, float, str]]:
        """The lines of a track."""
        stream, lines = self._streams[number - 1], list[tuple[float, float, str]]()
        start = (self._container.start_time or 0) / av.time_base
        unit, codec = float(stream.time_base or 0), _codec(stream)
        for other in self._container.streams:
            if other is not stream:
                other.discard = Discard.all
        with suppress(av.error.FFmpegError):
            self._container.seek(0)
        open_end = False
        for packet in self._packets(stream):
            begin = packet.pts * unit - start
            if open_end and lines:
                lines[-1] = (lines[-1][0], max(min(lines[-1][1], begin), lines[-1][0] + 0.001), lines[-1][2])
            text = text_of(bytes(packet), codec)[: self._options["most_characters"]]
            open_end = not packet.duration
            if text.strip() and len(lines) < self._options["most_lines"]:
                lines.append(
                    (max(begin, 0.0), begin + (packet.duration * unit if packet.duration else _DEFAULT_SECONDS), text)
                )
        return lines

    def _packets(self, stream: Any) -> Iterator[Any]:
        """The packets of a track up to where the file is damaged."""
        with suppress(av.error.FFmpegError):
            for packet in self._container.demux(stream):
                if packet.size and packet.pts is not None:
                    yield packet


def text_of(data: bytes, codec: str) -> str:
    """The text in a packet, with markup; empty where there is none."""
    if codec == "mov_text":
        # A length of two bytes, the text, and boxes of its style.
        return _decode(data[2 : 2 + int.from_bytes(data[:2], "big")])
    text = _decode(data)
    if codec in _ASS_FIELDS:
        text = text.split(",", _ASS_FIELDS[codec])[-1].replace("\\N", "\n").replace("\\n", "\n").replace("\\h", " ")
    return text


def _decode(data: bytes) -> str:
    if data.startswith((b"\xfe\xff", b"\xff\xfe")):
        return data.decode("utf-16", "replace")
    return data.decode("utf-8", "replace")


def _title(stream: Any) -> str:
    """The name of a track; writers of MP4 put it where others put their own."""
    name = stream.metadata.get("title") or stream.metadata.get("handler_name", "")
    return "" if "handler" in name.lower() else name


def _codec(stream: Any) -> str:
    context = stream.codec_context
    return "" if context is None else str(context.name)


def serve(file: BinaryIO, requests: BinaryIO, out: BinaryIO, options: dict[str, Any]) -> None:
    """Sends INFO, then answers requests until standard input ends."""
    with send_failures(out, "needs more memory to read than the limit allows"):
        tracks = TextTracks(file, options)
        send(out, INFO, json.dumps(tracks.describe()).encode())
        for line in requests:
            send(out, FRAME, json.dumps(tracks.read(json.loads(line)["track"])).encode())


def main(arguments: list[str]) -> None:
    """See `run_worker`."""
    run_worker(arguments, serve)
