"""Scenes to pixels: anti-aliased frames at any size, with the same look after downscaling.

Every run of frames in which an object looks the same is one small picture, drawn once and pasted. This is right because
boxes of things visible together never touch, so a paste never covers another thing.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from keye.data.frameforge.backdrop import paint_texture
from keye.data.frameforge.scene import REACH, Background, Clip, Interval, RenderedText, Scene, SceneObject, font
from keye.data.frameforge.words import Rgb
from keye.errors import KeyeError

Pixels = NDArray[np.uint8]

SUPERSAMPLING = 4
_PHASES = 4  # positions within a pixel at which a shape can be drawn, along each axis
_NOISE_BANK = 1 << 18


def render(clip: Clip, size: tuple[int, int] | None = None) -> Pixels:
    """The frames of `clip`, uint8 RGB [frames, height, width, 3], at `size` (width, height) or the clip's own.

    KeyeError when `size` has another aspect ratio than the clip.
    """
    scene = clip.scene
    width, height = size or clip.size
    scales = width / scene.canvas[0], height / scene.canvas[1]
    if abs(scales[0] / scales[1] - 1) > 0.05:
        raise KeyeError(f"size is {width}x{height}; the clip needs the aspect ratio of {clip.size[0]}x{clip.size[1]}")
    frames = np.empty((clip.frames, height, width, 3), np.uint8)
    for start in scene.backgrounds:  # each until the next one
        frames[start.frame :] = start.rgb
        if start.texture is not None:
            units = (scales[0] * scales[1]) ** 0.5
            frames[start.frame :] = paint_texture(start.texture, clip.timestamps[start.frame :], (width, height), units)
    for thing in scene.objects:
        _paint_object(frames, scene, thing, scales)
    if scene.text:
        mask, left, top = _text_mask(scene.text, scales)
        for first, last, background in _runs(scene, scene.text.intervals, clip.frames):
            _draw(frames[first : last + 1], mask, scene.text.rgb, background, left, top)
    if scene.noise:
        # Colours stay within 8..247, so adding small signed numbers modulo 256 never wraps around.
        frames += _grain(clip, width, height)
    return frames


def shape_points(shape: str, radius: float) -> list[tuple[float, float]]:
    """The corners of `shape` around (0, 0); a circle has 48 of them."""
    if shape == "circle":
        return _around(48, (radius,), 0.0)
    if shape == "square":
        return _around(4, (radius * 0.88 * math.sqrt(2),), math.pi / 4)
    if shape == "triangle":
        return [(0.0, -radius), (radius, 0.85 * radius), (-radius, 0.85 * radius)]
    if shape == "star":
        return _around(10, (REACH * radius, 0.45 * radius), -math.pi / 2)
    bar = 0.34 * radius
    corner = [(bar, -radius), (bar, -bar), (radius, -bar)]
    quarter_turns = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))
    return [(a * x + b * y, c * x + d * y) for a, b, c, d in quarter_turns for x, y in corner]


def _around(corners: int, radii: tuple[float, ...], turn: float) -> list[tuple[float, float]]:
    angles = [turn + 2 * math.pi * index / corners for index in range(corners)]
    return [
        (radii[index % len(radii)] * math.cos(angle), radii[index % len(radii)] * math.sin(angle))
        for index, angle in enumerate(angles)
    ]


def _runs(scene: Scene, intervals: tuple[Interval, ...], frames: int) -> Iterator[tuple[int, int, Background]]:
    """(first, last, background) of each run of visible frames over one background."""
    ends = [background.frame - 1 for background in scene.backgrounds[1:]] + [frames - 1]
    for background, end in zip(scene.backgrounds, ends, strict=True):
        for first, last in intervals:
            if max(first, background.frame) <= min(last, end):
                yield max(first, background.frame), min(last, end), background


def _paint_object(frames: Pixels, scene: Scene, thing: SceneObject, scales: tuple[float, float]) -> None:
    x0, y0 = thing.path[0] * scales[0], thing.path[1] * scales[1]
    (anchor_x, phase_x), (anchor_y, phase_y) = _split_position(x0), _split_position(y0)
    radius = thing.radius * min(scales)
    draw = _cached_shape_mask if radius < 32 else _draw_shape_mask
    mask, left, top = draw(thing.shape, radius, phase_x, phase_y)
    spots = None
    if thing.motion != "static":
        positions = np.array([thing.position(frame) for frame in range(thing.first, thing.last + 1)]) * scales
        moved = np.rint(positions - (x0, y0)).astype(int) + np.array((anchor_x + left, anchor_y + top))
        spots = dict(enumerate(moved.tolist(), thing.first))
    for first, last, background in _runs(scene, thing.intervals, len(frames)):
        for begin, end, rgb in _color_runs(thing, first, last):
            if spots is None:
                _draw(frames[begin : end + 1], mask, rgb, background, anchor_x + left, anchor_y + top)
                continue
            for frame in range(begin, end + 1):
                _draw(frames[frame], mask, rgb, background, *spots[frame])


def _color_runs(thing: SceneObject, first: int, last: int) -> Iterator[tuple[int, int, Rgb]]:
    change = thing.change
    if change is None or change.frame > last:
        yield first, last, thing.rgb
    elif change.frame <= first:
        yield first, last, change.rgb
    else:
        yield first, change.frame - 1, thing.rgb
        yield change.frame, last, change.rgb


def _draw(frames: Pixels, mask: Pixels, rgb: Rgb, background: Background, left: int, top: int) -> None:
    """Draws `rgb` where `mask` [h, w] is 255 into one frame or several, moved inside where it would stick out by a
    pixel."""
    height, width = mask.shape
    left = min(max(left, 0), frames.shape[-2] - width)
    top = min(max(top, 0), frames.shape[-3] - height)
    below = frames[..., top : top + height, left : left + width, :]
    below[...] = _tint(mask, rgb, background.rgb) if background.texture is None else _blend(mask, rgb, below)


def _tint(mask: Pixels, rgb: Rgb, background: Rgb) -> Pixels:
    """[h, w, 3]: `rgb` where `mask` [h, w] is 255, `background` where it is 0, mixed between."""
    return np.rint(np.linspace(background, rgb, 256)).astype(np.uint8)[mask]


def _blend(mask: Pixels, rgb: Rgb, below: Pixels) -> Pixels:
    """[..., h, w, 3]: `rgb` where `mask` [h, w] is 255, `below` where it is 0, mixed between."""
    share = mask[..., None].astype(np.uint16)
    over = share * np.array(rgb, np.uint16)
    return ((over + (255 - share) * below + 127) // 255).astype(np.uint8)


def _split_position(position: float) -> tuple[int, float]:
    """A position in pixels as a whole pixel and one of the phases within it."""
    steps = round(position * _PHASES)
    return steps // _PHASES, (steps % _PHASES) / _PHASES


def _draw_shape_mask(shape: str, radius: float, phase_x: float, phase_y: float) -> tuple[Pixels, int, int]:
    """Coverage [h, w] of a shape centred at (phase_x, phase_y), and where its left upper pixel lies."""
    half = math.ceil(radius * REACH) + 1
    side = 2 * half + 1
    canvas = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    points = [
        ((half + phase_x + x) * SUPERSAMPLING - 0.5, (half + phase_y + y) * SUPERSAMPLING - 0.5)
        for x, y in shape_points(shape, radius)
    ]
    ImageDraw.Draw(canvas).polygon(points, fill=255)
    mask, left, top = _crop(canvas.reduce(SUPERSAMPLING))
    return mask, left - half, top - half


_cached_shape_mask = lru_cache(maxsize=2048)(_draw_shape_mask)


def _text_mask(text: RenderedText, scales: tuple[float, float]) -> tuple[Pixels, int, int]:
    """Coverage [h, w] of a line of text, and where its left upper pixel lies in the frame."""
    fine = max(1, round(SUPERSAMPLING / min(scales)))
    left, top, right, bottom = text.box
    anchor_x, anchor_y = math.floor(left * scales[0]) - 1, math.floor(top * scales[1]) - 1
    width, height = math.ceil((right - left) * scales[0]) + 3, math.ceil((bottom - top) * scales[1]) + 3
    canvas = Image.new("L", (width * fine, height * fine))
    draw = ImageDraw.Draw(canvas)
    face = font(round(text.font_size * min(scales) * fine))
    stroke = round(text.stroke * min(scales) * fine)
    foot = (text.baseline * scales[1] - anchor_y) * fine
    for center, character in zip(text.centers, text.content, strict=True):
        spot = ((center * scales[0] - anchor_x) * fine, foot)
        draw.text(spot, character, fill=255, font=face, anchor="ms", stroke_width=stroke)
    mask, dx, dy = _crop(canvas.reduce(fine))
    return mask, anchor_x + dx, anchor_y + dy


def _crop(canvas: Image.Image) -> tuple[Pixels, int, int]:
    box = canvas.getbbox()
    assert box is not None, "something is drawn"
    return np.asarray(canvas.crop(box)), box[0], box[1]


@lru_cache(maxsize=8)
def _noise_bank(amplitude: int) -> Pixels:
    rng = np.random.default_rng(amplitude)
    return rng.integers(-amplitude, amplitude + 1, _NOISE_BANK, np.int8).view(np.uint8)


def _grain(clip: Clip, width: int, height: int) -> Pixels:
    """Grain [height, width, 3] that keeps still during the clip, coarser in larger frames to survive downscaling."""
    rows, columns = round(clip.scene.canvas[1]), round(clip.scene.canvas[0])
    count = rows * columns * 3
    offset = clip.seed * 7919 % (_NOISE_BANK - count)
    grain = _noise_bank(clip.scene.noise)[offset : offset + count].reshape(rows, columns, 3)
    if (rows, columns) == (height, width):
        return grain
    return grain[np.arange(height) * rows // height][:, np.arange(width) * columns // width]
