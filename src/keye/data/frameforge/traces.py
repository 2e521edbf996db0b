"""Reasoning that leads to the answer of a question: what one notes down on the way, in the words of the questions.

A trace names the evidence piece by piece and ends with what the answer is read from, so that the answer follows from
the trace alone. Knows no mode and no template: who trains thinking puts a trace between its marks.
"""

from keye.data.frameforge.questions import Question, format_intervals
from keye.data.frameforge.scene import Clip, SceneObject
from keye.data.frameforge.words import ALL_PAIRS

#: Tasks whose questions have a trace.
TRACED_TASKS = ("count", "count_at", "times", "order")


def trace(clip: Clip, question: Question) -> str:
    """The reasoning for a question about `clip`, "" for a task that is not in `TRACED_TASKS`.

    count: every object with its number and the time at which it first appears, in that order. count_at: every object
    that is visible then, numbered. times: each interval, numbered. order: both objects with their first time.
    """
    if question.task == "count":
        things = sorted(clip.scene.objects, key=lambda thing: (thing.first, _rank(thing)))
        return _number([f"{thing.name} {_time(clip, thing.first)}" for thing in things])
    if question.task == "count_at":
        frame = next(i for i, seconds in enumerate(clip.timestamps) if f" {seconds:.1f} s" in question.text)
        return _number([f"{thing.color_at(frame)} {thing.shape}" for thing in _sorted_visible(clip, frame)])
    if question.task == "times":
        (thing,) = _named(clip, question)
        spans = [(clip.timestamps[first], clip.timestamps[last]) for first, last in thing.intervals]
        return _number([format_intervals([span]) for span in spans])
    if question.task == "order":
        return "; ".join(f"{thing.name} {_time(clip, thing.first)}" for thing in _named(clip, question))
    return ""


def _number(items: list[str]) -> str:
    """`1 red circle 3.5; 2 blue star 7.0`, or "none"."""
    return "; ".join(f"{number} {item}" for number, item in enumerate(items, 1)) or "none"


def _named(clip: Clip, question: Question) -> list[SceneObject]:
    """The objects that a question names, in its order."""
    things = [thing for thing in clip.scene.objects if thing.name in question.text]
    return sorted(things, key=lambda thing: question.text.index(thing.name))


def _sorted_visible(clip: Clip, frame: int) -> list[SceneObject]:
    things = clip.scene.visible_objects(frame)
    return sorted(things, key=lambda thing: ALL_PAIRS.index((thing.color_at(frame), thing.shape)))


def _rank(thing: SceneObject) -> int:
    return ALL_PAIRS.index((thing.color, thing.shape))


def _time(clip: Clip, frame: int) -> str:
    return f"{clip.timestamps[frame]:.1f}"
