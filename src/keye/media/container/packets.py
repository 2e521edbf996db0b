"""Reads every packet of a video file once, without decoding but for the first frame. Standard library and PyAV.

The packets' own bytes are read only where the container does not tell: which H.264 and HEVC keys begin afresh, which
HEVC pictures lack what they need, which MPEG pictures lie between others, which VP8 and Theora packets are not shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from keye.media.container.timeline import BETWEEN, CLOSED, CORRUPT, HIDDEN, JOIN, KEY, MPEG, PACKED, Joiner, Packets

#: Types of NAL units: those of slices, and those of slices that begin afresh (IDR), of H.264 and of HEVC.
_SLICES = {"h264": range(1, 6), "hevc": range(32)}
_FRESH = {"h264": frozenset({5}), "hevc": frozenset({19, 20})}
#: HEVC: keys after which pictures may come that need what was before (CRA), keys after which such pictures lack it for
#: certain (BLA), and such pictures (RASL).
_CRA, _BLA, _SKIPPED = 21, range(16, 19), range(8, 10)
#: Formats whose packets may go back in time, since an edit list names parts of the file in any order.
_EDITED = "mov,mp4"
#: FFmpeg's flag (AVFMT_TS_DISCONT) of formats whose clock may begin again inside a file.
_RESTARTS = 0x200
#: Bytes in which headers before a picture fit.
_HEADERS = 1 << 12


@dataclass
class Scan:
    """What reading all packets tells; `ends` are seconds by stream."""

    packets: Packets = field(default_factory=Packets)
    ends: dict[int, float] = field(default_factory=dict)
    first_packet: tuple[int | None, int | None, int | None] = (None, None, None)
    first_frame: VideoFrame | None = None


def packet_key(packet: av.Packet[Any]) -> tuple[int | None, int | None, int | None]:
    """What tells a packet from others of its stream."""
    return packet.pts, packet.dts, packet.pos


def scan(container: InputContainer, stream: VideoStream) -> Scan:
    """Reads every packet; of those before the first frame that decodes, it is tried whether they do."""
    scan, codec = Scan(), stream.codec_context.name
    assert stream.time_base is not None
    unit = float(stream.time_base)
    restarts = bool(container.format.flags & _RESTARTS)
    joiner = None if container.format.name.startswith(_EDITED) else Joiner(unit, jumps=restarts)
    units = {s.index: float(s.time_base) for s in container.streams if s.time_base is not None}
    timed = {s.index for s in container.streams if s.type in ("audio", "video")}
    packets, wanted = scan.packets, stream.index
    keyed = lacking = False
    extra, at = stream.codec_context.extradata, {"h264": 4, "hevc": 21}.get(codec)
    # Bytes of the length before each NAL unit; 0 where start codes part them.
    prefix = (extra[at] & 3) + 1 if at is not None and extra and extra[0] == 1 and len(extra) > at else 0
    for packet in container.demux():
        if packet.size == 0:
            continue
        index, pts, dts, duration = packet.stream_index, packet.pts, packet.dts, packet.duration or 0
        time = dts if pts is None else pts
        if index != wanted:
            if time is not None:
                _extend(scan.ends, index, (time + duration) * units[index])
                if joiner is not None and index in timed:
                    joiner.follow(index, (time if dts is None else dts) * units[index], duration * units[index])
            continue
        flags = _flags(packet, codec, prefix)
        if codec == "hevc":
            # Pictures that need what came before a key, and lack it: decoders leave them out.
            kind = slice_kind(bytes(packet), "hevc", prefix) if flags & KEY or lacking else None
            if flags & KEY:
                lacking = kind in _BLA or (kind == _CRA and not keyed)
                keyed = True
            elif kind in _SKIPPED:
                flags |= HIDDEN
        if joiner is not None and dts is not None:
            dts, pts, joins = joiner.shift(dts, pts, duration)
            flags |= JOIN if joins else 0
        if not len(packets):
            scan.first_packet = packet_key(packet)
        if scan.first_frame is None:
            scan.first_frame = _decode_first(packet.decode)
        packets.add(pts, dts, duration, flags)
        time = dts if pts is None else pts
        if time is not None:
            _extend(scan.ends, index, (time + duration) * unit)
    if restarts:
        packets.mend_times(unit)
    if scan.first_frame is None:
        scan.first_frame = _decode_first(stream.decode)
    scan.ends.setdefault(wanted, 0.0)
    return scan


def _extend(ends: dict[int, float], index: int, end: float) -> None:
    if end > ends.get(index, 0.0):
        ends[index] = end


def _flags(packet: av.Packet[Any], codec: str, prefix: int) -> int:
    flags = KEY if packet.is_keyframe else 0
    if packet.is_discard:
        flags |= HIDDEN
    if packet.is_corrupt:
        flags |= CORRUPT
    if codec in _SLICES:
        if flags & KEY and slice_kind(bytes(packet), codec, prefix) in _FRESH[codec]:
            flags |= CLOSED
    elif codec in MPEG or codec == PACKED:
        if _lies_between(bytes(packet), codec):
            flags |= BETWEEN
    elif (codec == "vp8" and not memoryview(packet)[0] & 0x10) or (codec == "theora" and memoryview(packet)[0] & 0x80):
        flags |= HIDDEN
    return flags


def slice_kind(data: bytes, codec: str, prefix: int) -> int | None:
    """The type of NAL unit of the first slice in a packet of H.264 or HEVC."""
    place = 0
    while True:
        if prefix:
            unit = place + prefix
            place = unit + int.from_bytes(data[place:unit], "big")
        else:
            unit = data.find(b"\0\0\1", place) + 3
            if unit < 3:
                return None
            place = unit
        if unit >= len(data):
            return None
        kind = data[unit] & 31 if codec == "h264" else data[unit] >> 1 & 63
        if kind in _SLICES[codec]:
            return kind


def _lies_between(data: bytes, codec: str) -> bool:
    """Whether the first picture in a packet of MPEG-1, MPEG-2 or MPEG-4 is a B-picture."""
    mark = b"\0\0\1\xb6" if codec == PACKED else b"\0\0\1\0"
    header = data.find(mark, 0, _HEADERS)
    if header < 0:
        header = data.find(mark)
    if not 0 <= header < len(data) - 5:
        return False
    return data[header + 4] >> 6 == 2 if codec == PACKED else data[header + 5] >> 3 & 7 == 3


def _decode_first(decode: Callable[[], Sequence[Any]]) -> VideoFrame | None:
    """The first frame that decodes; damaged packets before it are passed over."""
    try:
        frames = decode()
    except av.error.FFmpegError:
        return None
    return next((frame for frame in frames if isinstance(frame, VideoFrame)), None)
