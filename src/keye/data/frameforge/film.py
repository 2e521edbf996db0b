"""Long films of FrameForge: hours of short scenes, some with an event to search for, and exactly known answers.

    film = plan_film(7, minutes=120)
    write_film(film, "film.mp4")                  # keye.data.frameforge.film_file
    film.needles[0]                               # FilmEvent("red circle", 4711.28, 4713.28)

A film is a sequence of pieces, scenes of 4 to 12 seconds. Every pair of a colour and a shape has one of three parts: a
needle is seen once in the film, an absent pair never, and the few others appear again and again, moving or still. Those
others are chosen so that every needle and every absent pair shares its colour or its shape with some of them: near
misses. Films of one split share the pieces in which nothing happens. Knows no pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from keye.data.frameforge.scene import (
    SPLITS,
    Background,
    Clip,
    Interval,
    Scene,
    canvas_of,
    make_text,
    object_track,
    place_object,
    stream,
    text_track,
)
from keye.data.frameforge.windows import make_background
from keye.data.frameforge.words import ALL_PAIRS, HELD_OUT_PAIRS, SHAPES, TRAIN_PAIRS, Pair
from keye.errors import KeyeError

#: Frames per second and (width, height) of films.
FILM_RATE, FILM_SIZE = 12.5, (640, 360)
#: Pairs that appear again and again.
COMMON_PAIRS = 6
#: Different scenes without events in all films of a split, and the most with near misses in one film.
EMPTY_SCENES, NEAR_MISS_SCENES = 48, 60
#: Fewest and most frames of a piece beyond its event, and of an event that is a near miss.
_MARGIN, _NEAR_MISS = (25, 75), (6, 50)
_EMPTY_FRAMES = (50, 75, 100, 125, 150)
#: An event keeps this many frames away from the ends of its piece.
_EDGE = 6
#: Pieces with events make up at most this part of a film.
_MOST_EVENTS = 0.75
#: The chance that a background is a texture, that a piece has text, and that a cut lies inside it.
_TEXTURED, _TEXT, _INNER_CUT = 0.7, 0.2, 0.2
#: Two backgrounds whose mean colours differ by this many levels, in a channel, are another picture to any eye.
_PLAIN_TO_SEE = 24


@dataclass(frozen=True)
class PieceEvent:
    """A pair that is visible from the first to the last frame of `interval`, counted in its piece."""

    pair: Pair
    interval: Interval


@dataclass(frozen=True)
class Piece:
    """`frames` frames of the scene that `seed` gives in `split`, with `events` in place of its own objects."""

    split: str
    seed: int
    frames: int
    events: tuple[PieceEvent, ...] = ()


@dataclass(frozen=True)
class FilmEvent:
    """What is seen and when, in seconds of the file: from the time of its first frame to that of the frame after its
    last."""

    name: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it is seen."""
        return self.end - self.start


@dataclass(frozen=True)
class Film:
    """The plan of a film. `pieces` follow one another, the last one may end early: `frames` is the length of all.

    `needles` happen once each, in the order of time, `near_misses` are all events of the other pairs, `absent` are
    names that the film never shows. `cuts` are the seconds of the first frame after each hard cut.
    """

    seed: int
    split: str
    pieces: tuple[Piece, ...]
    frames: int
    needles: tuple[FilmEvent, ...]
    near_misses: tuple[FilmEvent, ...]
    absent: tuple[str, ...]
    cuts: tuple[float, ...]

    @property
    def duration(self) -> float:
        """Seconds."""
        return to_seconds(self.frames)

    def near_misses_of(self, name: str) -> list[FilmEvent]:
        """Events that share the colour or the shape of `name`, other needles among them."""
        color, shape = name.split()
        others = [event for event in (*self.needles, *self.near_misses) if event.name != name]
        return [event for event in others if color in event.name.split() or shape in event.name.split()]

    def to_dict(self) -> dict[str, Any]:
        """The gold answers as plain data for JSON."""
        return {
            "seed": self.seed, "split": self.split, "duration": self.duration, "rate": FILM_RATE,
            "size": list(FILM_SIZE), "needles": [asdict(event) for event in self.needles],
            "absent": list(self.absent), "cuts": list(self.cuts),
            "near_misses": [asdict(event) for event in self.near_misses],
        }  # fmt: skip


def to_seconds(frame: int) -> float:
    """When a frame of a film is shown."""
    return round(frame / FILM_RATE, 3)


