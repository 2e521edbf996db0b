"""Edit decision lists in the form of CMX 3600, which DaVinci Resolve, Avid and most others read.

Written here and not by otio-cmx3600-adapter, which names no frame code mode (FCM), counts 29.97 and 59.94 always as
drop-frame, begins the sequence at zero whatever its start is, leaves sound out and cannot write markers.
The format has no frame rate: the program asks for it, or takes that of its project.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import count

from keye.errors import KeyeError
from keye.exports.ranges import Cut, Event, MediaReference
from keye.files import MARK
from keye.units import one_line

#: Numbers of events have three digits, names of reels eight characters.
_MOST_EVENTS, _REEL = 999, 8
_COMMENT = 160


def to_edl(cut: Cut) -> str:
    """The events, each with its clip name, file and comment; with markers an event of one frame for each, in the form
    that Resolve imports as markers of the timeline."""
    if len(cut.events) > _MOST_EVENTS:
        raise KeyeError(f"an EDL has at most {_MOST_EVENTS} events and these are {len(cut.events)}: export fewer "
                        "moments, or as fcpxml or otio")  # fmt: skip
    mode = "DROP FRAME" if cut.rate.drop_frame else "NON-DROP FRAME"
    lines, reels = [f"TITLE: {_plain(cut.title)[:70]}", f"FCM: {mode}", ""], _reels(cut.media)
    for event in cut.events:
        lines += _marker(cut, event) if cut.mode == "markers" else _clip(cut, event, reels[event.media])
        lines.append("")
    return "\n".join([*lines, f"* {MARK}", ""])


def _clip(cut: Cut, event: Event, reel: str) -> list[str]:
    media, rate = event.media, cut.rate
    channels = "V" if not media.channels else "B" if media.channels == 1 else "AA/V"
    source = [cut.source_timecode(media, frame) for frame in (event.source_first, event.source_end)]
    record = [rate.timecode(cut.start + event.record + part) for part in (0, event.frames)]
    moment = rate.timecode(cut.start + event.record + event.first - event.source_first)
    lines = [
        f"{event.number:03d}  {reel:<8} {channels:<5} C        {' '.join([*source, *record])}",
        f"* FROM CLIP NAME: {_plain(media.name)}",
        f"* SOURCE FILE: {one_line(media.url)}",
        f"* LOC: {moment} CYAN    {_plain(event.range.label)}",
    ]
    return lines + ([f"* COMMENT: {_plain(event.range.comment)}"] if event.range.comment else [])


def _marker(cut: Cut, event: Event) -> list[str]:
    begin, end = (cut.rate.timecode(cut.start + event.first + part) for part in (0, 1))
    label, comment = (_plain(text).replace("|", "/") for text in (event.range.label, event.range.comment))
    return [
        f"{event.number:03d}  001      V     C        {begin} {end} {begin} {end}",
        f"{comment} |C:ResolveColorCyan |M:{label} |D:{event.end - event.first}",
    ]


def _reels(media: Sequence[MediaReference]) -> dict[MediaReference, str]:
    """Names of the files in what every program takes: eight ASCII letters and digits, each another name."""
    reels: dict[MediaReference, str] = {}
    for number, file in enumerate(media, 1):
        ascii_name = unicodedata.normalize("NFKD", file.name.rpartition(".")[0] or file.name).encode("ascii", "ignore")
        reel = re.sub(r"[^A-Za-z0-9]", "", ascii_name.decode())[:_REEL].upper() or "AX"
        letters, numbers = reel, map(str, count(number))
        while reel in reels.values():
            suffix = next(numbers)
            reel = letters[: _REEL - len(suffix)] + suffix
        reels[file] = reel
    return reels


def _plain(text: str) -> str:
    return one_line(text)[:_COMMENT]
