"""A finished reply taken apart: answer, reasoning, calls of tools, times and places, and which times were sampled.

Places have the syntax of the 1.5 report (table 1): `<|object_ref_start|>dog<|object_ref_end|>` or
`<|ocr_text_start|>...` may come first, then `<|box_start|>[[x1, y1, x2, y2], ...]<|box_end|>` and similar marks.
Coordinates count thousandths of the picture's width and height, whatever its size.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, cast

from keye.chat.messages import ToolCall, tool_name
from keye.chat.times import Interval, format_seconds, parse_intervals
from keye.errors import KeyeWarning

Kind = Literal["point", "box", "quad", "polygon", "clip", "label"]
LabelKind = Literal["object", "text", "caption"]
Point = tuple[float, float]

SCALE: Final = 1000
"""Coordinates run from 0 to this value across the width and the height of a picture."""

_MARK: Final = re.compile(r"<\|(object_ref|ocr_text|point|box|quad|polygon|clip_time)_(start|end)\|>")
_LABELS: Final[dict[str, LabelKind]] = {"object_ref": "object", "ocr_text": "text"}
#: Corners of one shape: fewest, and most (None: any number).
_CORNERS: Final[dict[str, tuple[int, int | None]]] = {
    "point": (1, 1), "box": (2, 2), "quad": (4, 4), "polygon": (3, None),
}  # fmt: skip
_MAX_BODY: Final = 65536
_MAX_CAPTION: Final = 2000
_MAX_DEPTH: Final = 4


@dataclass(frozen=True)
class Region:
    """One place or moment.

    `points` are the corners in thousandths of the picture: one of a point, top left and bottom right of a box, four of
    a quad, three or more of a polygon. A clip has an `interval` in seconds instead, a label alone has neither. `label`
    is what the model says is there: the name of an object, text that it read, or the caption of a clip.
    """

    kind: Kind
    points: tuple[Point, ...] = ()
    interval: Interval | None = None
    label: str | None = None
    label_kind: LabelKind | None = None

    def in_pixels(self, width: int, height: int) -> tuple[Point, ...]:
        """The corners in pixels of a picture of this size."""
        return tuple((x / SCALE * width, y / SCALE * height) for x, y in self.points)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; fields without a value are left out."""
        fields: dict[str, Any] = {"kind": self.kind}
        if self.points:
            fields["points"] = [list(point) for point in self.points]
        if self.interval is not None:
            fields["interval"] = list(self.interval)
        if self.label is not None:
            fields |= {"label": self.label, "label_kind": self.label_kind}
        return fields


def parse_regions(text: str) -> list[Region]:
    """Every region that `text` marks, in order. What is malformed (unclosed, no numbers, outside the picture) is
    passed over, never an error; one wrong shape in a list leaves out the list."""
    regions: list[Region] = []
    label: tuple[str, LabelKind] | None = None
    label_end, labelled = 0, True
    for name, start, end, body in _blocks(text):
        if label is not None and text[label_end:start].strip():
            regions += [] if labelled else [Region("label", label=label[0], label_kind=label[1])]
            label = None
        if name in _LABELS:
            if label is not None and not labelled:
                regions.append(Region("label", label=label[0], label_kind=label[1]))
            label, label_end, labelled = (body.strip(), _LABELS[name]), end, False
        elif name == "clip_time":
            for interval in parse_intervals(text[start:end]) or ():
                # Its caption is the rest of the line, up to the next mark.
                caption = _MARK.split(text[end : end + _MAX_CAPTION].partition("\n")[0], maxsplit=1)[0].strip()
                caption_kind: LabelKind | None = "caption" if caption else None
                regions.append(Region("clip", interval=interval, label=caption or None, label_kind=caption_kind))
        elif (shapes := _shapes(name, body)) is not None:
            label_text, label_kind = label or (None, None)
            kind = cast(Kind, name)
            regions += [Region(kind, points, label=label_text, label_kind=label_kind) for points in shapes]
            label_end, labelled = end, True
    if label is not None and not labelled:
        regions.append(Region("label", label=label[0], label_kind=label[1]))
    return regions


def _blocks(text: str) -> Iterator[tuple[str, int, int, str]]:
    """Name, first and last character, and body of every mark that is closed before another one begins."""
    opened: re.Match[str] | None = None
    for mark in _MARK.finditer(text):
        if mark[2] == "start":
            opened = mark
        elif opened is not None:
            if opened[1] == mark[1]:
                yield mark[1], opened.start(), mark.end(), text[opened.end() : mark.start()]
            opened = None


