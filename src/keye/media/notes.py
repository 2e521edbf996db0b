"""Notes about a medium: what a user should know where what is used differs from what the container declares.

A note is one sentence about one medium, without its name. `VideoInfo.notes` holds those of a file; making a plan emits
each once as a `KeyeWarning`, by which Python, the command line, HTTP and batches get it, and keeps it in the plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from keye.errors import KeyeWarning, warn

#: Seconds by which times may differ without a note: they are shown with one decimal.
VISIBLE = 0.1


@dataclass(frozen=True)
class Note:
    """A sentence with `{}` for each of `parts`: texts, or `Option`s, which each interface spells in its own way."""

    sentence: str
    parts: tuple[object, ...] = ()

    def __str__(self) -> str:
        return str(KeyeWarning(self.sentence, *self.parts))

    def warning(self, name: str) -> KeyeWarning:
        """The note as a warning about the medium `name`."""
        return KeyeWarning("{}: " + (self.sentence if self.parts else "{}"), name, *(self.parts or (self.sentence,)))


def emit(name: str, notes: Iterable[Note], *, stacklevel: int = 2) -> None:
    """Warns of each note about the medium `name`."""
    for note in notes:
        warn(note.warning(name), stacklevel=stacklevel + 1)
