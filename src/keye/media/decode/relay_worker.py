"""The process that reads a live source, an RTSP address or a camera, and writes its packets to a pipe, undecoded.

It may open that one source and nothing else: the loopback port behind which `keye.media.source.forward` has connected
to the address, or the one device file. Standard output gets the coded pictures as a transport stream (NUT for codecs
that those do not carry), which the confined decoder reads. The exit code tells what went wrong.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import av
import av.error

from keye.media.decode.sandbox import Reach
from keye.media.decode.start import enter_confinement

#: Codecs that are carried by MPEG-TS.
TS_CODECS = frozenset({"h264", "hevc", "mpeg2video", "mpeg1video", "mpeg4"})
#: Exit codes: the source ended, cannot be opened, asks for another user or password, has no video.
ENDED, UNREACHABLE, UNAUTHORIZED, NO_VIDEO = 0, 3, 4, 5
#: Microseconds of silence after which the source counts as lost, and of the stream that are looked at first.
_SILENCE, _ANALYSE = 10_000_000, 500_000


def open_source(options: dict[str, Any]) -> Any:
    """The source as a container; `options` has its `url` or its `device`."""
    if options.get("device") is not None:
        return av.open(options["device"], format="v4l2")
    return av.open(
        options["url"], format="rtsp",
        container_options={"protocol_whitelist": "rtsp,rtp,tcp", "analyzeduration": str(_ANALYSE)},
        options={"rtsp_transport": "tcp", "allowed_media_types": "video", "timeout": str(_SILENCE)},
    )  # fmt: skip


def relay(source: Any, out: Any) -> int:
    """Copies the packets of the first video stream; returns the exit code when the source ends."""
    if not source.streams.video:
        return NO_VIDEO
    stream = source.streams.video[0]
    name = "mpegts" if stream.codec_context.name in TS_CODECS else "nut"
    # The reader learns first what comes.
    out.write(name.ljust(8).encode())
    out.flush()
    with av.open(out, "w", format=name, options={"flush_packets": "1", "muxdelay": "0"}) as target:
        copied = target.add_stream_from_template(stream)
        for packet in with_times(source.demux(stream)):
            packet.stream = copied
            target.mux(packet)
    return ENDED


def with_times(packets: Iterable[Any]) -> Iterator[Any]:
    """Packets with ascending times of decoding. Those of RTSP have none before the first report of the server's clock,
    and the first one is a key without which nothing can be decoded: they come just before the first that has one. A
    clock that goes back is one that no container takes: what comes meanwhile is left out."""
    early, last = list[Any](), None
    for packet in packets:
        if packet.size == 0:
            continue
        if packet.dts is None:
            packet.dts = packet.pts
        if packet.dts is None and last is None:
            early.append(packet)
            continue
        if packet.dts is None or (last is not None and packet.dts <= last):
            continue
        for count, timeless in enumerate(reversed(early), 1):
            timeless.pts = timeless.dts = packet.dts - count
        yield from early
        early.clear()
        last = packet.dts
        yield packet


def main(arguments: list[str]) -> None:
    """No arguments: the source, which may hold a password, is a line of JSON on standard input."""
    options = json.loads(sys.stdin.readline())
    enter_confinement(options, reach=Reach(options.get("port"), options.get("device")))
    code = UNREACHABLE
    with suppress(BrokenPipeError), os.fdopen(1, "wb", buffering=0) as out:
        try:
            source = open_source(options)
            code = relay(source, out)
        except av.error.HTTPUnauthorizedError:
            code = UNAUTHORIZED
        except (av.error.FFmpegError, OSError):
            code = UNREACHABLE
    os._exit(code)
