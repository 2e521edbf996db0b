"""What a clip shows: seeded scenes of named objects, rendered text and scene cuts, as vectors and frame numbers.

Knows no pixels and no wording. Lengths are in scene units: a canvas of 112 x 112 pixels has 112 x 112 units, and other
canvases of the same area have nearly as many, so an object keeps its size in visual tokens at any aspect ratio. A scene
depends on the seed and on what was asked for, but of the size only on the aspect ratio, never on the number of pixels.
"""

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

from PIL import ImageFont

from keye.data.frameforge.backdrop import Texture
from keye.data.frameforge.words import (
    ALL_PAIRS,
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    HELD_OUT_PAIRS,
    HELD_OUT_WORDS,
    SIZES,
    TEXT_COLORS,
    TRAIN_PAIRS,
    TRAIN_WORDS,
    Pair,
    Rgb,
)
from keye.errors import KeyeError

SPLITS = ("train", "test", "unseen")
Interval = tuple[int, int]
#: Draws when something is visible.
PickIntervals = Callable[[random.Random], tuple[Interval, ...]]
#: Draws a pair of colour and shape for a split that is not among those used.
PickPair = Callable[[random.Random, str, set[Pair]], Pair]

MAX_OBJECTS = 8
CANVAS_SIDE = 112.0
MIN_SIDE = 84.0
REACH = 1.1  # a star's tips lie this many radii from its centre, the farthest of all shapes
LETTER_PITCH = 14.2  # above 14 at most two letters of a line have their centre in one cell of 28 pixels
STEPS = {0.2: 0.05, 0.4: 0.05, 0.5: 0.45, 1.0: 0.2, 1.5: 0.05, 2.0: 0.2}
RADII = {"small": (36, 44), "big": (60, 72)}  # in quarters of a unit, so that drawn shapes can be kept and used again
MIN_BLINK_FRAMES = 8
_REFERENCE_FONT_SIZE = 200


@lru_cache(maxsize=256)
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font of rendered text, Pillow's built-in one, at `size` pixels."""
    loaded = ImageFont.load_default(size)
    assert isinstance(loaded, ImageFont.FreeTypeFont), "every wheel of pillow on PyPI has FreeType"
    return loaded


@dataclass(frozen=True)
class Change:
    """From `frame` on the object has another colour."""

    frame: int
    color: str
    rgb: Rgb


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape. `intervals` are first and last visible frames, `path` the centre (x, y) in the first and
    the last visible frame; between them it moves evenly. `rgb` is the jittered colour that is drawn."""

    color: str
    shape: str
    size: str
    radius: float
    rgb: Rgb
    intervals: tuple[Interval, ...]
    motion: str
    path: tuple[float, float, float, float]
    change: Change | None = None

    @property
    def name(self) -> str:
        """Its unique name in the clip, by its first colour."""
        return f"{self.color} {self.shape}"

    @property
    def first(self) -> int:
        """The first visible frame."""
        return self.intervals[0][0]

    @property
    def last(self) -> int:
        """The last visible frame."""
        return self.intervals[-1][1]

    def visible(self, frame: int) -> bool:
        """Whether it is seen in `frame`."""
        return any(first <= frame <= last for first, last in self.intervals)

    def color_at(self, frame: int) -> str:
        """The name of its colour in `frame`."""
        return self.change.color if self.change and frame >= self.change.frame else self.color

    def position(self, frame: int) -> tuple[float, float]:
        """Its centre (x, y) in scene units."""
        x0, y0, x1, y1 = self.path
        if self.motion == "static":
            return x0, y0
        part = (frame - self.first) / (self.last - self.first)
        return x0 + (x1 - x0) * part, y0 + (y1 - y0) * part


@dataclass(frozen=True)
class RenderedText:
    """One line of upper-case text. `centers` are the x of its letters, `baseline` and `middle` the y of their foot and
    of half their height, `box` is (left, top, right, bottom) of the ink, all in scene units."""

    content: str
    font_size: float
    stroke: float
    rgb: Rgb
    intervals: tuple[Interval, ...]
    centers: tuple[float, ...]
    baseline: float
    middle: float
    box: tuple[float, float, float, float]

    def visible(self, frame: int) -> bool:
        """Whether it is seen in `frame`."""
        return any(first <= frame <= last for first, last in self.intervals)


@dataclass(frozen=True)
class Background:
    """The background from `frame` on. One with a texture has no name: `color` is empty and `rgb` is its mean."""

    # `texture` is left out of repr: digests of scenes of one colour, which published scores rest on, stay the same.

    frame: int
    color: str
    rgb: Rgb
    texture: Texture | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Scene:
    """What a clip shows. `canvas` is (width, height) in scene units, `noise` the grain's amplitude in grey levels."""

    canvas: tuple[float, float]
    objects: tuple[SceneObject, ...]
    text: RenderedText | None
    backgrounds: tuple[Background, ...]
    noise: int

    def background_at(self, frame: int) -> Background:
        """The background of `frame`."""
        return next(background for background in reversed(self.backgrounds) if background.frame <= frame)

    def visible_objects(self, frame: int) -> list[SceneObject]:
        """The objects seen in `frame`."""
        return [thing for thing in self.objects if thing.visible(frame)]

    def pairs(self) -> set[Pair]:
        """Every (colour, shape) that is seen at any time, also after a change of colour."""
        seen = {(thing.color, thing.shape) for thing in self.objects}
        return seen | {(thing.change.color, thing.shape) for thing in self.objects if thing.change}