def plan_film(
    seed: int, *, minutes: float = 120.0, split: str = "test", needles: int = 13, event: float = 2.0,
    near_misses: float = 1.0,
) -> Film:  # fmt: skip
    """The film of `seed` in `split`, the same for the same arguments.

    `needles` events of `event` seconds are placed at random, each inside a piece; `near_misses` is how many events of
    other pairs there are a minute. Of the pairs that training shows, as many as are left over are absent; split
    "unseen" has needles among those that it does not show. KeyeError names an argument out of range.
    """
    length, frames = round(event * FILM_RATE), round(minutes * 60 * FILM_RATE)
    _check(split, length, frames, needles, near_misses)
    rng = stream(split, seed, "film")
    common, rest = _split_pairs(rng, split)
    wanted, absent = rest[:needles], rest[needles:]
    others = math.ceil(near_misses * minutes)
    eventful = [_needle_piece(rng, split, pair, length) for pair in wanted]
    eventful += _near_miss_pieces(rng, split, common, others)
    left = frames - sum(piece.frames for piece in eventful)
    if left < (1 - _MOST_EVENTS) * frames:
        raise KeyeError(f"{minutes:g} minutes are too short for {needles} needles of {event:g} seconds and {others} "
                        "near misses; give more minutes or fewer needles")  # fmt: skip
    pieces = _arrange(rng, eventful, _empty_pieces(rng, split, left))
    names = {" ".join(pair) for pair in wanted}
    events = _events(pieces)
    return Film(
        seed, split, tuple(pieces), frames, tuple(item for item in events if item.name in names),
        tuple(item for item in events if item.name not in names), tuple(" ".join(pair) for pair in absent),
        tuple(to_seconds(frame) for frame in _cuts(pieces) if frame < frames),
    )  # fmt: skip


def piece_clip(piece: Piece) -> Clip:
    """What a piece shows."""
    clip = _bare_clip(piece.split, piece.seed, piece.frames)
    rng, scene = stream(piece.split, piece.seed, "events"), clip.scene
    for item in piece.events:
        scene = _add_object(rng, scene, item)
    return replace(clip, scene=scene)


