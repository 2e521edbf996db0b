"""The notes of one request: sentences on what was tolerated, and on settings that were not honoured."""

from __future__ import annotations

import warnings
from contextvars import ContextVar
from typing import Any, Final

from keye.errors import KeyeWarning
from keye.server.errors import spelled

#: Notes of one request.
_MOST: Final = 64
_notes: ContextVar[list[str] | None] = ContextVar("notes", default=None)
_unknown: ContextVar[set[str] | None] = ContextVar("unknown", default=None)


async def begin_notes() -> None:
    """A new list of notes, in the task that handles a request, before its body is read."""
    _notes.set([])
    _unknown.set(set())


def current_notes() -> list[str]:
    """The list of notes of the current request, which may still grow."""
    notes = _notes.get()
    if notes is None:
        notes = []
        _notes.set(notes)
    return notes


def noted() -> dict[str, Any]:
    """The notes of the current request as a field of its answer; nothing where there are none."""
    return {"keye": {"notes": list(notes)}} if (notes := current_notes()) else {}


def count_unknown(name: str) -> int:
    """How many different unknown names the current request has had, with this one."""
    names = _unknown.get()
    if names is None:
        return 1
    names.add(name)
    return len(names)


def add_note(sentence: str) -> None:
    """Adds to the notes of the current request; no effect outside a request."""
    notes = _notes.get()
    if notes is not None and len(notes) < _MOST and sentence not in notes:
        notes.append(sentence)


def collect_warnings() -> None:
    """From now on, warnings of settings that are not honoured are kept for the request they belong to. For the whole
    process: Python has one place for warnings."""
    warnings.simplefilter("always", KeyeWarning)
    usual = warnings.showwarning

    def keep(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if isinstance(message, KeyeWarning):
            add_note(message.worded(spelled))
        else:
            usual(message, category, *place, **more)

    warnings.showwarning = keep
