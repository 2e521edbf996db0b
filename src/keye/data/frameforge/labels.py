"""What is in each cell of a frame: targets for pre-training a vision encoder, one cell per visual token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keye.data.frameforge.render import shape_points
from keye.data.frameforge.scene import REACH, Clip, SceneObject
from keye.data.frameforge.words import BACKGROUNDS, CHARACTERS, COLORS, SHAPES, SIZES
from keye.errors import KeyeError

COLOR_IDS = {color: index for index, color in enumerate(COLORS, 1)}
SHAPE_IDS = {shape: index for index, shape in enumerate(SHAPES, 1)}
SIZE_IDS = {size: index for index, size in enumerate(SIZES, 1)}
CHARACTER_IDS = {character: index for index, character in enumerate(CHARACTERS, 1)}
BACKGROUND_IDS = {color: index for index, color in enumerate(BACKGROUNDS)}
#: Labels of one number for each cell.
_SINGLE = ("color", "shape", "size", "text_length", "cover_color", "cover_shape")


@dataclass(frozen=True)
class DenseLabels:
    """Labels of the rows x columns cells of one frame; ids are int64 and 0 means none, except `background`.

    color, shape, size: [rows, columns], of the object whose centre lies in the cell (the nearest to the cell's centre).
    offset: float32 [rows, columns, 2], its (dx, dy) from the cell's centre, -1 to 1 at the edges, 0 without object.
    letters: [rows, columns, 2], the first two characters whose centre lies in the cell, from left to right.
    letter_order: [rows, columns, 2], the place of these characters in their text, from 1.
    text_length: [rows, columns], the number of characters of the text that the cell's characters belong to.
    cover_color, cover_shape: [rows, columns], of the object that covers the cell's centre.
    background: 0-based index into BACKGROUNDS, -1 for a texture.
    """

    color: NDArray[np.int64]
    shape: NDArray[np.int64]
    size: NDArray[np.int64]
    offset: NDArray[np.float32]
    letters: NDArray[np.int64]
    letter_order: NDArray[np.int64]
    text_length: NDArray[np.int64]
    cover_color: NDArray[np.int64]
    cover_shape: NDArray[np.int64]
    background: int


def dense_labels(clip: Clip, frame: int, cell: int = 28) -> DenseLabels:
    """The labels of `frame` at the clip's own size, in cells of `cell` x `cell` pixels.

    KeyeError when the size is not a multiple of `cell` or the clip has no such frame.
    """
    width, height = clip.size
    if width % cell or height % cell:
        raise KeyeError(f"size is {width}x{height}; dense labels need multiples of the cell of {cell} pixels")
    if not 0 <= frame < clip.frames:
        raise KeyeError(f"frame is {frame}; the clip has frames 0 to {clip.frames - 1}")
    rows, columns = height // cell, width // cell
    unit_x, unit_y = columns / clip.scene.canvas[0], rows / clip.scene.canvas[1]  # cells per scene unit
    single = {name: np.zeros((rows, columns), np.int64) for name in _SINGLE}
    letters, letter_order = (np.zeros((rows, columns, 2), np.int64) for _ in range(2))
    background = BACKGROUND_IDS.get(clip.scene.background_at(frame).color, -1)
    labels = DenseLabels(offset=np.zeros((rows, columns, 2), np.float32), letters=letters, letter_order=letter_order,
                         background=background, **single)  # fmt: skip
    for thing in clip.scene.visible_objects(frame):
        x, y = thing.position(frame)
        _label_center(labels, thing, frame, x * unit_x, y * unit_y)
        _label_cover(labels, thing, frame, (x, y), (unit_x, unit_y))
    _label_letters(labels, clip, frame, unit_x, unit_y)
    return labels


def _label_center(labels: DenseLabels, thing: SceneObject, frame: int, x: float, y: float) -> None:
    row, column = int(y), int(x)
    offset = np.array((2 * (x - column) - 1, 2 * (y - row) - 1), np.float32)
    if labels.color[row, column] and np.abs(labels.offset[row, column]).sum() <= np.abs(offset).sum():
        return
    labels.color[row, column] = COLOR_IDS[thing.color_at(frame)]
    labels.shape[row, column] = SHAPE_IDS[thing.shape]
    labels.size[row, column] = SIZE_IDS[thing.size]
    labels.offset[row, column] = offset


def _label_cover(
    labels: DenseLabels, thing: SceneObject, frame: int, center: tuple[float, float], units: tuple[float, float]
) -> None:
    reach = thing.radius * REACH
    points = shape_points(thing.shape, thing.radius)
    near = [range(max(0, int((middle - reach) * unit)), min(cells, int((middle + reach) * unit) + 1))
            for middle, unit, cells in zip(center, units, reversed(labels.color.shape), strict=True)]  # fmt: skip
    for row in near[1]:
        for column in near[0]:
            if _inside(points, (column + 0.5) / units[0] - center[0], (row + 0.5) / units[1] - center[1]):
                labels.cover_color[row, column] = COLOR_IDS[thing.color_at(frame)]
                labels.cover_shape[row, column] = SHAPE_IDS[thing.shape]


def _inside(points: Sequence[tuple[float, float]], x: float, y: float) -> bool:
    """Whether (x, y) lies in the polygon: a ray to the right crosses its outline an odd number of times."""
    inside = False
    x0, y0 = points[-1]
    for x1, y1 in points:
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
            inside = not inside
        x0, y0 = x1, y1
    return inside


def _label_letters(labels: DenseLabels, clip: Clip, frame: int, unit_x: float, unit_y: float) -> None:
    text = clip.scene.text
    if text is None or not text.visible(frame):
        return
    row = int(text.middle * unit_y)
    for place, (center, character) in enumerate(zip(text.centers, text.content, strict=True), 1):
        column = int(center * unit_x)
        slots = labels.letters[row, column]
        if slots[-1]:
            continue
        slot = int(slots[0] > 0)
        slots[slot] = CHARACTER_IDS[character]
        labels.letter_order[row, column, slot] = place
        labels.text_length[row, column] = len(text.content)
