"""Places in pictures: the `objects` of a row (ms-swift), written in the syntax that Keye reads and writes.

`<ref-object>` and `<bbox>` in the texts stand for the next name and the next shape. Coordinates become thousandths of
the picture, whatever its size (`keye.chat.replies`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from keye.chat.replies import SCALE
from keye.config import ProcessorConfig
from keye.config.media import DEFAULTS
from keye.data.files.rows import Row
from keye.data.formats.context import Context
from keye.data.formats.media import MediaFields, Parts, find_source
from keye.data.samples import BadRow
from keye.errors import KeyeError, brief, is_number, is_whole

_MARK: Final = re.compile("(<ref-object>|<bbox>)")
#: Length of a picture's side in the units of each `bbox_type`; None: pixels.
_UNITS: Final[dict[str, float | None]] = {"real": None, "norm1": 1.0, "norm1000": 1000.0}
_KNOWN: Final = ("ref", "bbox", "bbox_type", "image_id", "width", "height")
MAX_OBJECTS: Final = 10_000
MAX_NUMBERS: Final = 2000


def render_objects(
    contents: Sequence[tuple[str, Parts]], objects: Any, media: MediaFields, row: Row, context: Context
) -> list[tuple[str, Parts]]:
    """The texts with names and shapes in place of their marks."""
    if not isinstance(objects, Mapping):
        raise BadRow(f"objects is a {type(objects).__name__}; give an object with ref and bbox")
    values = {name: value for name, value in objects.items() if value is not None}
    if unknown := sorted(values.keys() - set(_KNOWN)):
        raise BadRow(f"objects has the unknown field {brief(unknown[0])}; known are {', '.join(_KNOWN)}")
    names, shapes = _listed(values, "ref"), _listed(values, "bbox")
    marks = [mark for _, parts in contents for part in parts if isinstance(part, str) for mark in _MARK.findall(part)]
    for mark, listed, name in (("<ref-object>", names, "ref"), ("<bbox>", shapes, "bbox")):
        if marks.count(mark) != len(listed):
            raise BadRow(f"the texts have {marks.count(mark)} {mark} and objects.{name} {len(listed)} entries")
    sizes = _Sizes(values, media, row, context)
    texts = {
        "<ref-object>": iter([f"<|object_ref_start|>{_name(name)}<|object_ref_end|>" for name in names]),
        "<bbox>": iter([_shape(shape, *sizes.of(index)) for index, shape in enumerate(shapes)]),
    }

    def fill(text: str) -> str:
        return "".join(next(texts[piece]) if piece in texts else piece for piece in _MARK.split(text))

    return [(role, tuple(fill(part) if isinstance(part, str) else part for part in parts)) for role, parts in contents]


def _listed(values: Mapping[str, Any], name: str) -> Sequence[Any]:
    listed = values.get(name, ())
    if not isinstance(listed, list | tuple) or len(listed) > MAX_OBJECTS:
        raise BadRow(f"objects.{name} is {brief(listed)}; give a list of at most {MAX_OBJECTS:,}")
    return listed


def _name(name: object) -> str:
    if not isinstance(name, str) or not name.strip() or "<|" in name:
        raise BadRow(f"objects.ref has {brief(name)}; give the name of a thing")
    return name


class _Sizes:
    """Width and height of the picture of each shape, in the units of its coordinates."""

    def __init__(self, values: Mapping[str, Any], media: MediaFields, row: Row, context: Context) -> None:
        kind = values.get("bbox_type", "real")
        if not isinstance(kind, str) or kind not in _UNITS:
            raise BadRow(f"objects.bbox_type is {brief(kind)}; use one of {', '.join(_UNITS)}")
        self._unit = _UNITS[kind]
        self._values, self._media, self._row, self._context = values, media, row, context
        self._opened: dict[int, tuple[float, float]] = {}

    def of(self, index: int) -> tuple[float, float]:
        """Those of one shape."""
        if self._unit is not None:
            return self._unit, self._unit
        images = self._values.get("image_id") or ()
        image = images[index] if index < len(images) else 0
        if not is_whole(image) or not 0 <= image < max(1, len(self._media.images)):
            raise BadRow(f"objects.image_id has {brief(image)}, and the row {len(self._media.images)} images")
        if image not in self._opened:
            self._opened[image] = self._size(image)
        return self._opened[image]

    def _size(self, image: int) -> tuple[float, float]:
        sizes = [self._values.get(name) for name in ("width", "height")]
        if all(isinstance(size, list | tuple) and len(size) > image for size in sizes):
            sizes = [size[image] for size in sizes if size is not None]
        if sizes[0] is not None and sizes[1] is not None:
            if not (is_number(sizes[0]) and is_number(sizes[1]) and min(sizes[0], sizes[1]) > 0):
                raise BadRow(f"objects has the size {brief(sizes)}; give width and height in pixels")
            return float(sizes[0]), float(sizes[1])
        if not self._media.images:
            raise BadRow("objects.bbox counts pixels and the row has no image; use bbox_type norm1 or norm1000")
        source = find_source("image", self._media.images[image], self._row, self._context)
        if not self._context.opens:
            return float("inf"), float("inf")  # only whether the numbers are shapes is checked then
        from keye.media.image import plan_image
        from keye.media.source.fetch import as_source

        try:
            plan = plan_image(as_source(source), ProcessorConfig(), DEFAULTS)
        except KeyeError as error:
            raise BadRow(str(error)) from None
        return float(plan.source_width), float(plan.source_height)


def _shape(shape: object, width: float, height: float) -> str:
    """A point, a box or a polygon (three corners or more) between its marks."""
    numbers = list(shape) if isinstance(shape, list | tuple) else []
    if len(numbers) == 4 and all(isinstance(corner, list | tuple) for corner in numbers):
        numbers = [number for corner in numbers for number in corner]
    if not 2 <= len(numbers) <= MAX_NUMBERS or len(numbers) % 2 or not all(map(is_number, numbers)):
        raise BadRow(f"objects.bbox has {brief(shape)}; give [x, y], [x1, y1, x2, y2] or the corners of a polygon")
    slack = 1.01  # annotations may reach a pixel beyond the picture
    for x, y in zip(numbers[::2], numbers[1::2], strict=True):
        if not (0 <= x <= width * slack and 0 <= y <= height * slack):
            raise BadRow(f"objects.bbox has the point {x:g}, {y:g} outside its picture of {width:g} x {height:g}; "
                         "set bbox_type to real, norm1 or norm1000")  # fmt: skip
    points = [[_thousandth(x, width), _thousandth(y, height)] for x, y in zip(numbers[::2], numbers[1::2], strict=True)]
    if len(points) == 1:
        return f"<|point_start|>{_text(points)}<|point_end|>"
    if len(points) == 2:
        (x1, y1), (x2, y2) = points
        if x1 > x2 or y1 > y2:
            raise BadRow(f"objects.bbox has {brief(shape)}, whose second corner is not right of and below the first")
        return f"<|box_start|>{_text([[x1, y1, x2, y2]])}<|box_end|>"
    return f"<|polygon_start|>{_text([points])}<|polygon_end|>"


def _thousandth(value: float, size: float) -> int:
    return min(SCALE - 1, round(value / size * SCALE))


def _text(value: object) -> str:
    return str(value).replace(" ", "")
