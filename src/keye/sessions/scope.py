"""What a small model knows, held against a question and a video: notes, so that no guess passes for an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from keye.chat.template import Segment
from keye.config.model import Scope
from keye.errors import ScopeWarning, warn
from keye.moments import FindNote
from keye.units import listed

#: Seconds between frames from which on what is short may lie between them.
WIDE: Final = 2.5
_WORD: Final = re.compile(r"[^\W\d_]+")


def scope_notes(scope: Scope | None, question: str) -> list[FindNote]:
    """The note on words that a model does not know, or another language than its own; none for models without a scope.
    Words in capital letters are taken for text in the picture."""
    if scope is None or not scope.words:
        return []
    words = [word for word in _WORD.findall(question) if not (word.isascii() and word.isupper())]
    foreign = [word for word in words if not word.isascii()]
    unknown = list(dict.fromkeys(word for word in words if word.lower() not in scope.words))
    if not unknown:
        return []
    if foreign or (len(words) > 2 and len(unknown) == len(words)):
        text = f"the question is in a language that the model does not know. {scope.text}"
    else:
        text = f"the model does not know {listed([repr(word) for word in unknown])}. {scope.text}"
    return [FindNote("scope", text, "question")]


def question_notes(scope: Scope | None, segments: Sequence[Segment]) -> list[FindNote]:
    """`scope_notes` of what a rendered prompt asks last."""
    texts = [str(segment.value) for segment in segments if segment.kind == "text"]
    return scope_notes(scope, texts[-1]) if texts else []


def length_notes(scope: Scope | None, plans: Sequence[Mapping[str, Any]]) -> list[FindNote]:
    """The note on a video of more frames than a model was measured on, or of frames so far apart that what is short may
    lie between them; it names `keye find`."""
    notes = []
    for plan in plans:
        times: Sequence[float] = plan.get("timestamps") or ()
        if len(times) < 2:
            continue
        most = None if scope is None else scope.frames
        spacing = (times[-1] - times[0]) / (len(times) - 1)
        if most is not None and len(times) > most:
            reason = f"{len(times):,} frames are more than the {most} that the model was measured on"
        elif spacing > WIDE:
            reason = f"frames {spacing:.1f} s apart may miss what lasts less"
        else:
            continue
        notes.append(FindNote("length", f"{reason}: keye find looks for a moment in all of a long video", "file"))
    return notes[:1]


def warn_scope(notes: Sequence[FindNote]) -> None:
    """Gives notes on the scope as warnings."""
    for note in notes:
        warn(ScopeWarning("{}", note.text), stacklevel=3)
