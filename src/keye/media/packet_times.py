"""The times of a video's packets, read from the container by a confined worker without keye's own reading of videos:
what labels of frames are checked against."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from keye.errors import is_number
from keye.media.decode.wire import INFO
from keye.media.decode.workers import UNTRUSTED_LIMITS, DecodeLimits, Worker
from keye.media.source.fetch import Source

_MOST_BYTES: Final = 256 << 20


@dataclass(frozen=True)
class PacketTimes:
    """Seconds from the container's beginning at which the pictures of a track are shown, ascending. Where they are not
    `steady`, the clock starts again inside the file."""

    seconds: tuple[float, ...]
    steady: bool


def read_packet_times(source: Source, track: int | None = None, limits: DecodeLimits | None = None) -> PacketTimes:
    """The times of a video track, by default of the one that players choose. Raises `MediaError`."""
    limits = limits or (UNTRUSTED_LIMITS if source.untrusted else DecodeLimits())
    options = {"common_only": source.untrusted, "track": track, "most": limits.frames}
    with source.open_file() as file:
        worker = Worker("keye.media.decode.times_worker", file, options, limits, name=source.name, what="time reader",
                        untrusted=source.untrusted)  # fmt: skip
    with closing(worker):
        kind, body = worker.receive(_MOST_BYTES)
        try:
            data = json.loads(bytes(body))
        except (ValueError, RecursionError):
            raise worker.broken() from None
        times = data.get("times") if kind == INFO and isinstance(data, dict) else None
        if not isinstance(times, list) or not all(map(is_number, times)):
            raise worker.broken()
        return PacketTimes(tuple(map(float, times)), data.get("steady") is True)