@lru_cache(maxsize=512)
def _bare_clip(split: str, seed: int, frames: int) -> Clip:
    """A scene with its background, often with text, without objects."""
    rng, canvas = stream(split, seed, "piece"), canvas_of(FILM_SIZE)
    shots = [make_background(rng, 0, split, _TEXTURED)]
    other = make_background(rng, rng.randint(_EDGE, frames - _EDGE), split, _TEXTURED)
    if rng.random() < _INNER_CUT and _differ(shots[0], other):
        shots.append(other)
    first = rng.randint(0, frames // 2)
    words = ((first, rng.randint(first + frames // 4, frames - 1)),)
    text = make_text(rng, lambda _: words, split, canvas) if rng.random() < _TEXT else None
    scene = Scene(canvas, (), text, tuple(shots), rng.randint(0, 6))
    return Clip(scene, tuple(map(to_seconds, range(frames))), FILM_SIZE, seed, split, 1 / FILM_RATE)


def _add_object(rng: random.Random, scene: Scene, item: PieceEvent) -> Scene:
    tracks = [text_track(scene.text)] if scene.text else []
    tracks += map(object_track, scene.objects)
    thing = None
    while thing is None:  # there is room for any object beside a line of text
        thing = place_object(rng, item.pair, lambda _: (item.interval,), scene.canvas, tracks)
    return replace(scene, objects=(*scene.objects, thing))


def _check(split: str, event: int, frames: int, needles: int, near_misses: float) -> None:
    if split not in SPLITS:
        raise KeyeError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
    if not 6 <= event <= 125:
        raise KeyeError(f"event is {event / FILM_RATE:g} s; choose 0.5 to 10 seconds")
    if not 125 <= frames <= 450_000:
        raise KeyeError(f"minutes is {frames / FILM_RATE / 60:g}; choose a sixth of a minute to 600")
    most = len(TRAIN_PAIRS) - COMMON_PAIRS
    if not 0 <= needles <= most:
        raise KeyeError(f"needles is {needles}; choose 0 to {most}, since every needle is a pair of its own")
    if not 0 <= near_misses <= 10:
        raise KeyeError(f"near_misses is {near_misses:g} a minute; choose 0 to 10")


def _split_pairs(rng: random.Random, split: str) -> tuple[list[Pair], list[Pair]]:
    """The pairs that appear again and again, of all shapes and of as many colours, and the others in random order."""
    allowed = list(TRAIN_PAIRS)
    if split == "unseen":
        allowed = [*HELD_OUT_PAIRS, *rng.sample(TRAIN_PAIRS, len(TRAIN_PAIRS) - len(HELD_OUT_PAIRS))]
        allowed.sort(key=ALL_PAIRS.index)
    rng.shuffle(allowed)
    common: list[Pair] = []
    for shape in rng.sample(SHAPES, len(SHAPES)) + rng.sample(SHAPES, COMMON_PAIRS - len(SHAPES)):
        used = {color for color, _ in common}
        common.append(next(pair for pair in allowed if pair[1] == shape and pair[0] not in used))
    rest = [pair for pair in allowed if pair not in common]
    if split == "unseen":
        rest.sort(key=lambda pair: pair not in HELD_OUT_PAIRS)
    return common, rest


def _needle_piece(rng: random.Random, split: str, pair: Pair, length: int) -> Piece:
    frames = length + rng.randint(*_MARGIN)
    first = rng.randint(_EDGE, frames - length - _EDGE)
    return Piece(split, rng.getrandbits(60), frames, (PieceEvent(pair, (first, first + length - 1)),))


def _near_miss_pieces(rng: random.Random, split: str, common: Sequence[Pair], count: int) -> list[Piece]:
    """Pieces with `count` events in all, evenly of all common pairs; some have two events, and many are used again."""
    different = min(count, NEAR_MISS_SCENES)
    scenes: list[Piece] = []
    for number in range(different):
        length = rng.randint(*_NEAR_MISS)
        frames = length + rng.randint(*_MARGIN)
        first = rng.randint(_EDGE, frames - length - _EDGE)
        event = PieceEvent(common[number % len(common)], (first, first + length - 1))
        scenes.append(Piece(split, rng.getrandbits(60), frames, (event,)))
    return [scenes[number % different] for number in range(count)]


def _empty_pieces(rng: random.Random, split: str, frames: int) -> list[Piece]:
    """Pieces without events of at least `frames` frames in all."""
    pieces: list[Piece] = []
    while frames > 0:
        seed = rng.randrange(EMPTY_SCENES)
        pieces.append(Piece(split, seed, _EMPTY_FRAMES[seed % len(_EMPTY_FRAMES)]))
        frames -= pieces[-1].frames
    return pieces


def _arrange(rng: random.Random, eventful: Sequence[Piece], empty: Sequence[Piece]) -> list[Piece]:
    """All pieces in random order, an empty one last; where it can be, no two alike follow one another."""
    left = [*eventful, *empty[:-1]]
    rng.shuffle(left)
    order: list[Piece] = []
    while left:
        place = next((i for i, piece in enumerate(left[:50]) if not order or _is_cut(order[-1], piece)), 0)
        order.append(left.pop(place))
    return [*order, empty[-1]]


def _is_cut(before: Piece, after: Piece) -> bool:
    """Whether the join of two pieces is plain to see."""
    return _differ(_backgrounds(before)[-1], _backgrounds(after)[0])


def _differ(before: Background, after: Background) -> bool:
    return max(abs(a - b) for a, b in zip(before.rgb, after.rgb, strict=True)) >= _PLAIN_TO_SEE


def _backgrounds(piece: Piece) -> tuple[Background, ...]:
    return _bare_clip(piece.split, piece.seed, piece.frames).scene.backgrounds


def _cuts(pieces: Sequence[Piece]) -> list[int]:
    """Frames of the film at which another picture begins, at joins and inside pieces."""
    cuts, start = list[int](), 0
    for number, piece in enumerate(pieces):
        if number and _is_cut(pieces[number - 1], piece):
            cuts.append(start)
        cuts += [start + background.frame for background in _backgrounds(piece)[1:]]
        start += piece.frames
    return cuts


def _events(pieces: Sequence[Piece]) -> list[FilmEvent]:
    events, start = list[FilmEvent](), 0
    for piece in pieces:
        for item in piece.events:
            first, last = item.interval
            events.append(FilmEvent(" ".join(item.pair), to_seconds(start + first), to_seconds(start + last + 1)))
        start += piece.frames
    return events
