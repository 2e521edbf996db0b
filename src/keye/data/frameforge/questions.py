"""Questions about a clip with exactly known answers, balanced so that guessing pays little.

Each task collects the questions that a clip supports in a pool in random order. A task with few answers (yes or no,
once or twice) puts equally many of each into the pool, so any number of draws stays balanced.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from keye.data.frameforge.scene import Clip, Interval, SceneObject
from keye.data.frameforge.words import ALL_PAIRS, COLORS, PHRASES, SHAPES, TIME_PHRASES, TRAIN_PAIRS, Pair, with_article
from keye.errors import KeyeError

Seconds = tuple[float, float]


@dataclass(frozen=True)
class Question:
    """One question and its only right answer. `intervals` are the gold (start, end) seconds of the tasks that ask for
    intervals, empty when the event never happens, and None for all other tasks."""

    task: str
    text: str
    answer: str
    intervals: tuple[Seconds, ...] | None = None


WEIGHTS: dict[str, float] = {
    "ground": 5.0,
    "ground_text": 2.0,
    "ground_none": 0.8,
    "start": 2.0,
    "end": 2.0,
    "count": 1.5,
    "count_at": 2.5,
    "attribute_at": 2.5,
    "list_at": 4.0,
    "visible_at": 3.0,
    "order": 3.0,
    "direction": 1.0,
    "place": 1.0,
    "read": 3.0,
    "presence": 2.0,
    "color_change": 1.0,
    "change_time": 1.0,
    "times": 0.8,
    "size": 0.7,
    "background": 0.6,
    "cut_time": 1.0,
    "caption": 0.5,
}
TASKS: tuple[str, ...] = tuple(WEIGHTS)
INTERVAL_TASKS = ("ground", "ground_text", "ground_none")

# How strongly an answer to count_at is preferred: the fuller a frame, the rarer.
_COUNT_PREFERENCE = {0: 1.0, 1: 0.6, 2: 1.3, 3: 4.0}
_PLACE_MARGIN = 9.0


def questions(
    clip: Clip,
    rng: random.Random,
    count: int,
    tasks: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
) -> list[Question]:
    """Up to `count` different questions about `clip`: fewer when it supports no more.

    `tasks` limits the kinds, `weights` replaces the share of the kinds it names (0 leaves one out). KeyeError for an
    unknown task or a negative weight.
    """
    shares = _shares(tasks, weights)
    pools: dict[str, list[Question]] = {}
    chosen: dict[str, Question] = {}
    while len(chosen) < count and shares:
        task = rng.choices(list(shares), list(shares.values()))[0]
        if task not in pools:
            pools[task] = _POOLS[task](clip, rng)
        if pools[task]:
            question = pools[task].pop()
            chosen.setdefault(question.text, question)
        else:
            del shares[task]
    return list(chosen.values())


def format_intervals(intervals: Iterable[Seconds]) -> str:
    """`[[3.5, 7.0], [9.0, 11.5]]`, or `[]` for none."""
    return "[" + ", ".join(f"[{start:.1f}, {end:.1f}]" for start, end in intervals) + "]"


def _shares(tasks: Sequence[str] | None, weights: Mapping[str, float] | None) -> dict[str, float]:
    unknown = sorted({*(tasks or ()), *(weights or {})} - set(TASKS))
    if unknown:
        raise KeyeError(f"tasks holds {unknown[0]!r}; choose from {', '.join(TASKS)}")
    if any(weight < 0 for weight in (weights or {}).values()):
        raise KeyeError("weights holds a negative number; use 0 to leave a task out")
    merged = WEIGHTS | dict(weights or {})
    return {task: merged[task] for task in TASKS if (tasks is None or task in tasks) and merged[task] > 0}


def _ask(
    rng: random.Random,
    form: str,
    answer: str,
    slots: Mapping[str, str] | None = None,
    *,
    time: float | None = None,
    intervals: tuple[Seconds, ...] | None = None,
) -> Question:
    """A question in one of the wordings of `form`, which is a task or "task.variant"."""
    values = dict(slots or {})
    if time is not None:
        values["t"] = rng.choice(TIME_PHRASES).format(time)
    return Question(form.split(".")[0], rng.choice(PHRASES[form]).format(**values), answer, intervals)


def _shuffled(rng: random.Random, pool: list[Question]) -> list[Question]:
    rng.shuffle(pool)
    return pool


def _even(rng: random.Random, *groups: list[Question]) -> list[Question]:
    """Equally many questions of each group, in random order."""
    size = min(len(group) for group in groups)
    return _shuffled(rng, [question for group in groups for question in rng.sample(group, size)])


def _in_seconds(clip: Clip, intervals: Iterable[Interval]) -> tuple[Seconds, ...]:
    return tuple((clip.timestamps[first], clip.timestamps[last]) for first, last in intervals)


def _seconds(clip: Clip, frame: int) -> str:
    return f"{clip.timestamps[frame]:.1f} seconds"


def _steady(clip: Clip) -> list[SceneObject]:
    """Objects that keep their colour, so that one name fits them all the time."""
    return [thing for thing in clip.scene.objects if thing.change is None]


def _visible_frames(thing: SceneObject) -> list[int]:
    return [frame for first, last in thing.intervals for frame in range(first, last + 1)]


def absent_pairs(clip: Clip, rng: random.Random, count: int) -> list[Pair]:
    """Pairs never seen in the clip, most of them sharing the colour or the shape of one that is."""
    seen = clip.scene.pairs()
    allowed = ALL_PAIRS if clip.split == "unseen" else TRAIN_PAIRS
    absent = [pair for pair in allowed if pair not in seen]
    colors, shapes = {color for color, _ in seen}, {shape for _, shape in seen}
    near = [pair for pair in absent if pair[0] in colors or pair[1] in shapes]
    picked: set[Pair] = set()
    while len(picked) < min(count, len(near)):
        picked.add(rng.choice(near if rng.random() < 0.7 else absent))
    return sorted(picked)


def _ground(clip: Clip, rng: random.Random) -> list[Question]:
    if clip.frames < 2:
        return []
    pool = []
    for thing in _steady(clip):
        gold = _in_seconds(clip, thing.intervals)
        pool.append(_ask(rng, "ground", format_intervals(gold), {"x": thing.name}, intervals=gold))
    return _shuffled(rng, pool)


def _ground_text(clip: Clip, rng: random.Random) -> list[Question]:
    text = clip.scene.text
    if text is None or clip.frames < 2:
        return []
    gold = _in_seconds(clip, text.intervals)
    return [_ask(rng, "ground_text", format_intervals(gold), {"w": text.content}, intervals=gold)]


def _ground_none(clip: Clip, rng: random.Random) -> list[Question]:
    if clip.frames < 2:
        return []
    pool = []
    for pair in absent_pairs(clip, rng, 2):
        question = _ask(rng, "ground", format_intervals(()), {"x": " ".join(pair)}, intervals=())
        pool.append(Question("ground_none", question.text, question.answer, question.intervals))
    return _shuffled(rng, pool)


def _start(clip: Clip, rng: random.Random) -> list[Question]:
    return _edges(clip, rng, "start", lambda thing: thing.first)


def _end(clip: Clip, rng: random.Random) -> list[Question]:
    return _edges(clip, rng, "end", lambda thing: thing.last)


def _edges(clip: Clip, rng: random.Random, task: str, edge: Callable[[SceneObject], int]) -> list[Question]:
    if clip.frames < 2:
        return []
    pool = [_ask(rng, task, _seconds(clip, edge(thing)), {"x": thing.name}) for thing in _steady(clip)]
    return _shuffled(rng, pool)


def _count(clip: Clip, rng: random.Random) -> list[Question]:
    return [_ask(rng, "count", str(len(clip.scene.objects)))]


def _frames_by_count(clip: Clip) -> dict[int, list[int]]:
    counts = [0] * clip.frames
    for thing in clip.scene.objects:
        for frame in _visible_frames(thing):
            counts[frame] += 1
    groups: dict[int, list[int]] = defaultdict(list)
    for frame, number in enumerate(counts):
        groups[number].append(frame)
    return groups


def _count_at(clip: Clip, rng: random.Random) -> list[Question]:
    groups = _frames_by_count(clip)
    order = sorted(groups, key=lambda number: rng.random() ** (1 / _COUNT_PREFERENCE.get(number, 12.0)))
    return [_ask(rng, "count_at", str(number), time=clip.timestamps[rng.choice(groups[number])]) for number in order]


def _list_at(clip: Clip, rng: random.Random) -> list[Question]:
    pool = []
    for number, frames in _frames_by_count(clip).items():
        if number == 0 and rng.random() < 0.6:
            continue
        for frame in rng.sample(frames, min(2 if number else 1, len(frames))):
            pool.append(_ask(rng, "list_at", listing(clip, frame), time=clip.timestamps[frame]))
    return _shuffled(rng, pool)


def listing(clip: Clip, frame: int) -> str:
    pairs = [(thing.color_at(frame), thing.shape) for thing in clip.scene.visible_objects(frame)]
    pairs.sort(key=lambda pair: (_COLOR_RANK[pair[0]], SHAPES.index(pair[1])))
    return "; ".join(" ".join(pair) for pair in pairs) or "none"


_COLOR_RANK = {color: rank for rank, color in enumerate(COLORS)}


def _visible_at(clip: Clip, rng: random.Random) -> list[Question]:
    pool = []
    for thing in _steady(clip):
        visible = _visible_frames(thing)
        hidden = sorted(set(range(clip.frames)) - set(visible))
        for frames, answer in ((visible, "yes"), (hidden, "no")):
            if hidden:
                time = clip.timestamps[rng.choice(frames)]
                pool.append(_ask(rng, "visible_at", answer, {"x": thing.name}, time=time))
    return _shuffled(rng, pool)


def _attribute_at(clip: Clip, rng: random.Random) -> list[Question]:
    pool = []
    for thing in clip.scene.objects:
        frame = rng.choice(_visible_frames(thing))
        others = [other for other in clip.scene.visible_objects(frame) if other is not thing]
        color, time = thing.color_at(frame), clip.timestamps[frame]
        if all(other.shape != thing.shape for other in others):
            pool.append(_ask(rng, "attribute_at.color", color, {"x": thing.shape}, time=time))
        if all(other.color_at(frame) != color for other in others):
            pool.append(_ask(rng, "attribute_at.shape", thing.shape, {"x": color}, time=time))
    return _shuffled(rng, pool)


def _order(clip: Clip, rng: random.Random) -> list[Question]:
    pairs = [(a, b) for a, b in permutations(_steady(clip), 2) if a.first != b.first]
    pool = []
    for a, b in pairs:
        if rng.random() < 0.5:
            earlier = a if a.first < b.first else b
            pool.append(_ask(rng, "order.first", earlier.name, {"a": a.name, "b": b.name}))
        else:
            pool.append(_ask(rng, "order.before", "yes" if a.first < b.first else "no", {"a": a.name, "b": b.name}))
    return _shuffled(rng, pool)


def _direction(clip: Clip, rng: random.Random) -> list[Question]:
    movers = [thing for thing in _steady(clip) if thing.motion != "static"]
    return _shuffled(rng, [_ask(rng, "direction", thing.motion, {"x": thing.name}) for thing in movers])


def _place(clip: Clip, rng: random.Random) -> list[Question]:
    width, height = clip.scene.canvas
    pool = []
    for thing in _steady(clip):
        frame = rng.choice(_visible_frames(thing))
        x, y = thing.position(frame)
        for form, away, sides in (
            ("place.x", x - width / 2, ("left", "right")),
            ("place.y", y - height / 2, ("top", "bottom")),
        ):
            if abs(away) >= _PLACE_MARGIN:
                pool.append(_ask(rng, form, sides[away > 0], {"x": thing.name}, time=clip.timestamps[frame]))
    return _shuffled(rng, pool)


def _read(clip: Clip, rng: random.Random) -> list[Question]:
    return [_ask(rng, "read", clip.scene.text.content)] if clip.scene.text else []


def _presence(clip: Clip, rng: random.Random) -> list[Question]:
    present = [_ask(rng, "presence", "yes", {"x": with_article(thing.name)}) for thing in _steady(clip)]
    pairs = absent_pairs(clip, rng, len(present))
    absent = [_ask(rng, "presence", "no", {"x": with_article(" ".join(pair))}) for pair in pairs]
    return _even(rng, present, absent)


def _color_change(clip: Clip, rng: random.Random) -> list[Question]:
    changes = [(thing.name, thing.change.color) for thing in clip.scene.objects if thing.change]
    return _shuffled(rng, [_ask(rng, "color_change", color, {"x": name}) for name, color in changes])


def _change_time(clip: Clip, rng: random.Random) -> list[Question]:
    changes = [(thing.name, thing.change.frame) for thing in clip.scene.objects if thing.change]
    return _shuffled(rng, [_ask(rng, "change_time", _seconds(clip, frame), {"x": name}) for name, frame in changes])


def _times(clip: Clip, rng: random.Random) -> list[Question]:
    groups: tuple[list[Question], list[Question]] = ([], [])
    for thing in _steady(clip):
        number = len(thing.intervals)
        groups[number - 1].append(_ask(rng, "times", str(number), {"x": thing.name}))
    return _even(rng, *groups)


def _size(clip: Clip, rng: random.Random) -> list[Question]:
    groups: dict[str, list[Question]] = {"small": [], "big": []}
    for thing in _steady(clip):
        groups[thing.size].append(_ask(rng, "size", thing.size, {"x": thing.name}))
    return _even(rng, *groups.values())


def _background(clip: Clip, rng: random.Random) -> list[Question]:
    starts = [background.frame for background in clip.scene.backgrounds]
    pool = []
    for background, end in zip(clip.scene.backgrounds, [*starts[1:], clip.frames], strict=True):
        time = clip.timestamps[rng.randrange(background.frame, end)]
        pool.append(_ask(rng, "background", background.color, time=time))
    return _shuffled(rng, pool)


def _cut_time(clip: Clip, rng: random.Random) -> list[Question]:
    return [_ask(rng, "cut_time", _seconds(clip, cut.frame)) for cut in clip.scene.backgrounds[1:]]


def _caption(clip: Clip, rng: random.Random) -> list[Question]:
    if clip.frames < 2:
        return []
    events = []
    for thing in clip.scene.objects:
        words = thing.name
        words += f" moves {thing.motion}" if thing.motion != "static" else ""
        words += f" changes to {thing.change.color}" if thing.change else ""
        events.append((thing.intervals, words))
    if clip.scene.text:
        events.append((clip.scene.text.intervals, f"word {clip.scene.text.content}"))
    lines = [f"{format_intervals(_in_seconds(clip, intervals))} {words}" for intervals, words in sorted(events)]
    return [_ask(rng, "caption", "; ".join(lines))]


_POOLS: dict[str, Callable[[Clip, random.Random], list[Question]]] = {
    "ground": _ground,
    "ground_text": _ground_text,
    "ground_none": _ground_none,
    "start": _start,
    "end": _end,
    "count": _count,
    "count_at": _count_at,
    "attribute_at": _attribute_at,
    "list_at": _list_at,
    "visible_at": _visible_at,
    "order": _order,
    "direction": _direction,
    "place": _place,
    "read": _read,
    "presence": _presence,
    "color_change": _color_change,
    "change_time": _change_time,
    "times": _times,
    "size": _size,
    "background": _background,
    "cut_time": _cut_time,
    "caption": _caption,
}
