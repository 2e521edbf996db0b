"""Where in the video the evidence of a question lies, token by token. Numpy only.

FrameForge knows why each answer is right. This turns that knowledge into targets of helper losses: which visual tokens
a word of the question or of the answer should look at (`Pointer`), and what appears or vanishes in each frame
(`Events`).

Legend: F frames, P trunk tokens (the video).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from keye.data.frameforge import Clip, Question
from keye.data.frameforge.labels import BACKGROUND_IDS
from keye.data.frameforge.scene import SceneObject
from keye.data.frameforge.words import COLORS, HELD_OUT_PAIRS, SHAPES

#: `time`: the last token of a time in a question, at that frame. `first`, `last`: the last token of an object's name,
#: at the frame where it first appears and where it is last seen. `start`, `end`: the tokens that predict a time of the
#: answer, at the frame of that time; those that predict which of two objects comes first, at its first frame. `letter`:
#: the token that predicts a letter, at the cell that shows it. `seen`: the name of an object, at the cells of its
#: centre while it is visible. `place`: the last token of name and time in a question about a place, at the cell of that
#: frame. `again`: the name in a question about how often, at the cells of its last appearance. `before`: the token
#: after a frame, at that after the frame before it. `origin`: the cell of an object that moves, at its first cell.
PointerKind = Literal["time", "first", "last", "start", "end", "letter", "seen", "place", "again", "before", "origin"]
FindingKind = Literal["place", "direction", "size", "times"]
#: The target of a background without a name; losses leave it out.
UNNAMED = -100
COLOR_RANK = {color: rank for rank, color in enumerate(COLORS)}
SHAPE_RANK = {shape: rank for rank, shape in enumerate(SHAPES)}
#: bool [8, 5]: the pairs of colour and shape that training clips can show; the others teach nothing.
TRAINED_PAIRS = np.array([[(color, shape) not in HELD_OUT_PAIRS for shape in SHAPES] for color in COLORS])
#: A numpy array where batches are made, a tensor where they are learnt.
Array = TypeVar("Array")
_TIME = re.compile(r"\b([0-9]+\.[0-9])\b")


@dataclass(frozen=True)
class Pointer:
    """Token `place` of the tail of sequence `row` looks at trunk tokens `spans` (start, stop), which show `frame`.
    Tokens of the trunk have negative places."""

    kind: PointerKind
    row: int
    place: int
    frame: int
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Comparison:
    """Token `place` of the tail of sequence `row` ends the second name of a question about order; `later` says whether
    that object appears after the one named first."""

    row: int
    place: int
    later: bool


@dataclass(frozen=True)
class Finding:
    """Token `place` of the tail of sequence `row` knows `values` of the object that its question is about: place, x and
    y from the middle of the frame, -1 to 1 at its edges; direction, how far it moves in x and y, in the same unit;
    size, 1 for big and -1 for small; times, 1 for twice and -1 for once. `answers`: the token predicts the answer."""

    kind: FindingKind
    row: int
    place: int
    values: tuple[float, ...]
    answers: bool = False


@dataclass(frozen=True)
class Sightings(Generic[Array]):
    """Visible objects of a batch and the visual tokens whose cells their centres lie in: `places` int64 [n, 2]
    (sequence, token), `values` float32 [n, 6] (place, size, times and direction as in `Finding`, the last two up to
    then)."""

    places: Array
    values: Array


def sightings_of(clips: Sequence[Clip], layout: TrunkLayout) -> Sightings[NDArray]:
    """The sightings of clips of equally many frames."""
    places, values = [], []
    for row, clip in enumerate(clips):
        for frame in range(clip.frames):
            for thing in clip.scene.visible_objects(frame):
                places.append((row, layout.cell(clip, thing, frame)[0]))
                again = frame > thing.intervals[0][1]
                position, moved = _from_middle(clip, thing.position(frame)), _moved(clip, thing, frame)
                values.append((*position, _sign(thing.size == "big"), _sign(again), *moved))
    return Sightings(np.array(places, np.int64).reshape(-1, 2), np.array(values, np.float32).reshape(-1, 6))


def _moved(clip: Clip, thing: SceneObject, frame: int) -> tuple[float, float]:
    """How far an object has moved since its first frame, in halves of the frame."""
    x0, y0 = _from_middle(clip, thing.position(thing.first))
    x, y = _from_middle(clip, thing.position(frame))
    return x - x0, y - y0


def _sign(answer: bool) -> float:
    return 1.0 if answer else -1.0


def _from_middle(clip: Clip, position: tuple[float, float]) -> tuple[float, float]:
    """A position in the scene as a share of half the frame, -1 to 1."""
    (x, y), (width, height) = position, clip.scene.canvas
    return 2 * x / width - 1, 2 * y / height - 1


@dataclass(frozen=True)
class Events(Generic[Array]):
    """What each frame of B clips shows: `pairs` bool [B, F, 3, 8, 5] (seen, appeared, vanished; colour; shape), `text`
    bool [B, F, 3] the same of rendered text, `background` int64 [B, F] (`UNNAMED` for textures), `cut` bool [B, F],
    whether the background changes. Everything in the first frame appeared. `so_far` bool [B, F, 8, 5]: the objects seen
    up to each frame, by their first colour."""

    pairs: Array
    so_far: Array
    text: Array
    background: Array
    cut: Array


def events_of(clips: Sequence[Clip]) -> Events[NDArray]:
    """The events of clips of equally many frames."""
    frames = clips[0].frames
    seen = np.zeros((len(clips), frames, len(COLORS), len(SHAPES)), bool)
    so_far = np.zeros_like(seen)
    text = np.zeros((len(clips), frames), bool)
    background = np.zeros((len(clips), frames), np.int64)
    cut = np.zeros((len(clips), frames), bool)
    for row, clip in enumerate(clips):
        for thing in clip.scene.objects:
            so_far[row, thing.first :, COLOR_RANK[thing.color], SHAPE_RANK[thing.shape]] = True
        for frame in range(frames):
            for thing in clip.scene.visible_objects(frame):
                seen[row, frame, COLOR_RANK[thing.color_at(frame)], SHAPE_RANK[thing.shape]] = True
            text[row, frame] = clip.scene.text is not None and clip.scene.text.visible(frame)
            background[row, frame] = BACKGROUND_IDS.get(clip.scene.background_at(frame).color, UNNAMED)
        for start in clip.scene.backgrounds[1:]:
            cut[row, start.frame] = True
    return Events(_with_changes(seen), so_far, _with_changes(text), background, cut)


def _with_changes(seen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[B, F, ...] -> [B, F, 3, ...]: seen, appeared, vanished."""
    before = np.concatenate([np.zeros_like(seen[:, :1]), seen[:, :-1]], axis=1)
    return np.stack([seen, seen & ~before, before & ~seen], axis=2)


