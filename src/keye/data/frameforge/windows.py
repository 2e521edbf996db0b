"""Clips as a search looks at them: short pieces of longer films, most of which do not show what is asked about.

A window may be empty, hold only near misses (the same colour or the same shape), or events of a single frame up to most
of its length, some of them cut off by its borders; camera cuts change the background and every object at once.
Backgrounds are textures, still or drifting, or single colours. Most clocks start at 0.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

from keye.data.frameforge.backdrop import pick_texture
from keye.data.frameforge.questions import Question, ask, format_intervals, questions
from keye.data.frameforge.scene import (
    Background,
    Clip,
    Interval,
    Scene,
    canvas_of,
    check_clip,
    fill_canvas,
    jitter,
    make_text,
    pick_content,
    stream,
)
from keye.data.frameforge.words import (
    ALL_PAIRS,
    BACKGROUNDS,
    HELD_OUT_PAIRS,
    HELD_OUT_WORDS,
    TRAIN_PAIRS,
    Pair,
    with_article,
)

#: How many objects a window has, and how many camera cuts.
OBJECTS = {0: 0.16, 1: 0.22, 2: 0.2, 3: 0.16, 4: 0.14, 5: 0.07, 6: 0.05}
CUTS = {0: 0.3, 1: 0.14, 2: 0.14, 3: 0.12, 4: 0.1, 6: 0.1, 8: 0.07, 10: 0.03}
#: Sizes of films in pixels, and how often each is drawn; their frames become 12, 15 or 16 visual tokens of keye-nano.
FILM_SIZES = {(240, 135): 0.35, (320, 180): 0.15, (160, 120): 0.14, (168, 112): 0.06, (112, 112): 0.08,
              (160, 160): 0.04, (90, 160): 0.08, (120, 160): 0.05, (196, 84): 0.05}  # fmt: skip
#: Seconds between frames: of windows over a film, and of a close look at a part of it.
WINDOW_STEPS = {0.1: 0.03, 0.2: 0.05, 0.4: 0.04, 0.5: 0.2, 1.0: 0.36, 1.5: 0.03, 2.0: 0.1, 3.0: 0.03, 4.0: 0.1,
                5.0: 0.03, 10.0: 0.03}  # fmt: skip
CLOSE_STEPS = {0.2: 0.5, 0.25: 0.3, 0.5: 0.2}
#: Frames a second of the films that frames are taken from; a time is that of the nearest frame of the film.
_FILM_RATES = (12.5, 24.0, 25.0, 30.0)
_NEAR = 0.55
#: Shares of a window's questions that ask whether something is there, and when something is that is not; the rest
#: are drawn by these weights.
PRESENCE_SHARE, ABSENT_SHARE = 0.4, 0.1
WEIGHTS = {
    "ground": 6.0, "ground_text": 2.5, "ground_none": 0.0, "presence": 0.0, "start": 1.5, "end": 1.5, "visible_at": 2.0,
    "list_at": 2.5, "count": 1.0, "count_at": 1.0, "order": 1.5, "attribute_at": 1.0, "read": 2.5, "color_change": 0.6,
    "change_time": 1.0, "cut_time": 0.3, "background": 0.2, "direction": 0.1, "place": 0.1, "size": 0.1, "times": 0.1,
    "caption": 0.0,
}  # fmt: skip


def make_window(
    seed: int, *, frames: int, split: str = "train", size: tuple[int, int] = (112, 112), close: bool = False,
    step: float | None = None, textured: float = 0.7, text_chance: float = 0.25,
) -> Clip:  # fmt: skip
    """The window of `seed` in `split`: the same arguments always give the same one, and no two splits share one.

    `close` makes a close look at a few seconds, in which events are longer in frames. `step` is seconds between frames,
    drawn when None. `textured` is the chance that a background is a texture. KeyeError names an argument out of range.
    """
    check_clip(frames, 1, split, size, 0.0, step, text_chance)
    scene_rng, clock = stream(split, seed, "window"), stream(split, seed, "window clock")
    scene = _make_scene(scene_rng, frames, split, canvas_of(size), close, textured, text_chance)
    steps = CLOSE_STEPS if close else WINDOW_STEPS
    drawn = clock.choices(list(steps), list(steps.values()))[0]
    step = drawn if step is None else step
    start = clock.randrange(6000) / 10 if clock.random() < 0.08 else 0.0
    return Clip(scene, _timestamps(clock, frames, start, step), size, seed, split, step)


def _timestamps(clock: random.Random, frames: int, start: float, step: float) -> tuple[float, ...]:
    """Even times, or in every third clip those of the nearest frames of a film."""
    times = [start + index * step for index in range(frames)]
    if clock.random() < 0.33:
        rate = clock.choice(_FILM_RATES)
        nearest = [round(round(seconds * rate) / rate, 1) for seconds in times]
        if all(a < b for a, b in pairwise(nearest)):
            return tuple(nearest)
    return tuple(round(seconds + 1e-6, 1) for seconds in times)


def _make_scene(
    rng: random.Random, frames: int, split: str, canvas: tuple[float, float], close: bool, textured: float,
    text_chance: float,
) -> Scene:  # fmt: skip
    cuts = rng.choices(list(CUTS), list(CUTS.values()))[0]
    starts = [0, *sorted(rng.sample(range(1, frames), min(cuts, frames - 1)))]
    shots = list(zip(starts, [*(start - 1 for start in starts[1:]), frames - 1], strict=True))
    backgrounds = tuple(make_background(rng, start, split, textured) for start in starts)
    pick = partial(_pick_interval, shots=shots, close=close)
    text = make_text(rng, pick, split, canvas) if rng.random() < text_chance else None
    wanted = rng.choices(list(OBJECTS), list(OBJECTS.values()))[0]
    placed = fill_canvas(rng, wanted, pick, _pick_pair, split, canvas, text, attempts=3)
    return Scene(canvas, tuple(placed), text, backgrounds, rng.randint(0, 6))


def make_background(rng: random.Random, start: int, split: str, textured: float) -> Background:
    """A background from frame `start` on: a texture with the chance `textured`, else a single colour."""
    if rng.random() < textured:
        texture = pick_texture(rng, split)
        (a, b, c), (d, e, f) = texture.colors
        return Background(start, "", ((a + d) // 2, (b + e) // 2, (c + f) // 2), texture)
    color = rng.choice(list(BACKGROUNDS))
    return Background(start, color, jitter(rng, BACKGROUNDS[color], 6))


def _pick_interval(rng: random.Random, *, shots: Sequence[Interval], close: bool) -> tuple[Interval, ...]:
    """When an object is visible: in one shot, mostly for a few frames, often up to a border of the window."""
    first, last = rng.choices(shots, [last - first + 1 for first, last in shots])[0]
    length = last - first + 1
    kind = rng.random()
    if kind < 0.1:
        return ((first, last),)
    if kind < 0.18 and length >= 6:
        a, b, c, d = sorted(rng.sample(range(first, last + 1), 4))
        if b + 1 < c:
            return (a, b), (c, d)
    most = 50 if close else 10 if kind < 0.75 else length
    wanted = min(length, round((2 if close else 1) * most ** (rng.random() ** 0.8)))
    begin = rng.randint(first, last - wanted + 1)
    if rng.random() < 0.2:
        # The border of the window lies within the event: only its end or its beginning is seen.
        begin = first if rng.random() < 0.5 else last - wanted + 1
    return ((begin, begin + wanted - 1),)


def _pick_pair(rng: random.Random, split: str, used: set[Pair]) -> Pair:
    """A new pair, often with the colour or the shape of one that is there."""
    pool = ALL_PAIRS if split == "unseen" else TRAIN_PAIRS
    if split == "unseen" and not used:
        pool = tuple(pair for pair in ALL_PAIRS if pair in HELD_OUT_PAIRS)
    free = [pair for pair in pool if pair not in used]
    near = [pair for pair in free if any(pair[0] == color or pair[1] == shape for color, shape in used)]
    return rng.choice(near if near and rng.random() < _NEAR else free)


def window_questions(clip: Clip, rng: random.Random, count: int) -> list[Question]:
    """Up to `count` different questions about a window, the ones a search asks before all: half of those about presence
    are answered by no where anything is there, most of these about near misses."""
    half = max(1, round(count * PRESENCE_SHARE / 2))
    chosen = [*_present(clip, rng, half), *_absent(clip, rng, half)]
    for number in range(max(1, round(count * ABSENT_SHARE))):
        if number % 4 == 3:
            chosen.append(ask(rng, "ground_text", format_intervals(()), w=_other_text(clip, rng), intervals=()))
        else:
            question = ask(rng, "ground", format_intervals(()), x=" ".join(_missing(clip, rng)), intervals=())
            chosen.append(replace(question, task="ground_none"))
    different = {question.text: question for question in chosen}
    rest = questions(clip, rng, max(0, count - len(different)), weights=WEIGHTS)
    different |= {question.text: question for question in rest if question.text not in different}
    return list(different.values())


def _present(clip: Clip, rng: random.Random, count: int) -> list[Question]:
    """Questions whether things that are there are there, in any of their wordings."""
    steady = [thing for thing in clip.scene.objects if thing.change is None]
    drawn: dict[str, Question] = {}
    for _ in range(2 * count):
        if clip.scene.text and (not steady or rng.random() < 0.3):
            question = ask(rng, "presence_text", "yes", w=clip.scene.text.content)
        elif steady:
            question = ask(rng, "presence", "yes", x=with_article(rng.choice(steady).name))
        else:
            break
        drawn.setdefault(question.text, question)
    return list(drawn.values())[:count]


def _absent(clip: Clip, rng: random.Random, count: int) -> list[Question]:
    """Questions whether things that are not there are there."""
    drawn: dict[str, Question] = {}
    while len(drawn) < count:
        if rng.random() < (0.3 if clip.scene.text else 0.12):
            question = ask(rng, "presence_text", "no", w=_other_text(clip, rng))
        else:
            question = ask(rng, "presence", "no", x=with_article(" ".join(_missing(clip, rng))))
        drawn.setdefault(question.text, question)
    return list(drawn.values())


def _missing(clip: Clip, rng: random.Random) -> Pair:
    """A pair that is never seen: of a colour and a shape that are both there, or one of them, or any."""
    seen = clip.scene.pairs()
    colors, shapes = {color for color, _ in seen}, {shape for _, shape in seen}
    absent = [pair for pair in (ALL_PAIRS if clip.split == "unseen" else TRAIN_PAIRS) if pair not in seen]
    both = [pair for pair in absent if pair[0] in colors and pair[1] in shapes]
    near = [pair for pair in absent if pair[0] in colors or pair[1] in shapes]
    kind = rng.random()
    return rng.choice((both if kind < 0.35 else near if kind < 0.75 else absent) or near or absent)


def _other_text(clip: Clip, rng: random.Random) -> str:
    """A text that is not shown; in half the cases it differs from the one that is by one character."""
    content = clip.scene.text.content if clip.scene.text else ""
    while True:
        other = pick_content(rng, clip.split)
        if content and rng.random() < 0.5 and clip.split != "unseen":
            place = rng.randrange(len(content))
            characters = "0123456789" if content.isdigit() else "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
            other = content[:place] + rng.choice(characters) + content[place + 1 :]
            if other.startswith("0") or any(word in other for word in HELD_OUT_WORDS):
                continue
        if other != content:
            return other
