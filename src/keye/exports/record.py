"""The record of an answer: one HTML file with what was asked of which model and file, what was looked at and what not,
and what came out. It loads nothing from elsewhere, runs no script and reads on screens and paper.

Plain data in, text out: knows no model and decodes nothing.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from keye.exports.ranges import ExportRange
from keye.files import MARK
from keye.units import format_bytes, one_line
from keye.version import __version__

#: Most pictures, and most bytes of them together.
MOST_PICTURES, _MOST_PICTURE_BYTES = 60, 4 << 20
#: Most times that are listed, and most letters of a prompt or of the data at the end.
_MOST_TIMES, _MOST_LETTERS = 2000, 200_000
_STYLE = """
:root { color-scheme: light dark; --ground: light-dark(#f4f6f6, #101415); --surface: light-dark(#fff, #181e1f);
  --line: light-dark(#d3dada, #333d3e); --text: light-dark(#17201f, #e8eeed); --soft: light-dark(#4f5d5b, #a7b4b2);
  --accent: light-dark(#0b6b66, #5fd0c6); --raised: light-dark(#eaeeee, #232b2c); }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem; background: var(--ground); color: var(--text);
  font: 0.9rem/1.45 system-ui, "Noto Sans", "PingFang SC", "Microsoft YaHei", sans-serif;
  font-variant-numeric: tabular-nums; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; background: var(--surface); }
th, td { border: 1px solid var(--line); padding: 0.3rem 0.6rem; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
tbody th { width: 12rem; font-weight: 600; } caption { text-align: left; color: var(--soft); padding: 0.3rem 0; }
svg { display: block; width: 100%; height: 3rem; background: var(--raised); }
svg .seen { fill: var(--soft); } svg .moment { fill: var(--accent); } svg .unseen { fill: url(#hatch); }
svg pattern path { stroke: var(--soft); }
figure { display: inline-block; margin: 0 0.5rem 0.75rem 0; vertical-align: top; } figcaption { color: var(--soft); }
img { display: block; max-width: 14rem; height: auto; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; } :focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
@media print { body { max-width: none; } }
"""


@dataclass(frozen=True)
class Picture:
    """A frame on display at `time` seconds, as a JPEG file."""

    time: float
    jpeg: bytes = field(repr=False)


@dataclass(frozen=True)
class RecordedVideo:
    """A medium that was looked at.

    `sha256` is that of the file; `looked_at` are the times of frames that the model saw, as far as they are known one
    by one, `frames` how many, `seen` the spans in which they lie closely; in the `unseen` parts it saw none. `facts`
    are its plan in names and values.
    """

    name: str
    sha256: str | None
    size: int | None
    duration: float
    looked_at: Sequence[float]
    unseen: Sequence[tuple[float, float]]
    facts: Mapping[str, Any]
    pictures: Sequence[Picture] = ()
    frames: int = 0
    seen: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Record:
    """All of a run. `model` are name, number format and hashes of the model; `settings` sampling, seed and options;
    `prompts` the texts that the model was given; `reply` what it wrote; `outcome` facts such as a probability that the
    event is there; `data` the machine-readable result."""

    command: str
    question: str
    created: str
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    prompts: Sequence[str]
    reply: str
    ranges: Sequence[ExportRange]
    outcome: Mapping[str, Any]
    notes: Sequence[str]
    videos: Sequence[RecordedVideo]
    data: Mapping[str, Any]


def to_html(record: Record) -> str:
    """The file. All texts are escaped; pictures are data URLs of bounded size."""
    title = f"{record.command}: {one_line(record.question)}"
    parts = [
        f"<h1>{_text(title)}</h1>",
        _table("Run", {"asked": record.question, "at": record.created, "keye": __version__, **record.outcome}),
        "<h2>Moments</h2>", _moments(record.ranges),
        *(_video(video, record.ranges, len(record.videos) > 1) for video in record.videos),
        "<h2>Model</h2>", _table("Model and weights", record.model), _table("Settings", record.settings),
        "<h2>Notes</h2>",
        f"<ul>{''.join(f'<li>{_text(note)}</li>' for note in record.notes)}</ul>" if record.notes else "<p>None.</p>",
        "<h2>Words</h2>", _details("What the model wrote", record.reply),
        *(_details(f"Prompt {number}", text) for number, text in enumerate(record.prompts, 1)),
        _details("Data", json.dumps(record.data, ensure_ascii=False, indent=1, default=str)),
    ]  # fmt: skip
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<!-- {MARK} -->\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"
    )  # fmt: skip


def _moments(ranges: Sequence[ExportRange]) -> str:
    if not ranges:
        return "<p>None was found.</p>"
    rows = "".join(
        f"<tr><th scope=row>{number}</th><td>{_text(item.file or '')}</td><td>{_clock(item.start)}</td>"
        f"<td>{_clock(item.end)}</td><td>{'' if item.probability is None else f'{item.probability:.0%}'}</td>"
        f"<td>{_text(item.note)}</td></tr>"
        for number, item in enumerate(ranges, 1)
    )
    head = "".join(f"<th scope=col>{name}</th>" for name in ("", "video", "start", "end", "probability", "note"))
    caption = "<caption>Times as players show them</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _video(video: RecordedVideo, ranges: Sequence[ExportRange], several: bool) -> str:
    own = [item for item in ranges if not several or item.file in (None, video.name)]
    unseen = "; ".join(f"{_clock(start)} to {_clock(end)}" for start, end in video.unseen[:_MOST_TIMES])
    times = " ".join(f"{time:.2f}" for time in video.looked_at[:_MOST_TIMES])
    more = len(video.looked_at) - _MOST_TIMES
    facts = {
        "SHA-256 of the file": video.sha256 or "unknown",
        "bytes": "unknown" if video.size is None else f"{video.size:,}",
        "length": _clock(video.duration), "frames looked at": f"{video.frames:,}",
        "not looked at": unseen or "nothing but what lies between two frames", **video.facts,
    }  # fmt: skip
    figures, total = [], 0
    for picture in list(video.pictures)[:MOST_PICTURES]:
        total += len(picture.jpeg)
        if total > _MOST_PICTURE_BYTES:
            figures.append(f"<p>More pictures than {format_bytes(_MOST_PICTURE_BYTES)} are left out.</p>")
            break
        data, clock = base64.b64encode(picture.jpeg).decode(), _clock(picture.time)
        figures.append(f'<figure><img src="data:image/jpeg;base64,{data}" alt="Frame at {clock}">'
                       f"<figcaption>{clock}</figcaption></figure>")  # fmt: skip
    listed = times + (f" and {more:,} more" if more > 0 else "")
    return "\n".join([
        f"<h2>{_text(video.name)}</h2>", _timeline(video, own), _table("File and what was looked at", facts),
        *figures, *([_details("Times of the frames that were looked at, in seconds", listed)] if listed else []),
    ])  # fmt: skip


def _timeline(video: RecordedVideo, ranges: Sequence[ExportRange]) -> str:
    """A strip from the beginning to the end: frames looked at as lines, moments above them, the unseen hatched."""
    length, step = max(video.duration, 1e-6), max(1, len(video.looked_at) // 1000)

    def bar(kind: str, start: float, end: float, top: int, height: int, least: int = 1) -> str:
        left, right = (1000 * min(max(time / length, 0.0), 1.0) for time in (start, end))
        width = max(right - left, least)
        return f'<rect class="{kind}" x="{left:.2f}" y="{top}" width="{width:.2f}" height="{height}" />'

    marks = "".join([
        *(bar("unseen", start, end, 20, 28) for start, end in video.unseen[:_MOST_TIMES]),
        *(bar("seen", start, end, 34, 6) for start, end in video.seen[:_MOST_TIMES]),
        *(bar("seen", time, time, 24, 20) for time in video.looked_at[::step]),
        *(bar("moment", item.start, item.end, 4, 14, 3) for item in ranges[:_MOST_TIMES]),
    ])  # fmt: skip
    words = (f"{video.frames:,} frames looked at from 0 to {_clock(video.duration)}, {len(ranges)} moments, "
             f"{len(video.unseen)} parts not looked at")  # fmt: skip
    return (f'<svg viewBox="0 0 1000 48" preserveAspectRatio="none" role="img" aria-label="{escape(words)}">'
            '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse">'
            f'<path d="M0 6 6 0" /></pattern></defs>{marks}</svg>')  # fmt: skip


def _table(caption: str, facts: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th scope=row>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in facts.items())
    return f"<table><caption>{_text(caption)}</caption><tbody>{rows}</tbody></table>"


def _details(title: str, text: str) -> str:
    cut = text[:_MOST_LETTERS] + (" ..." if len(text) > _MOST_LETTERS else "")
    return f"<details><summary>{_text(title)}</summary><pre>{escape(cut)}</pre></details>"


def _text(value: object) -> str:
    return escape(one_line(str(value)))


def _clock(seconds: float) -> str:
    """h:mm:ss.mmm"""
    total = round(1000 * seconds)
    minutes, rest = divmod(total, 60_000)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest // 1000:02d}.{rest % 1000:03d}"
