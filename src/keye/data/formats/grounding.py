"""When something happens in a video: annotations of moments as questions and answers.

The question is the one that `keye ground` asks, the answer the list of intervals that `parse_intervals` reads.
Rows of several events come apart (`events_of`), so that every sample is about one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from keye.chat.times import merge_intervals, to_seconds
from keye.data.files.lists import KEY
from keye.data.formats.context import Context
from keye.data.formats.media import OPTIONS, MediaFields
from keye.data.formats.talk import Talk, Turn
from keye.data.samples import BadRow
from keye.errors import KeyeError, brief, is_number

#: Charades-STA: a video, the start and end of an event in seconds, and what happens.
CHARADES: Final = re.compile(r"(\S{1,500}) (\d{1,7}(?:\.\d{1,6})?) (\d{1,7}(?:\.\d{1,6})?)##(.+)")
#: Endings of video files that annotations leave out.
ENDINGS: Final = (".mp4", ".mkv", ".webm", ".avi", ".mov")
#: Fields of a row about moments that name its video, its event and its intervals.
VIDEOS: Final = ("video", "video_path", "video_id", "vid", KEY)
EVENTS: Final = ("query", "question", "text", "sentence", "event", "caption")
SPANS: Final = ("relevant_windows", "correct_interval", "span", "spans", "intervals", "windows")
#: Two lists of equal length: intervals and events of one video.
PAIRED: Final = (("timestamps", "sentences"), ("spans", "queries"))
MAX_EVENTS: Final = 10_000
#: Fields of such rows that say more about the video and are not learnt.
UNUSED: Final = frozenset({
    "duration", "video_duration_s", "qid", "relevant_clip_ids", "saliency_scores", "source_corpus", "category", "split",
})  # fmt: skip


def events_of(fields: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Rows of one event each, of a row with several (ActivityNet, TimeLens); None where it is about one already."""
    for spans, names in PAIRED:
        if isinstance(fields.get(spans), list) and isinstance(fields.get(names), list):
            if len(fields[spans]) != len(fields[names]):
                raise BadRow(f"{spans} has {len(fields[spans])} entries and {names} {len(fields[names])}")
            rest = {name: value for name, value in fields.items() if name not in (spans, names)}
            pairs = zip(fields[spans], fields[names], strict=True)
            return _checked([{**rest, "span": span, "query": event} for span, event in pairs])
    events = fields.get("events")
    if isinstance(events, list) and events and all(isinstance(event, Mapping) for event in events):
        rest = {name: value for name, value in fields.items() if name != "events"}
        return _checked([{**rest, **event} for event in events])
    return None


def event_key(fields: Mapping[str, Any]) -> object:
    """Video and event of a row with a start and an end; None for one that lacks them."""
    video, event = (next((fields[name] for name in names if name in fields), None) for names in (VIDEOS, EVENTS))
    if not isinstance(video, str) or not isinstance(event, str):
        return None
    others = sorted((name, repr(fields[name])) for name in fields.keys() & OPTIONS)
    return video, " ".join(event.lower().split()), tuple(others)


def _checked(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(events) > MAX_EVENTS:
        raise BadRow(f"the row has {len(events):,} events, more than {MAX_EVENTS:,}")
    return events


def read_moment(fields: Mapping[str, Any], context: Context) -> Talk:
    """A row about one event: a video, the event, and its intervals, none of which mean that it never happens."""
    words = next((fields[name] for name in EVENTS if name in fields), None)
    event = " ".join(words.split()).rstrip(".?").strip() if isinstance(words, str) else ""
    if not event:
        raise BadRow(f"the event is {brief(words)}; say in words what happens")
    try:
        question = context.ground_question(event)
    except KeyeError as error:
        raise BadRow(str(error)) from None
    options = {name: fields[name] for name in fields.keys() & OPTIONS - {"timestamps"}}
    media = MediaFields((), (_video(fields, context),), options)
    answer = write_intervals(_within(read_spans(fields), fields))
    return Talk([Turn("user", [{"type": "video"}, question]), Turn("assistant", answer)], media, task="ground")


def read_charades(fields: Mapping[str, Any], context: Context) -> Talk:
    """A line `VIDEO START END##EVENT`."""
    match = CHARADES.fullmatch(fields["text"].strip())
    if match is None:
        raise BadRow("the line is not VIDEO START END##EVENT")
    return read_moment({"video": match[1], "span": [float(match[2]), float(match[3])], "query": match[4]}, context)


def read_spans(fields: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The intervals of a row in seconds, sorted and merged."""
    if "start" in fields or "end" in fields:
        start, end = fields.get("start"), fields.get("end")
        if start in (None, "") and end in (None, ""):
            return []
        spans: Any = [[start, end]]
    else:
        name = next((name for name in SPANS if name in fields), None)
        if name is None:
            raise BadRow(f"the row has no times; give start and end, or one of {', '.join(SPANS)}")
        spans = fields[name]
        if isinstance(spans, list) and len(spans) == 2 and not isinstance(spans[0], list | tuple):
            spans = [spans]
    if not isinstance(spans, list) or len(spans) > MAX_EVENTS:
        raise BadRow(f"the times are {brief(spans)}; give [start, end] or a list of them")
    return merge_intervals(_span(span) for span in spans)


def _within(spans: list[tuple[float, float]], fields: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The intervals, ended where the video does, if the row says when."""
    duration: Any = next((fields[name] for name in ("duration", "video_duration_s") if name in fields), None)
    if not is_number(duration) or duration <= 0:
        return spans
    if spans and spans[-1][0] >= duration:
        raise BadRow(f"an interval begins at {spans[-1][0]:g} s, and the video has {duration:g} s")
    return [(start, min(end, float(duration))) for start, end in spans]


def _span(span: object) -> tuple[float, float]:
    if not isinstance(span, list | tuple) or len(span) != 2:
        raise BadRow(f"an interval is {brief(span)}; give [start, end]")
    start, end = map(_seconds, span)
    if end < start:
        raise BadRow(f"an interval ends at {end:g} s and begins at {start:g} s")
    if f"{start:.1f}" == f"{end:.1f}":
        raise BadRow(f"an interval lasts from {start:g} to {end:g} s, less than a tenth of a second")
    return start, end


def _seconds(value: object) -> float:
    try:
        seconds = to_seconds(value.strip()) if isinstance(value, str) else value
    except KeyeError as error:
        raise BadRow(str(error)) from None
    if not is_number(seconds) or not 0 <= seconds < 1e7:  # type: ignore[operator]
        raise BadRow(f"a time is {brief(value)}; give seconds, mm:ss or hh:mm:ss")
    return float(seconds)  # type: ignore[arg-type]


def write_intervals(spans: Sequence[tuple[float, float]]) -> str:
    """`[[3.5, 7.0], [9.0, 11.5]]`, or `[]` for an event that never happens."""
    return "[" + ", ".join(f"[{start:.1f}, {end:.1f}]" for start, end in spans) + "]"


def _video(fields: Mapping[str, Any], context: Context) -> Any:
    """The video of a row: an entry as `make_medium` reads it, with the ending that its name may lack."""
    name = next((fields[name] for name in VIDEOS if fields.get(name)), None)
    if not isinstance(name, str):
        return name
    path = context.root / name
    if path.suffix.lower() in ENDINGS or context.paths.exists(str(path)):
        return name
    ending = next((ending for ending in ENDINGS if context.paths.exists(f"{path}{ending}")), ENDINGS[0])
    return f"{name}{ending}"
