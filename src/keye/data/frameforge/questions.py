"""Questions about a clip with exactly known answers, balanced so that guessing pays little.

Each task collects the questions that a clip supports in a pool in random order. A task with few answers (yes or no,
once or twice) puts equally many of each into the pool, so any number of draws stays balanced.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations

from keye.data.frameforge.scene import Clip, Interval, SceneObject
from keye.data.frameforge.words import (
    ALL_PAIRS,
    PHRASES,
    PICTURE_PHRASES,
    TIME_PHRASES,
    TRAIN_PAIRS,
    Pair,
    with_article,
)
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


INTERVAL_TASKS = ("ground", "ground_text", "ground_none")
#: Tasks about more than one frame.
_TIMED_TASKS = (*INTERVAL_TASKS, "start", "end", "caption")

# How strongly an answer to count_at is preferred: the fuller a frame, the rarer.
_COUNT_PREFERENCE = {0: 1.0, 1: 0.6, 2: 1.3, 3: 4.0}
_PLACE_MARGIN = 9.0


def questions(
    clip: Clip, rng: random.Random, count: int, tasks: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
) -> list[Question]:  # fmt: skip
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
            pools[task] = _fill_pool(task, clip, rng)
        if pools[task]:
            question = pools[task].pop()
            chosen.setdefault(question.text, question)
        else:
            del shares[task]
    return list(chosen.values())


def picture_questions(clip: Clip, rng: random.Random, count: int) -> list[Question]:
    """Up to `count` different questions about the first frame of `clip`, as an image without times, in random order."""
    visible, form = clip.scene.visible_objects(0), partial(ask, rng, phrases=PICTURE_PHRASES)
    chosen = [form("count", str(len(visible))), form("list_at", listing(clip, 0)),
              form("background", clip.scene.background_at(0).color)]  # fmt: skip
    if clip.scene.text is not None and clip.scene.text.visible(0):
        chosen.append(form("read", clip.scene.text.content))
    for thing in visible:
        color, others = thing.color_at(0), [other for other in visible if other is not thing]
        name = f"{color} {thing.shape}"
        chosen.append(form("presence", "yes", x=with_article(name)))
        chosen.append(form("size", thing.size, x=name))
        if all(other.shape != thing.shape for other in others):
            chosen.append(form("attribute_at.color", color, x=thing.shape))
        if all(other.color_at(0) != color for other in others):
            chosen.append(form("attribute_at.shape", thing.shape, x=color))
    absent = absent_pairs(clip, rng, len(visible))
    chosen += [form("presence", "no", x=with_article(" ".join(pair))) for pair in absent]
    rng.shuffle(chosen)
    return list({question.text: question for question in chosen}.values())[:count]


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


def ask(
    rng: random.Random, form: str, answer: str, *, phrases: Mapping[str, Sequence[str]] = PHRASES,
    time: float | None = None, intervals: tuple[Seconds, ...] | None = None, **slots: str,
) -> Question:  # fmt: skip
    """A question in one of the wordings of `form`, which is a task or "task.variant"."""
    if time is not None:
        slots["t"] = rng.choice(TIME_PHRASES).format(time)
    return Question(form.split(".")[0], rng.choice(phrases[form]).format(**slots), answer, intervals)


def _fill_pool(task: str, clip: Clip, rng: random.Random) -> list[Question]:
    """Every question of a task in the order in which they are asked from the end."""
    if task in _TIMED_TASKS and clip.frames < 2:
        return []
    pool = list(_TASKS[task][1](clip, rng))
    if task != "count_at":  # ordered by preference
        rng.shuffle(pool)
    return pool


def _even(rng: random.Random, *groups: list[Question]) -> list[Question]:
    """Equally many questions of each group."""
    size = min(len(group) for group in groups)
    return [question for group in groups for question in rng.sample(group, size)]


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


def _ground(clip: Clip, rng: random.Random) -> Iterator[Question]:
    for thing in _steady(clip):
        gold = _in_seconds(clip, thing.intervals)
        yield ask(rng, "ground", format_intervals(gold), x=thing.name, intervals=gold)


def _ground_text(clip: Clip, rng: random.Random) -> Iterator[Question]:
    if (text := clip.scene.text) is not None:
        gold = _in_seconds(clip, text.intervals)
        yield ask(rng, "ground_text", format_intervals(gold), w=text.content, intervals=gold)


def _ground_none(clip: Clip, rng: random.Random) -> Iterator[Question]:
    for pair in absent_pairs(clip, rng, 2):
        question = ask(rng, "ground", format_intervals(()), x=" ".join(pair), intervals=())
        yield replace(question, task="ground_none")


def _start(clip: Clip, rng: random.Random) -> Iterator[Question]:
    for thing in _steady(clip):
        yield ask(rng, "start", _seconds(clip, thing.first), x=thing.name)


def _end(clip: Clip, rng: random.Random) -> Iterator[Question]:
    for thing in _steady(clip):
        yield ask(rng, "end", _seconds(clip, thing.last), x=thing.name)


def _count(clip: Clip, rng: random.Random) -> Iterator[Question]:
    yield ask(rng, "count", str(len(clip.scene.objects)))


def _frames_by_count(clip: Clip) -> dict[int, list[int]]:
    counts = Counter(frame for thing in clip.scene.objects for frame in _visible_frames(thing))
    groups: dict[int, list[int]] = defaultdict(list)
    for frame in range(clip.frames):
        groups[counts[frame]].append(frame)
    return groups


def _count_at(clip: Clip, rng: random.Random) -> Iterator[Question]:
    groups = _frames_by_count(clip)
    for number in sorted(groups, key=lambda number: rng.random() ** (1 / _COUNT_PREFERENCE.get(number, 12.0))):
        yield ask(rng, "count_at", str(number), time=clip.timestamps[rng.choice(groups[number])])


def _list_at(clip: Clip, rng: random.Random) -> Iterator[Question]:
    for number, frames in _frames_by_count(clip).items():
        if number == 0 and rng.random() < 0.6:
            continue
        for frame in rng.sample(frames, min(2 if number else 1, len(frames))):
            yield ask(rng, "list_at", listing(clip, frame), time=clip.timestamps[frame])


def listing(clip: Clip, frame: int) -> str:
    """Colours and shapes of the visible objects in the order of the words: "red circle; blue star", or "none"."""
    pairs = [(thing.color_at(frame), thing.shape) for thing in clip.scene.visible_objects(frame)]
    return "; ".join(" ".join(pair) for pair in sorted(pairs, key=ALL_PAIRS.index)) or "none"


def _visible_at(clip: Clip, rng: random.Random) -> Iterator[Question]:
    for thing in _steady(clip):
        visible = _visible_frames(thing)
        hidden = sorted(set(range(clip.frames)) - set(visible))
        for frames, answer in ((visible, "yes"), (hidden, "no")):
            if hidden:
                time = clip.timestamps[rng.choice(frames)]
                yield ask(rng, "visible_at", answer, x=thing.name, time=time)


def _attribute_at(clip: Clip, rng: random.Random) -> Iterator[Question]:
    for thing in clip.scene.objects:
        frame = rng.choice(_visible_frames(thing))
        others = [other for other in clip.scene.visible_objects(frame) if other is not thing]
        color, time = thing.color_at(frame), clip.timestamps[frame]
        if all(other.shape != thing.shape for other in others):
            yield ask(rng, "attribute_at.color", color, x=thing.shape, time=time)
        if all(other.color_at(frame) != color for other in others):
            yield ask(rng, "attribute_at.shape", thing.shape, x=color, time=time)


def _order(clip: Clip, rng: random.Random) -> Iterator[Question]:
    for a, b in permutations(_steady(clip), 2):
        if a.first == b.first:
            continue
        if rng.random() < 0.5:
            yield ask(rng, "order.first", a.name if a.first < b.first else b.name, a=a.name, b=b.name)
        else:
            yield ask(rng, "order.before", "yes" if a.first < b.first else "no", a=a.name, b=b.name)


def _direction(clip: Clip, rng: random.Random) -> Iterator[Question]:
    for thing in _steady(clip):
        if thing.motion != "static":
            yield ask(rng, "direction", thing.motion, x=thing.name)


def _place(clip: Clip, rng: random.Random) -> Iterator[Question]:
    width, height = clip.scene.canvas
    for thing in _steady(clip):
        frame = rng.choice(_visible_frames(thing))
        x, y = thing.position(frame)
        for form, away, sides in (("place.x", x - width / 2, ("left", "right")),
                                  ("place.y", y - height / 2, ("top", "bottom"))):  # fmt: skip
            if abs(away) >= _PLACE_MARGIN:
                yield ask(rng, form, sides[away > 0], x=thing.name, time=clip.timestamps[frame])


def _read(clip: Clip, rng: random.Random) -> Iterator[Question]:
    if clip.scene.text:
        yield ask(rng, "read", clip.scene.text.content)


def _presence(clip: Clip, rng: random.Random) -> list[Question]:
    present = [ask(rng, "presence", "yes", x=with_article(thing.name)) for thing in _steady(clip)]
    pairs = absent_pairs(clip, rng, len(present))
    absent = [ask(rng, "presence", "no", x=with_article(" ".join(pair))) for pair in pairs]
    return _even(rng, present, absent)


def _color_change(clip: Clip, rng: random.Random) -> Iterator[Question]:
    for thing in clip.scene.objects:
        if thing.change:
            yield ask(rng, "color_change", thing.change.color, x=thing.name)


def _change_time(clip: Clip, rng: random.Random) -> Iterator[Question]:
    for thing in clip.scene.objects:
        if thing.change:
            yield ask(rng, "change_time", _seconds(clip, thing.change.frame), x=thing.name)


def _times(clip: Clip, rng: random.Random) -> list[Question]:
    groups: tuple[list[Question], list[Question]] = ([], [])
    for thing in _steady(clip):
        number = len(thing.intervals)
        groups[number - 1].append(ask(rng, "times", str(number), x=thing.name))
    return _even(rng, *groups)


def _size(clip: Clip, rng: random.Random) -> list[Question]:
    groups: dict[str, list[Question]] = {"small": [], "big": []}
    for thing in _steady(clip):
        groups[thing.size].append(ask(rng, "size", thing.size, x=thing.name))
    return _even(rng, *groups.values())


def _background(clip: Clip, rng: random.Random) -> Iterator[Question]:
    starts = [background.frame for background in clip.scene.backgrounds]
    for background, end in zip(clip.scene.backgrounds, [*starts[1:], clip.frames], strict=True):
        if background.texture is not None:
            continue  # it has no name
        time = clip.timestamps[rng.randrange(background.frame, end)]
        yield ask(rng, "background", background.color, time=time)


def _cut_time(clip: Clip, rng: random.Random) -> Iterator[Question]:
    cuts = clip.scene.backgrounds[1:]
    if len(cuts) == 1:  # of several no single time is the answer
        yield ask(rng, "cut_time", _seconds(clip, cuts[0].frame))


def _caption(clip: Clip, rng: random.Random) -> Iterator[Question]:
    events = []
    for thing in clip.scene.objects:
        words = thing.name
        words += f" moves {thing.motion}" if thing.motion != "static" else ""
        words += f" changes to {thing.change.color}" if thing.change else ""
        events.append((thing.intervals, words))
    if clip.scene.text:
        events.append((clip.scene.text.intervals, f"word {clip.scene.text.content}"))
    lines = [f"{format_intervals(_in_seconds(clip, intervals))} {words}" for intervals, words in sorted(events)]
    yield ask(rng, "caption", "; ".join(lines))


#: The share of each task among the questions, and what makes its questions.
_TASKS: dict[str, tuple[float, Callable[[Clip, random.Random], Iterable[Question]]]] = {
    "ground": (5.0, _ground), "ground_text": (2.0, _ground_text), "ground_none": (0.8, _ground_none),
    "start": (2.0, _start), "end": (2.0, _end), "count": (1.5, _count), "count_at": (2.5, _count_at),
    "attribute_at": (2.5, _attribute_at), "list_at": (4.0, _list_at), "visible_at": (3.0, _visible_at),
    "order": (3.0, _order), "direction": (1.0, _direction), "place": (1.0, _place), "read": (3.0, _read),
    "presence": (2.0, _presence), "color_change": (1.0, _color_change), "change_time": (1.0, _change_time),
    "times": (0.8, _times), "size": (0.7, _size), "background": (0.6, _background), "cut_time": (1.0, _cut_time),
    "caption": (0.5, _caption),
}  # fmt: skip
WEIGHTS: dict[str, float] = {task: weight for task, (weight, _) in _TASKS.items()}
TASKS: tuple[str, ...] = tuple(WEIGHTS)