@dataclass(frozen=True)
class Clip:
    """A scene with its clock. `timestamps` are the seconds of each frame, `size` is (width, height) in pixels."""

    scene: Scene
    timestamps: tuple[float, ...]
    size: tuple[int, int]
    seed: int
    split: str
    step: float

    @property
    def frames(self) -> int:
        """The number of frames."""
        return len(self.timestamps)


def make_clip(
    seed: int, *, frames: int, objects: int = 4, split: str = "train", size: tuple[int, int] = (112, 112),
    start: float | None = None, step: float | None = None, text_chance: float = 0.4,
) -> Clip:  # fmt: skip
    """The clip of `seed` in `split`: the same arguments always give the same clip, and no two splits share one.

    `objects` is the maximum: 1 to `objects` are placed. `start` and `step` are seconds, drawn when None; they do not
    change the scene. KeyeError names an argument out of range.
    """
    check_clip(frames, objects, split, size, start, step, text_chance)
    scene = _make_scene(stream(split, seed, "scene"), frames, objects, split, canvas_of(size), text_chance)
    clock = stream(split, seed, "clock")
    # Both are drawn in any case, so that one that is set does not change the other.
    drawn_start = 0.0 if clock.random() < 0.3 else clock.randrange(6000) / 10
    drawn_step = clock.choices(list(STEPS), list(STEPS.values()))[0]
    start, step = drawn_start if start is None else start, drawn_step if step is None else step
    timestamps = tuple(round(start + index * step, 1) for index in range(frames))
    return Clip(scene, timestamps, size, seed, split, step)


def canvas_of(size: tuple[int, int]) -> tuple[float, float]:
    """The canvas of frames of `size`: a square one has sides of CANVAS_SIDE, and no side is shorter than MIN_SIDE."""
    scale = min(math.sqrt(size[0] * size[1]) / CANVAS_SIDE, min(size) / MIN_SIDE)
    return size[0] / scale, size[1] / scale


