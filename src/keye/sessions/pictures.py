"""Draws what an answer marks onto its picture, and what it rests on: a timeline of each video with the frames that were
selected most. Knows no model."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from keye.chat.replies import Region
from keye.chat.times import Interval, format_seconds
from keye.engine.evidence import Evidence, MediumEvidence
from keye.media.plan import VideoPlan
from keye.media.source.fetch import Source
from keye.media.video import DecodeLimits, iter_frames

WIDTH: Final = 1200
_MARGIN, _CHART, _LABEL, _GAP = 48, 200, 22, 12
#: Thumbnails of a video, in one row.
THUMBNAILS: Final = 6
#: Seconds between two marks of the time axis, above 10.
_TIME_STEPS: Final = (10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1800.0, 3600.0, 7200.0)
_INK, _DIM, _GRID = "#1b1f24", "#667078", "#d9dee3"
_BAR, _TOP, _SHADE = "#9db8cf", "#d55e00", "#cfead9"

#: Colours that differ also for colour-blind eyes (Okabe and Ito, 2008); one for each label, in turn.
COLOURS: Final = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
_LIGHT: Final = frozenset({"#E69F00", "#56B4E9", "#F0E442", "#CC79A7"})
_DARK_TEXT, _LIGHT_TEXT = "#000000", "#FFFFFF"
_MAX_LABEL: Final = 60


def read_thumbnails(
    source: Source, plan: VideoPlan, frames: Sequence[int], limits: DecodeLimits | None = None
) -> dict[int, Image.Image]:
    """The pictures of some planned frames, decoded again: only these few, so memory does not grow with the video."""
    chosen = sorted(frames)
    if not chosen:
        return {}
    part = replace(
        plan, fast=None, label_times=None, frame_indices=tuple(plan.frame_indices[i] for i in chosen),
        timestamps=tuple(plan.timestamps[i] for i in chosen), pts=tuple(plan.pts[i] for i in chosen),
    )  # fmt: skip
    frames_of = zip(chosen, iter_frames(part, source, limits=limits), strict=True)
    return {i: Image.fromarray(frame) for i, frame in frames_of}


def draw_evidence(
    evidence: Evidence, question: str, answer: str, intervals: Sequence[Interval] = (),
    thumbnails: Mapping[int, Mapping[int, Image.Image]] | None = None,
) -> Image.Image:  # fmt: skip
    """A picture with question and answer, and for each video a bar for every frame, the `intervals` of the answer
    shaded, and the most selected frames. `thumbnails` holds pictures of frames by the place of their medium.

    Bars show the lift: 1, the dashed line, is what every frame would get if none were preferred. Where a bar would be
    narrower than a pixel, the highest of those that share one is drawn.
    """
    title, text = _font(24), _font(19)
    head = [(line, title, _INK) for line in _wrapped(question, 88)]
    head += [(line, text, _DIM) for line in _wrapped(answer, 112)]
    if evidence.reason is not None:
        head += [(line, text, _TOP) for line in _wrapped(f"No evidence: {evidence.reason}", 112)]
    panels = [
        _panel(medium, intervals, (thumbnails or {}).get(place, {})) for place, medium in enumerate(evidence.media)
    ]
    top = _MARGIN // 2 + sum(round(font.size) + 9 for _, font, _ in head) + _GAP
    picture = Image.new("RGB", (WIDTH, top + sum(panel.height for panel in panels) + _MARGIN // 2), "white")
    draw, y = ImageDraw.Draw(picture), _MARGIN // 2
    for line, font, colour in head:
        draw.text((_MARGIN, y), line, fill=colour, font=font)
        y += round(font.size) + 9
    y = top
    for panel in panels:
        picture.paste(panel, (0, y))
        y += panel.height
    return picture


def _panel(medium: MediumEvidence, intervals: Sequence[Interval], thumbnails: Mapping[int, Image.Image]) -> Image.Image:
    if medium.kind == "image":
        line = Image.new("RGB", (WIDTH, 2 * _LABEL), "white")
        text = f"{_latin(medium.name)}: an image, {medium.share:.0%} of all selections"
        ImageDraw.Draw(line).text((_MARGIN, _LABEL // 2), text, fill=_INK, font=_font(17))
        return line
    chart = _Chart(medium)
    frames_shown = sorted(i for i in medium.top(THUMBNAILS) if i in thumbnails)
    small = [_small(thumbnails[i], (WIDTH - 2 * _MARGIN + _GAP) // THUMBNAILS - _GAP) for i in frames_shown]
    below = max((picture.height for picture in small), default=0)
    bottom = _LABEL * 2 + _CHART
    height = bottom + _LABEL * 2 + (40 + below + 2 * _LABEL + _GAP if small else 0)
    panel = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(panel)
    frames = f"{len(medium.lifts)} frame{'s' if len(medium.lifts) > 1 else ''}"
    caption = f"{_latin(medium.name)}: how often each of {frames} was selected, dashed: an even spread"
    shaded = ", shaded: the times in the answer" if intervals and chart.timed else ""
    draw.text((_MARGIN, 4), caption + shaded, fill=_DIM, font=_font(16))
    chart.draw(draw, 2 * _LABEL, intervals, set(medium.top(THUMBNAILS)))
    row, step = bottom + _LABEL * 2 + 40, (WIDTH - 2 * _MARGIN + _GAP) // THUMBNAILS
    left = _MARGIN + (THUMBNAILS - len(small)) * step // 2
    for place, (frame, picture) in enumerate(zip(frames_shown, small, strict=True)):
        x = left + place * step
        centre, middle = chart.x(frame), x + picture.width // 2
        draw.line([(centre, bottom + _LABEL * 2 - 16), (middle, row - 4)], fill=_TOP, width=2)
        panel.paste(picture, (x, row))
        draw.rectangle((x, row, x + picture.width - 1, row + picture.height - 1), outline=_TOP, width=2)
        rank = medium.top(THUMBNAILS).index(frame) + 1
        time = format_seconds(chart.times[frame]) if chart.timed else f"frame {frame}"
        label = f"#{rank}  {time}  {medium.lifts[frame]:.1f}x"
        draw.text((middle, row + picture.height + 4), label, fill=_INK, font=_font(17), anchor="ma")
    return panel


class _Chart:
    """Bars of one video over its time; frames without times stand at equal distances."""

    def __init__(self, medium: MediumEvidence) -> None:
        self.lifts, count = medium.lifts, len(medium.lifts)
        self.timed = len(medium.times) == count
        self.times = list(medium.times) if self.timed else [float(i) for i in range(count)]
        step = (self.times[-1] - self.times[0]) / (count - 1) if count > 1 else 0.0
        self.step = step or 1.0
        self.first, self.last = self.times[0] - self.step / 2, self.times[-1] + self.step / 2
        self.highest = max(2.0, *self.lifts) * 1.08

    def place(self, time: float) -> float:
        """x of a time, kept inside the chart."""
        share = (time - self.first) / (self.last - self.first)
        return _MARGIN + min(1.0, max(0.0, share)) * (WIDTH - 2 * _MARGIN)

    def x(self, frame: int) -> float:
        return self.place(self.times[frame])

    def draw(self, draw: ImageDraw.ImageDraw, top: int, intervals: Sequence[Interval], marked: set[int]) -> None:
        bottom = top + _CHART
        for start, end in intervals if self.timed else ():
            left, right = self.place(start - self.step / 2), self.place(end + self.step / 2)
            draw.rectangle((left, top, right, bottom), fill=_SHADE)
        for level in _ticks(self.highest, 4):
            y = bottom - level / self.highest * _CHART
            draw.line((_MARGIN, y, WIDTH - _MARGIN, y), fill=_GRID)
            draw.text((_MARGIN - 6, y), f"{level:g}x", fill=_DIM, font=_font(14), anchor="rm")
        self._bars(draw, bottom, marked)
        even = bottom - _CHART / self.highest
        for dash in range(_MARGIN, WIDTH - _MARGIN, 10):
            draw.line((dash, even, dash + 5, even), fill=_DIM)
        draw.line((_MARGIN, bottom, WIDTH - _MARGIN, bottom), fill=_INK)
        span = self.times[-1] - self.times[0]
        for tick in _ticks(span, 8, _TIME_STEPS if self.timed else ()):
            time = self.times[0] + tick
            x = self.place(time)
            draw.line((x, bottom, x, bottom + 5), fill=_INK)
            text = format_seconds(time) if self.timed else f"{time:g}"
            draw.text((x, bottom + 7), text, fill=_DIM, font=_font(14), anchor="ma")

    def _bars(self, draw: ImageDraw.ImageDraw, bottom: int, marked: set[int]) -> None:
        """One bar for each frame, or for each column of pixels the highest of its frames; marked ones on top."""
        width = (WIDTH - 2 * _MARGIN) / max(1.0, (self.last - self.first) / self.step)
        half = max(0.5, min(width * 0.42, 40.0))
        columns: dict[int, int] = {}
        for frame in range(len(self.lifts)):
            column = round(self.x(frame))
            if column not in columns or self.lifts[frame] > self.lifts[columns[column]]:
                columns[column] = frame
        for frame in sorted(columns.values(), key=lambda i: (i in marked, i)):
            x, height = self.x(frame), self.lifts[frame] / self.highest * _CHART
            reach = max(half, 1.5) if frame in marked else half
            if height > 0:
                draw.rectangle((x - reach, bottom - height, x + reach, bottom), fill=_TOP if frame in marked else _BAR)


def _ticks(highest: float, most: int, steps: Sequence[float] = ()) -> list[float]:
    """Round numbers from 0 up to `highest`, at most about `most` of them, in one of `steps` if one is large enough."""
    rough = highest / most if highest > 0 else 1.0
    unit = 10.0 ** np.floor(np.log10(rough))
    wide = [step for step in steps if step >= rough] if steps and rough > steps[0] else []
    step = float(wide[0] if wide else next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough))
    return [round(i * step, 6) for i in range(int(highest / step + 1e-9) + 1)]


def _small(picture: Image.Image, width: int) -> Image.Image:
    height = max(1, round(picture.height * width / picture.width))
    if height > 240:  # upright videos
        width, height = max(1, round(width * 240 / height)), 240
    return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def _wrapped(text: str, width: int, most: int = 4) -> list[str]:
    lines = textwrap.wrap(_latin(" ".join(text.split())), width) or ["(nothing)"]
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1][: width - 3] + "..."]


def _latin(text: str) -> str:
    """The text in the letters that the built-in font has."""
    return text.encode("latin-1", errors="replace").decode("latin-1")


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def draw_regions(picture: Image.Image, regions: Sequence[Region]) -> Image.Image:
    """A copy of `picture` (RGB) with the regions that have a place in it. Clips and labels alone have none.

    Lines and letters grow with the picture; a label stands above its shape, or inside where there is no room. A label
    with letters that the built-in font lacks is drawn as its number in the list of regions, counted from 1.
    """
    drawn = picture.convert("RGB")
    if drawn is picture:
        drawn = picture.copy()
    draw = ImageDraw.Draw(drawn)
    side = max(drawn.size)
    line, font = max(2, round(side / 300)), _font(max(12, round(side / 45)))
    colours: dict[str | None, str] = {}
    placed = [(number, region) for number, region in enumerate(regions, 1) if region.points]
    for _, region in placed:
        colours.setdefault(region.label, COLOURS[len(colours) % len(COLOURS)])
        _outline(draw, region, drawn.size, colours[region.label], line)
    for number, region in placed:  # after all shapes, so that no line crosses a label
        if region.label is not None:
            _label(draw, _label_text(region.label, number), region, drawn.size, colours[region.label], font, line)
    return drawn


def _outline(draw: ImageDraw.ImageDraw, region: Region, size: tuple[int, int], colour: str, line: int) -> None:
    """The shape in its colour on a wider dark one, so that it shows on any picture."""
    points = list(region.in_pixels(*size))
    for shade, width in ((_DARK_TEXT, line + 2), (colour, line)):
        if region.kind == "point":
            (x, y), radius = points[0], 2 * line + (width - line)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)
            continue
        if region.kind == "box":
            (left, top), (right, bottom) = region.in_pixels(*size)
            points = [(left, top), (right, top), (right, bottom), (left, bottom)]
        draw.line([*points, *points[:2]], fill=shade, width=width, joint="curve")


def _label(
    draw: ImageDraw.ImageDraw, text: str, region: Region, size: tuple[int, int], colour: str,
    font: ImageFont.FreeTypeFont, line: int,
) -> None:  # fmt: skip
    """The label on a ground of its colour, always inside the picture."""
    left, top = min(region.in_pixels(*size), key=lambda point: point[::-1])  # the uppermost corner
    box = draw.textbbox((0, 0), text, font=font)
    width, height = box[2] - box[0] + 2 * line, box[3] - box[1] + 2 * line
    y = top - height - line if top >= height + line else top + line
    x, y = max(0.0, min(left, size[0] - width)), max(0.0, min(y, size[1] - height))
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    ink = _DARK_TEXT if colour in _LIGHT else _LIGHT_TEXT
    draw.text((x + line - box[0], y + line - box[1]), text, fill=ink, font=font)


def _label_text(label: str, number: int) -> str:
    """The label on one line if the built-in font (Latin letters) can show it, else its number."""
    text = " ".join(label.split())[:_MAX_LABEL]
    return text if _latin(text) == text else str(number)