def _shapes(kind: str, body: str) -> list[tuple[Point, ...]] | None:
    """The corners of every shape in a list of numbers, nested as in the report or written as `(x1, y1), (x2, y2)`
    without an outer list; None if it is not one."""
    if len(body) > _MAX_BODY:
        return None
    body = body.translate(str.maketrans("()", "[]"))
    for candidate in (body, f"[{body}]"):
        try:
            return _corners(kind, json.loads(candidate), _MAX_DEPTH)
        except (ValueError, RecursionError):
            continue
    return None


def _corners(kind: str, value: Any, depth: int) -> list[tuple[Point, ...]]:
    """Shapes in nested lists; ValueError where a list is not a shape."""
    if not isinstance(value, list) or not value or not depth:
        raise ValueError
    if all(_is_coordinate(number) for number in value):
        return [_shape(kind, value)]
    pairs = all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_coordinate, pair)) for pair in value)
    if pairs and kind != "point":
        return [_shape(kind, [number for pair in value for number in pair])]
    return [shape for inner in value for shape in _corners(kind, inner, depth - 1)]


def _is_coordinate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= SCALE


def _shape(kind: str, numbers: list[float]) -> tuple[Point, ...]:
    points = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    fewest, most = _CORNERS[kind]
    if len(points) < fewest or (most is not None and len(points) > most):
        raise ValueError
    if kind == "box":
        (left, right), (top, bottom) = (sorted(axis) for axis in zip(*points, strict=True))
        return (left, top), (right, bottom)
    return points


_OPEN_CALL: Final = "<tool_call>"
_CLOSE_CALL: Final = "</tool_call>"


