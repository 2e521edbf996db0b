"""Places and moments that a reply marks: points, boxes, outlines, clips, and what they show.

The syntax is that of the 1.5 report (table 1): `<|object_ref_start|>dog<|object_ref_end|>` or `<|ocr_text_start|>...`
may come first, then `<|box_start|>[[x1, y1, x2, y2], ...]<|box_end|>` and its kin. Coordinates count thousandths of the
picture's width and height, whatever its size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from keye.chat.times import Interval, parse_intervals

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
            regions += _clips(text, start, end)
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


def _clips(text: str, start: int, end: int) -> Iterator[Region]:
    """The interval of a clip, and its caption: the rest of the line up to the next mark."""
    for interval in parse_intervals(text[start:end]) or ():
        line = text[end : end + _MAX_CAPTION].partition("\n")[0]
        following = _MARK.search(line)
        caption = (line[: following.start()] if following else line).strip()
        yield Region("clip", interval=interval, label=caption or None, label_kind="caption" if caption else None)


def _shapes(kind: str, body: str) -> list[tuple[Point, ...]] | None:
    """The corners of every shape in a list of numbers, or None if it is not one.

    Lists may be nested as in the report, or written as `(x1, y1), (x2, y2)` without an outer list.
    """
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
