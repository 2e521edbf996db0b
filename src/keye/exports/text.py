"""Exports for reading: JSON, CSV, subtitles (SRT, VTT) and chapters (ffmpeg's metadata, YouTube's list).

Their times are those of whole frames as well, so that every format of one export names the same pictures; JSON also has
the seconds of the answer.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from keye.errors import KeyeError
from keye.exports.ranges import Cut, Event
from keye.files import MARK
from keye.units import one_line
from keye.version import __version__

#: First of CSV files, by which spreadsheet programs know UTF-8.
_BOM = "\ufeff"
#: How cells begin that spreadsheet programs would compute.
_FORMULAS = ("=", "+", "-", "@", "\t", "\r")
COLUMNS = (
    "number", "file", "start", "end", "start_seconds", "end_seconds", "start_timecode", "end_timecode", "start_frame",
    "end_frame", "probability", "label", "note",
)  # fmt: skip
#: YouTube takes a list as chapters from three of them on, each at least so many seconds long.
_LEAST_CHAPTERS, _LEAST_SECONDS = 3, 10


def to_json(cut: Cut) -> str:
    """One object: what the timeline is, the media, and the moments by seconds, frames and timecode."""
    value = {
        "keye": __version__, "title": cut.title,
        "rate": {"frames_per_second": str(cut.rate.value), "drop_frame": cut.rate.drop_frame},
        "mode": cut.mode, "start_timecode": cut.rate.timecode(cut.start), "rounding_ms": cut.rounding_ms,
        "notes": list(cut.notes),
        "media": [
            {"name": media.name, "url": media.url, "width": media.width, "height": media.height,
             "duration": media.duration, "first_picture": media.offset, "frames_per_second": str(media.rate),
             "variable_rate": media.is_variable, "timecode": media.timecode,
             "sound": {"channels": media.channels, "sample_rate": media.sample_rate} if media.channels else None}
            for media in cut.media
        ],
        "moments": [_moment(cut, event) for event in cut.events],
    }  # fmt: skip
    return json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _moment(cut: Cut, event: Event) -> dict[str, Any]:
    source, rate = event.range, cut.rate
    return {
        "number": event.number, "file": event.media.name, "start": source.start, "end": source.end,
        "label": source.label, "probability": source.probability, "note": source.note,
        "frames": [event.first, event.end],
        "timecode": [cut.source_timecode(event.media, frame) for frame in (event.first, event.end)],
        "sequence": {
            "frames": [event.record, event.record + event.frames],
            "timecode": [rate.timecode(cut.start + event.record + part) for part in (0, event.frames)],
            "source_frames": [event.source_first, event.source_end],
        },
    }  # fmt: skip


def to_csv(cut: Cut) -> str:
    """A table with a row for each moment, in UTF-8 with the mark that spreadsheets need. A cell that they would compute
    begins with an apostrophe."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\r\n")
    table.writerow(COLUMNS)
    for event in cut.events:
        times = [_seconds(cut, event, frame) for frame in (event.first, event.end)]
        labels = [cut.source_timecode(event.media, frame) for frame in (event.first, event.end)]
        source = event.range
        probability = "" if source.probability is None else f"{source.probability:.4f}"
        table.writerow([
            event.number, _cell(event.media.name), *(_clock(time, ".") for time in times),
            *(f"{float(time):.6f}" for time in times), *labels, event.first, event.end, probability,
            _cell(source.label), _cell(source.note),
        ])  # fmt: skip
    return _BOM + out.getvalue()


def _cell(text: str) -> str:
    text = one_line(text)
    return "'" + text if text.startswith(_FORMULAS) else text


def to_srt(cut: Cut) -> str:
    """A subtitle for each moment."""
    _check_single(cut, "srt")
    cues = []
    for event in cut.events:
        times = " --> ".join(_clock(_seconds(cut, event, frame), ",") for frame in (event.first, event.end))
        cues.append(f"{event.number}\n{times}\n{_lines(event)}\n")
    return "\n".join(cues)


def to_vtt(cut: Cut) -> str:
    """The same as WebVTT."""
    _check_single(cut, "vtt")
    cues = [f"WEBVTT\n\nNOTE {MARK}\n"]
    for event in cut.events:
        times = " --> ".join(_clock(_seconds(cut, event, frame), ".") for frame in (event.first, event.end))
        text = _lines(event).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        cues.append(f"{event.number}\n{times}\n{text}\n")
    return "\n".join(cues)


def _lines(event: Event) -> str:
    """Label and comment, a line each; what would end a cue or look like its times is taken apart."""
    return (
        "\n".join(one_line(line).replace("-->", "->") for line in (event.range.label, event.range.comment) if line)
        or "-"
    )


def to_ffmetadata(cut: Cut) -> str:
    """Chapters for `ffmpeg -i VIDEO -i FILE -map_chapters 1`: one for each moment."""
    _check_single(cut, "ffmetadata")
    parts = [f";FFMETADATA1\n;{MARK}\ntitle={_escape(cut.title)}\n"]
    for event in cut.events:
        start, end = (round(_seconds(cut, event, frame) * 1_000_000) for frame in (event.first, event.end))
        title = _escape(event.text)
        parts.append(f"[CHAPTER]\nTIMEBASE=1/1000000\nSTART={start}\nEND={end}\ntitle={title}\n")
    return "\n".join(parts)


def _escape(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "=;#\\" else letter for letter in one_line(text))


def to_chapters(cut: Cut) -> str:
    """A list for the description of a video on YouTube: one line for each start, whole seconds, the first 0:00."""
    _check_single(cut, "chapters")
    marks = [(int(_seconds(cut, event, event.first)), one_line(event.text)) for event in cut.events]
    long = cut.media[0].duration >= 3600
    if not marks or marks[0][0] > 0:
        marks.insert(0, (0, one_line(cut.title)))
    return "".join(f"{_short(second, long)} {text}\n" for second, text in marks)


def chapter_notes(cut: Cut) -> Sequence[str]:
    """Why YouTube would take the list as no chapters, if it would."""
    starts = sorted({0, *(int(_seconds(cut, event, event.first)) for event in cut.events)})
    gaps = [later - earlier for earlier, later in zip(starts, [*starts[1:], cut.media[0].duration], strict=True)]
    if len(starts) < _LEAST_CHAPTERS or min(gaps) < _LEAST_SECONDS:
        return [f"YouTube shows chapters from {_LEAST_CHAPTERS} on, each at least {_LEAST_SECONDS} s long; "
                "this list has fewer or shorter ones"]  # fmt: skip
    return []


def _short(second: int, long: bool) -> str:
    minutes, seconds = divmod(second, 60)
    if long:
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"


def _seconds(cut: Cut, event: Event, frame: int) -> Fraction:
    """When players show a frame of the medium."""
    return cut.rate.seconds(frame) + Fraction(event.media.offset).limit_denominator(10**6)


def _clock(seconds: Fraction, mark: str) -> str:
    """hh:mm:ss and milliseconds behind a mark."""
    total = round(seconds * 1000)
    minutes, rest = divmod(total, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{mark}{rest % 1000:03d}"


def _check_single(cut: Cut, name: str) -> None:
    if len(cut.media) > 1:
        raise KeyeError(
            f"{name} files belong to one video and the moments are of {len(cut.media)}: export one at a time"
        )