@dataclass(frozen=True)
class Reply:
    """The answer without its wrapping, the reasoning or None, and what the answer holds: intervals of seconds, marked
    regions, calls of tools. Calls that could be read are not in `text`; everything else the model wrote is."""

    text: str
    reasoning: str | None = None
    intervals: tuple[Interval, ...] = ()
    regions: tuple[Region, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()


def parse_reply(text: str) -> Reply:
    """Split a finished reply.

    Reasoning is what stands in `<think>` and `<analysis>`, also if the prompt opened the block or the reply was cut off
    inside it; the answer is the last `<answer>` body if there is one. This is the official order of extraction, except
    that a final `\\boxed{}` is left to the evaluation of the task that asks for one. Nothing is an error: malformed
    syntax stays in the text, but for the marks of calls; a call that was cut off is left out.
    """
    reasoning: list[str] = []
    for tag in ("analysis", "think"):
        inside, closed, rest = text.rpartition(f"</{tag}>")
        if closed:
            inside, text = inside.replace(f"<{tag}>", "", 1), rest
        else:
            before, opened, rest = text.partition(f"<{tag}>")
            if opened and not before.strip():
                inside, text = rest, ""
        if inside := inside.strip():
            reasoning.append(inside)
    text, calls = _split_calls(text)
    _, opened, answer = text.rpartition("<answer>")
    text = (answer.partition("</answer>")[0] if opened else text).strip()
    return Reply(
        text, "\n\n".join(reasoning) or None, tuple(parse_intervals(text) or ()), tuple(parse_regions(text)), calls
    )


def _split_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """The text without the calls in it, and the calls in their order."""
    before, *blocks = text.split(_OPEN_CALL)
    texts, calls = [before], []
    for block in blocks:
        body, closed, after = block.partition(_CLOSE_CALL)
        call = read_call(body)
        if call is not None:
            calls.append(call)
            texts.append(after.lstrip("\n"))
        elif closed or not begins_call(body):
            texts.append(body + after)
    return "".join(texts).replace(_CLOSE_CALL, ""), tuple(calls)


def begins_call(body: str) -> bool:
    """Whether what follows the mark of a call is one that was cut off, or nothing yet, and no text."""
    return not body.strip() or body.lstrip().startswith("{")


def read_call(body: str) -> ToolCall | None:
    """The call in `{"name": ..., "arguments": {...}}`, or None if it is anything else."""
    try:
        call = json.loads(body)
        arguments = call["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(arguments, dict):
            return None
        return ToolCall(tool_name("tool_call", call["name"]), arguments)
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def is_malformed(text: str, *, is_list: bool = False) -> bool:
    """Whether a finished reply cannot be an answer: it breaks off inside a list of times, has bytes that are no text,
    or, where a list of times was wanted (`is_list`), holds none."""
    is_open = "[[" in text and text.count("[") != text.count("]")
    if "\N{REPLACEMENT CHARACTER}" in text or is_open:
        return True
    return is_list and parse_intervals(text) is None


#: Times in replies have one decimal.
_ROUNDING: Final = 0.051
#: Times that one note lists.
_LISTED: Final = 3


@dataclass(frozen=True)
class Window:
    """From when to when a video was looked at, in seconds as the model counts them. Where players count otherwise, they
    show what the model sees at `counted` is, ascending, at `displayed`."""

    start: float
    end: float
    counted: tuple[float, ...] = ()
    displayed: tuple[float, ...] = ()

    def to_shown(self, seconds: float) -> float:
        """A time as players count it, where they count otherwise: between two known times evenly, before the first and
        after the last as far from them as the model says."""
        place = bisect_right(self.counted, seconds)
        before = max(place - 1, 0)
        rate = 1.0
        if 0 < place < len(self.counted):
            rate = (self.displayed[place] - self.displayed[before]) / (self.counted[place] - self.counted[before])
        return round(self.displayed[before] + (seconds - self.counted[before]) * rate, 3)


def collect_windows(plans: Iterable[Mapping[str, Any]], *, relative: bool = False) -> tuple[Window, ...]:
    """The windows in which the frames of each video were sampled: the `part` of its plan, else from its
    first sampled frame until the last one makes way for the next. `relative` counts them from the first sampled frame,
    for a model that sees no absolute times. Plans without times (images, frames of unknown times) have no window."""
    return tuple(window for plan in plans if (window := _window(plan, relative)) is not None)


def _window(plan: Mapping[str, Any], relative: bool) -> Window | None:
    times = plan.get("label_times") or plan.get("timestamps")
    if not times:
        return None
    first, last = float(times[0]), float(times[-1])
    part: Sequence[float] = plan.get("part") or ()
    if len(part) == 2 and not plan.get("label_times"):
        start, end = part
        return Window(max(start - first, 0.0), end - first, (0.0,), (first,)) if relative else Window(start, end)
    rate = plan.get("sample_fps")
    step = (last - first) / (len(times) - 1) if len(times) > 1 else 0.0
    end = last + max(step, 1 / rate if rate else 1.0)
    if plan.get("duration") is not None and not plan.get("label_times"):
        end = max(last, min(end, float(plan["duration"])))
    if relative:
        return Window(0.0, end - first, (0.0,), (float(plan["timestamps"][0]),))
    if plan.get("label_times"):
        return Window(first, end, tuple(times), tuple(plan["timestamps"]))
    return Window(first, end)


def keep_moments(intervals: Sequence[Interval], windows: Sequence[Window]) -> tuple[list[Interval], list[KeyeWarning]]:
    """The intervals that are moments of the video, each once, in seconds that players show, and a note on each kind of
    others.

    Left out are intervals without length, and those outside every window; one that reaches beyond the windows is cut to
    them. Without windows only the first rule holds: then no time is known to have been looked at or not.
    """
    inside: dict[Interval, None] = {}
    empty, outside, cut = [], [], []
    for start, end in intervals:
        if not start < end:
            empty.append((start, end))
            continue
        within = _within((start, end), windows)
        if within is None:
            outside.append((start, end))
            continue
        (low, high), window = within
        if window is not None and window.counted:
            inside[window.to_shown(low), window.to_shown(high)] = None
        else:
            inside[low, high] = None
        if max(abs(low - start), abs(high - end)) > _ROUNDING:
            cut.append((start, end))
    looked = f"what was looked at ({_spans([(window.start, window.end) for window in windows])})"
    notes = [
        KeyeWarning(f"the reply names {_spans(spans)}: {fault}")
        for spans, fault in (
            (empty, "without length, so not shown as a moment"),
            (outside, f"outside {looked}, so not shown as a moment"),
            (cut, f"in part outside {looked}, and cut to it"),
        )
        if spans
    ]
    return list(inside), notes


def keep_regions(regions: Sequence[Region], windows: Sequence[Window]) -> list[Region]:
    """The marked places, without clips that are no moments; clips that reach beyond the windows are cut to them, and
    have seconds that players show."""
    inside = []
    for region in regions:
        if region.interval is None:
            inside.append(region)
        elif moments := keep_moments([region.interval], windows)[0]:
            inside.append(replace(region, interval=moments[0]))
    return inside


def _within(interval: Interval, windows: Sequence[Window]) -> tuple[Interval, Window | None] | None:
    """The interval cut to the window with which it shares most, and that; None if it shares no more with any than
    rounding makes of nothing."""
    if not windows:
        return interval, None
    start, end = interval
    parts = [(max(start, window.start), min(end, window.end), window) for window in windows]
    low, high, window = max(parts, key=lambda part: part[1] - part[0])
    if high <= low or (high - low < _ROUNDING and high - low < end - start):
        return None
    # What rounding to a tenth of a second adds does not count as excess.
    return (start if low - start <= _ROUNDING else low, end if end - high <= _ROUNDING else high), window


def _spans(intervals: Sequence[Interval]) -> str:
    spans = list(dict.fromkeys(f"{format_seconds(start)} to {format_seconds(end)}" for start, end in intervals))
    more = f" and {len(spans) - _LISTED} more" if len(spans) > _LISTED else ""
    return ", ".join(spans[:_LISTED]) + more
