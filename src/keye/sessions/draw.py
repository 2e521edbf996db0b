"""Draws what an answer marks onto the picture it is about: boxes, outlines, points, and what they show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from keye.chat.replies import Region

#: Colours that differ also for colour-blind eyes (Okabe and Ito, 2008); one for each label, in turn.
COLOURS: Final = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
_LIGHT: Final = frozenset({"#E69F00", "#56B4E9", "#F0E442", "#CC79A7"})
_DARK_TEXT, _LIGHT_TEXT = "#000000", "#FFFFFF"
_MAX_LABEL: Final = 60


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
    line, font = max(2, round(side / 300)), ImageFont.load_default(max(12, round(side / 45)))
    colours: dict[str | None, str] = {}
    placed = [(number, region) for number, region in enumerate(regions, 1) if region.points]
    for _, region in placed:
        colours.setdefault(region.label, COLOURS[len(colours) % len(COLOURS)])
        _outline(draw, region, drawn.size, colours[region.label], line)
    for number, region in placed:  # after all shapes, so that no line crosses a label
        if region.label is not None:
            _label(draw, _printable_label(region.label, number), region, drawn.size, colours[region.label], font, line)
    return drawn


def _outline(draw: ImageDraw.ImageDraw, region: Region, size: tuple[int, int], colour: str, line: int) -> None:
    """The shape in its colour on a wider dark one, so that it shows on any picture."""
    points = list(region.in_pixels(*size))
    for shade, width in ((_DARK_TEXT, line + 2), (colour, line)):
        if region.kind == "point":
            (x, y), radius = points[0], 2 * line + (width - line)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)
        elif region.kind == "box":
            (left, top), (right, bottom) = points
            corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
            draw.line([*corners, *corners[:2]], fill=shade, width=width, joint="curve")
        else:
            draw.line([*points, *points[:2]], fill=shade, width=width, joint="curve")


def _label(
    draw: ImageDraw.ImageDraw,
    text: str,
    region: Region,
    size: tuple[int, int],
    colour: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    line: int,
) -> None:
    """The label on a ground of its colour, always inside the picture."""
    left, top = min(region.in_pixels(*size), key=lambda point: point[::-1])  # the uppermost corner
    box = draw.textbbox((0, 0), text, font=font)
    width, height = box[2] - box[0] + 2 * line, box[3] - box[1] + 2 * line
    y = top - height - line if top >= height + line else top + line
    x, y = max(0.0, min(left, size[0] - width)), max(0.0, min(y, size[1] - height))
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    ink = _DARK_TEXT if colour in _LIGHT else _LIGHT_TEXT
    draw.text((x + line - box[0], y + line - box[1]), text, fill=ink, font=font)


def _printable_label(label: str, number: int) -> str:
    """The label on one line if the built-in font (Latin letters) can show it, else its number."""
    text = " ".join(label.split())[:_MAX_LABEL]
    try:
        text.encode("latin-1")
    except UnicodeEncodeError:
        return str(number)
    return text