@dataclass(frozen=True)
class TrunkLayout:
    """Where the frames of a video lie in its trunk: `prefix` tokens, then for each frame `text` tokens and `cells`
    visual ones in `columns` columns, up to `length` tokens in all."""

    prefix: int
    text: int
    cells: int
    columns: int
    frames: int
    length: int

    def cell(self, clip: Clip, thing: SceneObject, frame: int) -> tuple[int, int]:
        """The visual token in whose cell the centre of `thing` lies in `frame`, as a span."""
        (x, y), (width, height) = thing.position(frame), clip.scene.canvas
        row, column = int(y * (self.cells // self.columns) / height), int(x * self.columns / width)
        place = self.visual(frame) + row * self.columns + column
        return place, place + 1

    def visual(self, frame: int) -> int:
        """The first visual token of `frame`."""
        return self.prefix + frame * (self.text + self.cells) + self.text

    def after(self, frame: int) -> int:
        """The first token that has seen all of `frame`: the next frame's marker, or the end of the video."""
        return self.visual(frame) + self.cells

    def span(self, frame: int, further: int = 0) -> tuple[int, int]:
        """Tokens that can know what `frame` shows: its visual tokens up to the text of the next frame, and as much of
        the `further` frames behind it."""
        last = frame + further + 1
        return self.visual(frame), self.visual(last) if last < self.frames else self.length


def trunk_pointers(clip: Clip, layout: TrunkLayout, row: int) -> Iterator[Pointer]:
    """Pointers of the tokens after frames at those before them, and of moving objects at where they came from."""
    for frame in range(1, layout.frames):
        before = layout.after(frame - 1)
        yield Pointer("before", row, layout.after(frame) - layout.length, frame - 1, ((before, before + 1),))
    for thing in clip.scene.objects:
        if thing.motion != "static":
            first = layout.cell(clip, thing, thing.first)
            for frame in range(thing.first + 1, thing.last + 1):
                place = layout.cell(clip, thing, frame)[0] - layout.length
                yield Pointer("origin", row, place, thing.first, (first,))


class PointerMaker:
    """Finds the pointers of questions; `encode` makes token ids of plain text."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._color = {color: encode(f" {color}")[-1] for color in COLORS}
        self._shape = {shape: encode(f" {shape}")[-1] for shape in SHAPES}
        self._tenths = {encode(f"7.{digit}")[-1] for digit in range(10)}

    def of_question(
        self, clip: Clip, layout: TrunkLayout, question: Question, head: list[int], row: int, start: int
    ) -> Iterator[Pointer]:
        """Pointers of the question's own tokens `head`, which begin at tail position `start`."""
        named = _TIME.search(question.text)
        if named is not None and float(named[1]) in clip.timestamps:
            frame = clip.timestamps.index(float(named[1]))
            place = start + max(i for i, token in enumerate(head) if token in self._tenths)
            yield Pointer("time", row, place, frame, (layout.span(frame),))
        for index, thing in self._names(clip, head):
            place = start + index
            yield Pointer("first", row, place, thing.first, (layout.span(thing.first),))
            if thing.change is None:
                yield Pointer("last", row, place, thing.last, (layout.span(thing.last, 1),))
            if question.task == "place":
                frame, later = self._when(clip, question, head)
                cell = layout.cell(clip, thing, frame)
                yield Pointer("place", row, start + max(index, later), frame, (cell,))
            else:
                visible = [f for f in range(clip.frames) if thing.visible(f) and thing.color_at(f) == thing.color]
                yield Pointer("seen", row, place, thing.first, tuple(layout.cell(clip, thing, f) for f in visible))
            if question.task == "times":
                begin, end = thing.intervals[-1]
                cells = tuple(layout.cell(clip, thing, f) for f in range(begin, end + 1))
                yield Pointer("again", row, place, begin, cells)

    def comparison(self, clip: Clip, question: Question, head: list[int], row: int, start: int) -> Comparison | None:
        """The comparison that a question about order asks for, None for any other question."""
        if question.task != "order":
            return None
        named = [
            (index, thing.first)
            for index in range(1, len(head))
            for thing in clip.scene.objects
            if head[index - 1 : index + 1] == [self._color[thing.color], self._shape[thing.shape]]
        ]
        (_, first), (place, second) = named
        return Comparison(row, start + place, second > first)

    def findings(self, clip: Clip, question: Question, head: list[int], row: int, start: int) -> Iterator[Finding]:
        """What the tokens of a question should know: a name the size of its object and, where they are asked for, its
        direction and how often it appears; the last token of name and time the place; the token that predicts an answer
        the same."""
        for index, thing in self._names(clip, head):
            knows: dict[FindingKind, tuple[int, tuple[float, ...]]] = {}
            knows["size"] = index, (_sign(thing.size == "big"),)
            if question.task == "times":
                knows["times"] = index, (_sign(len(thing.intervals) > 1),)
            if question.task == "direction":
                knows["direction"] = index, _moved(clip, thing, thing.last)
            if question.task == "place":
                frame, later = self._when(clip, question, head)
                knows["place"] = max(index, later), _from_middle(clip, thing.position(frame))
            for kind, (place, values) in knows.items():
                yield Finding(kind, row, start + place, values)
                if kind == question.task:
                    yield Finding(kind, row, start + len(head) - 1, values, answers=True)

    def _names(self, clip: Clip, head: list[int]) -> Iterator[tuple[int, SceneObject]]:
        """Where the names of objects end in `head`."""
        for thing in clip.scene.objects:
            pair = [self._color[thing.color], self._shape[thing.shape]]
            for index in range(1, len(head)):
                if head[index - 1 : index + 1] == pair:
                    yield index, thing

    def _when(self, clip: Clip, question: Question, head: list[int]) -> tuple[int, int]:
        """The frame that a question names by its time, and where that time ends in `head`."""
        named = _TIME.search(question.text)
        assert named is not None, "a question about a place names a time"
        place = max(index for index, token in enumerate(head) if token in self._tenths)
        return clip.timestamps.index(float(named[1])), place

    def of_answer(
        self, clip: Clip, layout: TrunkLayout, question: Question, reply: str, tail: list[int], row: int, start: int
    ) -> Iterator[Pointer]:
        """Pointers of the tokens that predict `tail`, those of `reply`, the first of which is tail position `start`."""
        times = [float(text) for text in _TIME.findall(reply)]
        places = [index for index, token in enumerate(tail) if token in self._tenths]
        if len(times) == len(places):
            for number, (seconds, index) in enumerate(zip(times, places, strict=True)):
                is_end = question.task == "end" or (number % 2 == 1 and question.task not in ("count", "order"))
                frame = clip.timestamps.index(seconds)
                spans = (layout.span(frame, int(is_end)),)
                for place in (start + index - 1, start + index):
                    yield Pointer("end" if is_end else "start", row, place, frame, spans)
        if question.task == "order" and not times:
            first = min(thing.first for thing in clip.scene.objects if thing.name in question.text)
            for index in range(len(tail) - 1):
                yield Pointer("start", row, start + index, first, (layout.span(first),))
        if question.task == "read":
            yield from self._of_text(clip, layout, tail, row, start)

    def _of_text(self, clip: Clip, layout: TrunkLayout, tail: list[int], row: int, start: int) -> Iterator[Pointer]:
        """Pointers of the tokens that spell the clip's text: one a letter; a number is one token of all its digits."""
        text = clip.scene.text
        assert text is not None, "only clips with text have questions about it"
        frames = [frame for first, last in text.intervals for frame in range(first, last + 1)]
        width, height = clip.scene.canvas
        line = int(text.middle * (layout.cells // layout.columns) / height) * layout.columns
        cells = [line + int(center * layout.columns / width) for center in text.centers]
        spelled = [[cell] for cell in cells] if len(tail) == len(cells) + 1 else [cells]
        for index, parts in enumerate(spelled):
            spans = tuple((layout.visual(frame) + cell, layout.visual(frame) + cell + 1)
                          for frame in frames for cell in parts)  # fmt: skip
            yield Pointer("letter", row, start + index, frames[0], spans)
