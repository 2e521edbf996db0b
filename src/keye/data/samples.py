"""What training learns from: conversations and plain texts with their media, each with the place that it came from.

Knows no file format (`keye.data.files`) and no way to write a conversation down (`keye.data.formats`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from keye.chat.messages import Medium, Message
from keye.errors import KeyeError

#: How a sample asks for reasoning; None leaves it to the configuration.
MODES: Final = ("think", "no_think", "auto", "image", "video")


@dataclass(frozen=True)
class Place:
    """Where a sample stands: a file, and the line at which it begins, from 1 on. In files without lines (parquet, tar,
    a JSON list on a single line) the number of the row."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Sample:
    """A conversation, or with `plain` a text with media that no chat template goes around.

    `learn` says for each message whether its tokens are learnt. `rejected` is the reply that lost against the last
    message, where preferences are learnt. `tools` are the functions offered, as `normalize_tools` returns them. `mode`
    is one of MODES; `task` names the kind of question, for figures; `weight` multiplies the loss of its tokens.
    """

    messages: tuple[Message, ...]
    learn: tuple[bool, ...]
    place: Place
    rejected: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    mode: str | None = None
    task: str | None = None
    weight: float = 1.0
    plain: bool = False

    @property
    def media(self) -> tuple[Medium, ...]:
        """Images and videos in their order."""
        return tuple(part for message in self.messages for part in message.parts if isinstance(part, Medium))


@dataclass(frozen=True)
class Skip:
    """A row that cannot be learnt from, and why."""

    place: Place
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class BadRow(KeyeError):
    """A row that cannot be learnt from. The sentence says what is wrong with it and not where it stands."""
