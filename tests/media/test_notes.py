"""Notes about media: one sentence each, with options spelled by the interface that shows it."""

from __future__ import annotations

from keye.errors import Option
from keye.media.notes import Note


def test_options_of_a_note_are_spelled_by_each_interface() -> None:
    note = Note("track 1 of 2 is read; choose another with {}", (Option("track"),))
    assert str(note) == "track 1 of 2 is read; choose another with track"
    spelled = note.warning("a {b}.mp4").worded(lambda option: f"--{option.name}")
    assert spelled == "a {b}.mp4: track 1 of 2 is read; choose another with --track"


def test_braces_in_a_sentence_without_options_stand() -> None:
    assert str(Note("codec {x}").warning("a.mp4")) == "a.mp4: codec {x}"
