"""Clips that probe one ability: needles at a chosen depth of a clip of a chosen length, and clips about which groups of
four questions hang together.

    probe = make_needle(7, frames=128, depth=0.25)
    write_mp4(probe.clip, "needle.mp4"); probe.questions

Needs no torch and no pixels.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from keye.data.frameforge.questions import Question, absent_pairs, format_intervals
from keye.data.frameforge.scene import (
    Clip,
    Interval,
    SceneObject,
    fill_canvas,
    make_clip,
    make_text,
    object_track,
    place_object,
    stream,
    text_track,
)
from keye.data.frameforge.words import PHRASES, TRAIN_PAIRS, Pair, with_article
from keye.errors import KeyeError

#: Seconds between two frames, and frames for which a needle is seen: two seconds.
STEP: Final = 0.5
NEEDLE_FRAMES: Final = 4
#: Other objects of a clip with a needle.
_OTHERS: Final = 2
#: Objects of a clip with groups of questions, and the shortest and longest time for which each is seen, in frames.
_THINGS: Final = 4
_SEEN: Final = (6, 64)
#: How the questions of a group hang together, as in Video-MME-v2: of one kind, or each a step towards the next.
STRUCTURES: Final = ("relevance", "[1,2,3,4]", "[1,[2,3],4]", "[[1,2],3,4]")


@dataclass(frozen=True)
class Probe:
    """A clip with the questions about it; `structure` is that of the group, empty where they stand alone."""

    clip: Clip
    questions: tuple[Question, ...]
    structure: str = ""


def make_needle(seed: int, *, frames: int, depth: float, split: str = "test") -> Probe:
    """A clip of `frames` with an object and a word that are seen together for two seconds, `depth` of the way from its
    beginning (0) to its end (1), beside objects that share nothing of their name. The questions are when the object is
    seen, and what the word says. `KeyeError` names an argument out of range."""
    if frames < 2 * NEEDLE_FRAMES:
        raise KeyeError(f"frames is {frames}; a clip with a needle needs at least {2 * NEEDLE_FRAMES}")
    if not 0 <= depth <= 1:
        raise KeyeError(f"depth is {depth:g}; it lies between 0 and 1")
    rng = stream(split, seed, f"needle {frames} {depth:g}")
    begin = round(depth * (frames - NEEDLE_FRAMES))
    interval: Interval = (begin, begin + NEEDLE_FRAMES - 1)
    while True:
        clip = make_clip(rng.getrandbits(60), frames=frames, objects=_OTHERS, split=split, start=0.0, step=STEP,
                         text_chance=0.0)  # fmt: skip
        scene = clip.scene
        text = make_text(rng, lambda _: (interval,), split, scene.canvas)
        free = [pair for pair in TRAIN_PAIRS if pair not in scene.pairs()]
        tracks = [*map(object_track, scene.objects), text_track(text)]
        needle = place_object(rng, rng.choice(free), lambda _: (interval,), scene.canvas, tracks)
        if needle is not None:
            break
    clip = replace(clip, scene=replace(scene, objects=(*scene.objects, needle), text=text))
    return Probe(clip, (_when(clip, needle), Question("read", PHRASES["read"][1], text.content)))


def make_group(seed: int, structure: str, *, frames: int, split: str = "test") -> Probe:
    """A clip of `frames` with four objects, each seen for 3 to 32 seconds, and four questions of a structure."""
    if frames < 2 * _SEEN[1]:
        raise KeyeError(f"frames is {frames}; a clip with a group of questions needs at least {2 * _SEEN[1]}")
    if structure not in STRUCTURES:
        raise KeyeError(f"structure is {structure!r}; choose one of {', '.join(STRUCTURES)}")
    rng = stream(split, seed, f"group {structure} {frames}")

    def pick(rng: random.Random) -> tuple[Interval, ...]:
        shortest, longest = _SEEN
        length = round(shortest * (longest / shortest) ** rng.random())
        begin = rng.randint(0, frames - length)
        return ((begin, begin + length - 1),)

    while True:
        clip = make_clip(rng.getrandbits(60), frames=frames, objects=1, split=split, start=0.0, step=STEP,
                         text_chance=0.0)  # fmt: skip
        scene = clip.scene
        things = fill_canvas(rng, _THINGS, pick, _pick_pair, split, scene.canvas, None, attempts=8)
        steady = [thing for thing in things if thing.change is None]
        if len(steady) == _THINGS and len({thing.first for thing in steady}) == _THINGS:
            break
    clip = replace(clip, scene=replace(scene, objects=tuple(steady)))
    return Probe(clip, tuple(_group(clip, rng, steady, structure)), structure)


def _pick_pair(rng: random.Random, split: str, used: set[Pair]) -> Pair:
    return rng.choice([pair for pair in TRAIN_PAIRS if pair not in used])


def _group(clip: Clip, rng: random.Random, things: Sequence[SceneObject], structure: str) -> list[Question]:
    """Four questions: of one kind about four objects, or steps that build on one another."""
    a, b, *_ = rng.sample(list(things), len(things))
    first = a if a.first < b.first else b
    order = Question("order", PHRASES["order.first"][0].format(a=a.name, b=b.name), first.name)
    if structure == "[1,2,3,4]":
        return [_there(a), _starts(clip, a), _ends(clip, a), _when(clip, a)]
    if structure == "[1,[2,3],4]":
        return [_there(a), _starts(clip, a), _starts(clip, b), order]
    if structure == "[[1,2],3,4]":
        return [_starts(clip, a), _starts(clip, b), order, _when(clip, first)]
    kind = rng.choice(("ground", "start", "presence"))
    if kind == "presence":
        questions = [_there(a), _there(b), *(_absent(pair) for pair in absent_pairs(clip, rng, 2)[:2])]
        return rng.sample(questions, len(questions))
    return [_when(clip, thing) if kind == "ground" else _starts(clip, thing) for thing in things]


def _there(thing: SceneObject) -> Question:
    return Question("presence", PHRASES["presence"][0].format(x=with_article(thing.name)), "yes")


def _absent(pair: Pair) -> Question:
    return Question("presence", PHRASES["presence"][0].format(x=with_article(" ".join(pair))), "no")


def _starts(clip: Clip, thing: SceneObject) -> Question:
    return Question("start", PHRASES["start"][0].format(x=thing.name), f"{clip.timestamps[thing.first]:.1f} seconds")


def _ends(clip: Clip, thing: SceneObject) -> Question:
    return Question("end", PHRASES["end"][0].format(x=thing.name), f"{clip.timestamps[thing.last]:.1f} seconds")


def _when(clip: Clip, thing: SceneObject) -> Question:
    spans = tuple((clip.timestamps[first], clip.timestamps[last]) for first, last in thing.intervals)
    return Question("ground", PHRASES["ground"][0].format(x=thing.name), format_intervals(spans), spans)