def stream(split: str, seed: int, purpose: str) -> random.Random:
    """A random stream of its own for each (split, seed, purpose)."""
    digest = hashlib.blake2b(f"frameforge/{split}/{seed}/{purpose}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "big"))


def check_clip(
    frames: int, objects: int, split: str, size: tuple[int, int], start: float | None, step: float | None,
    text_chance: float,
) -> None:  # fmt: skip
    if split not in SPLITS:
        raise KeyeError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
    if frames < 1:
        raise KeyeError(f"frames is {frames}; a clip needs at least 1")
    if not 1 <= objects <= MAX_OBJECTS:
        raise KeyeError(f"objects is {objects}; choose 1 to {MAX_OBJECTS}")
    if min(size) < 28 or max(size) > 4 * min(size):
        raise KeyeError(f"size is {size[0]}x{size[1]}; sides must be at least 28 pixels and at most 4 to 1")
    if start is not None and start < 0:
        raise KeyeError(f"start is {start}; times begin at 0 seconds")
    if step is not None and step < 0.1:
        raise KeyeError(f"step is {step}; times have one decimal, so frames must be at least 0.1 seconds apart")
    if not 0 <= text_chance <= 1:
        raise KeyeError(f"text_chance is {text_chance}; a chance lies between 0 and 1")


def _make_scene(
    rng: random.Random, frames: int, objects: int, split: str, canvas: tuple[float, float], text_chance: float
) -> Scene:
    pick = partial(_make_intervals, frames=frames)
    text = make_text(rng, pick, split, canvas) if rng.random() < text_chance else None
    wanted = rng.randint(1, objects)
    placed = fill_canvas(rng, wanted, pick, _pick_pair, split, canvas, text, attempts=8)
    return Scene(canvas, tuple(placed), text, _make_backgrounds(rng, frames), rng.randint(0, 6))


def fill_canvas(
    rng: random.Random, wanted: int, pick: PickIntervals, pick_pair: PickPair, split: str, canvas: tuple[float, float],
    text: RenderedText | None, attempts: int,
) -> list[SceneObject]:  # fmt: skip
    """As many of `wanted` objects as there is room for in the best of some attempts. A crowded canvas can lack room for
    the last object; starting over keeps the number of objects evenly spread."""
    placed: list[SceneObject] = []
    for _ in range(attempts):
        attempt = _place_objects(rng, wanted, pick, pick_pair, split, canvas, text)
        placed = max(placed, attempt, key=len)
        if len(placed) == wanted:
            break
    return placed


def _place_objects(
    rng: random.Random, wanted: int, pick: PickIntervals, pick_pair: PickPair, split: str, canvas: tuple[float, float],
    text: RenderedText | None,
) -> list[SceneObject]:  # fmt: skip
    used: set[Pair] = set()
    tracks = [text_track(text)] if text else []
    placed: list[SceneObject] = []
    for _ in range(wanted):
        thing = place_object(rng, pick_pair(rng, split, used), pick, canvas, tracks)
        if thing is None:
            break
        used.add((thing.color, thing.shape))
        thing = maybe_change_color(rng, thing, split, used)
        placed.append(thing)
        tracks.append(object_track(thing))
    return placed


def _pick_pair(rng: random.Random, split: str, used: set[Pair]) -> Pair:
    pool: Sequence[Pair] = TRAIN_PAIRS
    if split == "unseen" and (not used or rng.random() < 0.5):
        pool = [pair for pair in ALL_PAIRS if pair in HELD_OUT_PAIRS and pair not in used] or TRAIN_PAIRS
    while True:
        pair = rng.choice(pool)
        if pair not in used:
            return pair


def place_object(
    rng: random.Random, pair: Pair, pick: PickIntervals, canvas: tuple[float, float], tracks: Sequence["Track"]
) -> SceneObject | None:
    """An object that meets no other one at any time, visible as `pick` says, or None where no room was found."""
    for _ in range(4):
        size = rng.choice(SIZES)
        radius = rng.randint(*RADII[size]) / 4
        intervals = pick(rng)
        first, last = intervals[0][0], intervals[-1][1]
        moves = len(intervals) == 1 and last - first >= 2 and rng.random() < 0.5
        motion = rng.choice(DIRECTIONS) if moves else "static"
        rgb = jitter(rng, COLORS[pair[0]], 12)
        for _ in range(6):
            path = _make_path(rng, motion, radius * REACH + 1.5, canvas)
            thing = SceneObject(*pair, size, radius, rgb, intervals, motion, path)
            track = object_track(thing)
            if not any(_meet(track, other) for other in tracks):
                return thing
    return None


def _make_path(
    rng: random.Random, motion: str, margin: float, canvas: tuple[float, float]
) -> tuple[float, float, float, float]:
    room_x, room_y = canvas[0] - 2 * margin, canvas[1] - 2 * margin
    x, y = margin + rng.random() * room_x, margin + rng.random() * room_y
    if motion == "static":
        return x, y, x, y
    room = room_x if motion in ("left", "right") else room_y
    length = room * rng.uniform(0.45, 1.0)
    near = margin + rng.random() * (room - length)
    begin, end = (near, near + length) if motion in ("right", "down") else (near + length, near)
    return (begin, y, end, y) if motion in ("left", "right") else (x, begin, x, end)


def maybe_change_color(rng: random.Random, thing: SceneObject, split: str, used: set[Pair]) -> SceneObject:
    """With a small chance `thing` with another colour for its last frames; adds the new pair to `used`."""
    if len(thing.intervals) > 1 or thing.last - thing.first < 3 or rng.random() >= 0.15:
        return thing
    allowed = ALL_PAIRS if split == "unseen" else TRAIN_PAIRS
    colors = [color for color, shape in allowed if shape == thing.shape and (color, shape) not in used]
    if not colors:
        return thing
    color = rng.choice(colors)
    used.add((color, thing.shape))
    change = Change(rng.randint(thing.first + 2, thing.last - 1), color, jitter(rng, COLORS[color], 12))
    return replace(thing, change=change)


def _make_intervals(rng: random.Random, *, frames: int) -> tuple[Interval, ...]:
    """One or two visible intervals of at least two frames, where the clip has two."""
    if frames <= 2:
        return ((0, frames - 1),)
    kind = rng.random()
    if kind < 0.2 and frames >= MIN_BLINK_FRAMES:
        a, b, c, d = sorted(rng.randint(0, frames - 6) for _ in range(4))
        return (a, b + 1), (c + 4, d + 5)
    if kind >= 0.88:
        return ((0, frames - 1),)
    length = rng.randint(max(2, frames // 8), max(2, frames - 1))
    first = rng.randint(0, frames - length)
    return ((first, first + length - 1),)


def _make_backgrounds(rng: random.Random, frames: int) -> tuple[Background, ...]:
    """One background, or two with a scene cut between them."""
    colors = rng.sample(list(BACKGROUNDS), 2)
    first = Background(0, colors[0], jitter(rng, BACKGROUNDS[colors[0]], 6))
    if frames < 4 or rng.random() >= 0.25:
        return (first,)
    return first, Background(rng.randint(2, frames - 2), colors[1], jitter(rng, BACKGROUNDS[colors[1]], 6))


def jitter(rng: random.Random, rgb: Rgb, amount: int) -> Rgb:
    # Levels stay in 8..247 so that the grain can be added in 8 bits without overflow.
    red, green, blue = (min(247, max(8, level + rng.randint(-amount, amount))) for level in rgb)
    return red, green, blue


def make_text(rng: random.Random, pick: PickIntervals, split: str, canvas: tuple[float, float]) -> RenderedText:
    """A line of text, visible as `pick` says."""
    content = pick_content(rng, split)
    stroke = rng.choice((0.25, 0.5, 0.75))
    font_size = float(rng.randint(18, 26))
    room = canvas[0] - 6 - 2 * stroke
    while (width := sum(_advances(content, font_size))) > room:
        font_size -= 1
    left = 3 + stroke + rng.random() * (room - width)
    tail = 0.2 * font_size if "Q" in content else 0.04 * font_size
    # Mostly near the upper or lower edge, where the text leaves most room for objects.
    room_above = canvas[1] - (_cap_height() * font_size + tail + 2 * stroke) - 4
    kind = rng.random()
    share = rng.random() * (0.15 if kind < 0.8 else 1.0)
    top = 2 + room_above * (share if kind < 0.4 else 1 - share)
    baseline = top + stroke + _cap_height() * font_size
    centers, x = [], left
    for pitch in _advances(content, font_size):
        centers.append(x + pitch / 2)
        x += pitch
    box = (left - stroke, top, left + width + stroke, baseline + tail + stroke)
    middle = baseline - _cap_height() * font_size / 2
    rgb = jitter(rng, rng.choice(TEXT_COLORS), 8)
    return RenderedText(content, font_size, stroke, rgb, pick(rng), tuple(centers), baseline, middle, box)


def pick_content(rng: random.Random, split: str) -> str:
    if split == "unseen":
        return rng.choice(HELD_OUT_WORDS)
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(TRAIN_WORDS)
    if kind < 0.55:
        return str(rng.randrange(100))
    while True:
        letters = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(2, 5)))
        if not any(word in letters for word in HELD_OUT_WORDS):
            return letters


@lru_cache(maxsize=256)
def _advance(character: str) -> float:
    """Width of one character, as a fraction of the font size."""
    return font(_REFERENCE_FONT_SIZE).getlength(character) / _REFERENCE_FONT_SIZE


@lru_cache(maxsize=1)
def _cap_height() -> float:
    """Height of upper-case letters above the baseline, as a fraction of the font size."""
    return -font(_REFERENCE_FONT_SIZE).getbbox("H", anchor="ls")[1] / _REFERENCE_FONT_SIZE


def _advances(content: str, font_size: float) -> list[float]:
    return [max(LETTER_PITCH, _advance(character) * font_size * 1.06) for character in content]


@dataclass(frozen=True, slots=True)
class Track:
    """A box that is there during `intervals`; its centre in frame f is (x + vx f, y + vy f)."""

    intervals: tuple[Interval, ...]
    x: float
    y: float
    vx: float
    vy: float
    half_width: float
    half_height: float


def text_track(text: RenderedText) -> Track:
    """Where the text is."""
    left, top, right, bottom = text.box
    center = (left + right) / 2, (top + bottom) / 2
    return Track(text.intervals, *center, 0.0, 0.0, (right - left) / 2, (bottom - top) / 2)


def object_track(thing: SceneObject) -> Track:
    x0, y0, x1, y1 = thing.path
    span = max(1, thing.last - thing.first)
    vx, vy = (x1 - x0) / span, (y1 - y0) / span
    reach = thing.radius * REACH
    return Track(thing.intervals, x0 - vx * thing.first, y0 - vy * thing.first, vx, vy, reach, reach)


def _meet(a: Track, b: Track) -> bool:
    """Whether the boxes come closer than a gap of 2.5 units while both are visible."""
    reach_x, reach_y = a.half_width + b.half_width + 2.5, a.half_height + b.half_height + 2.5
    for first, last in a.intervals:
        for other_first, other_last in b.intervals:
            low, high = float(max(first, other_first)), float(min(last, other_last))
            low, high = _within(a.x - b.x, a.vx - b.vx, reach_x, low, high)
            low, high = _within(a.y - b.y, a.vy - b.vy, reach_y, low, high)
            if low <= high:
                return True
    return False


def _within(distance: float, speed: float, reach: float, low: float, high: float) -> tuple[float, float]:
    """The part of [low, high] where |distance + speed * f| < reach; low > high when there is none."""
    if abs(speed) < 1e-9:
        return (low, high) if abs(distance) < reach else (1.0, 0.0)
    enter, leave = sorted(((-reach - distance) / speed, (reach - distance) / speed))
    return max(low, enter), min(high, leave)
