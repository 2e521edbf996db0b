"""A reply taken apart while it is written: reasoning, answer and calls of tools, piece by piece.

Cuts where `replies.parse_reply` cuts, in time linear in the text, and never takes back what it gave out. Knows no
transport.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from keye.chat.messages import to_json, tool_name
from keye.chat.replies import begins_call, read_call

#: The head of a call, up to where its arguments begin, as the models write it.
_HEAD: Final = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]{1,128})"\s*,\s*"arguments"\s*:\s*(?=\{)')
#: Marks in replies; each begins with "<" and has no other, upon which the search for them rests.
_OPEN_CALL: Final = "<tool_call>"
_CLOSE_CALL: Final = "</tool_call>"
#: First characters of a call; a "<" alone may be text.
_CUT_CALLS: Final = frozenset(_OPEN_CALL[:length] for length in range(2, len(_OPEN_CALL) + 1))
#: A head that is not complete within this many characters is read with the whole call.
_MAX_HEAD: Final = 512
#: A call whose end does not come within this many characters is text.
_MAX_CALL: Final = 65536
_REASONING: Final = {"<think>": "</think>", "<analysis>": "</analysis>"}
_WRAPPING: Final = ("<answer>", "</answer>")

Kind = Literal["reasoning", "content", "call", "arguments"]


@dataclass(frozen=True)
class ReplyPiece:
    """What has been added to a reply: `text` of the reasoning or of the answer; the name of a new call (`call`), or
    some more of the JSON text of its arguments. `index` counts the calls of the reply."""

    kind: Kind
    text: str
    index: int = 0


class ReplyStream:
    """Takes the text of one reply in any pieces. `tools` says whether calls are looked for; `reasoning` that the prompt
    has opened the reasoning block. White space around reasoning and answer is left out, but for that before a reply
    which `continues` a text of the prompt."""

    def __init__(self, *, tools: bool = False, reasoning: bool = False, continues: bool = False) -> None:
        self._tools = tools
        self._pending = ""
        self._blank = {"reasoning": "", "content": ""}
        self._begun = {"reasoning": False, "content": continues and not reasoning}
        self._close = "</think>" if reasoning else ""
        self._mode = self._reasoning if reasoning else self._content if continues else self._start
        self._arguments = _Arguments()
        self._searched = 0
        self._ended = False
        self.calls = 0

    @property
    def reasons(self) -> bool:
        """Whether the reply is inside its reasoning."""
        return self._mode == self._reasoning

    def push(self, text: str) -> list[ReplyPiece]:
        """Adds text; returns what is certain now."""
        self._pending += text
        return self._run()

    def finish(self) -> list[ReplyPiece]:
        """The reply has ended: returns what was held back."""
        self._ended = True
        pieces = self._run()
        if self._mode == self._whole_call or self._mode == self._head:
            pieces += self._call_of(self._pending, closed=False)
        elif self._mode == self._content and self._tools and self._pending in _CUT_CALLS:
            pass
        elif self._mode not in (self._call_arguments, self._tail):
            pieces += self._emit_text("reasoning" if self._mode == self._reasoning else "content", self._pending)
        self._pending = ""
        return pieces

    def _run(self) -> list[ReplyPiece]:
        pieces: list[ReplyPiece] = []
        while True:
            mode, before = self._mode, len(self._pending)
            pieces += mode()
            if self._mode == mode and len(self._pending) == before:
                return pieces

    def _start(self) -> list[ReplyPiece]:
        """Before anything but white space: a block of reasoning may come."""
        rest = self._pending.lstrip()
        for opening, closing in _REASONING.items():
            if rest.startswith(opening):
                self._pending, self._close, self._mode = rest[len(opening) :], closing, self._reasoning
                return []
        if self._ended or (rest and not any(opening.startswith(rest) for opening in _REASONING)):
            self._mode = self._content
        return []

    def _reasoning(self) -> list[ReplyPiece]:
        inside, closed, rest = self._pending.partition(self._close)
        if closed:
            pieces = self._emit_text("reasoning", inside)
            self._pending, self._mode = rest, self._start
            self._blank["reasoning"] = "\n\n" if self._begun["reasoning"] else ""
            return pieces
        return self._emit_text("reasoning", self._take(self._close))

    def _content(self) -> list[ReplyPiece]:
        if "<" not in self._pending:  # most of the time: every mark begins so
            text, self._pending = self._pending, ""
            return self._emit_text("content", text) if text else []
        marks = (*_WRAPPING, _OPEN_CALL, _CLOSE_CALL) if self._tools else _WRAPPING
        first_mark = min(((at, mark) for mark in marks if (at := self._pending.find(mark)) >= 0), default=None)
        if first_mark is None:
            return self._emit_text("content", self._take(*marks))
        at, mark = first_mark
        pieces = self._emit_text("content", self._pending[:at])
        self._pending = self._pending[at + len(mark) :]
        if mark == _OPEN_CALL:
            self._mode = self._head
        return pieces

    def _head(self) -> list[ReplyPiece]:
        """Inside a call: its name, if the text begins as models write it."""
        match = _HEAD.match(self._pending)
        if match is not None and _callable(match.group(1)):
            self._pending, self._mode = self._pending[match.end() :], self._call_arguments
            self._arguments = _Arguments()
            self.calls += 1
            return [ReplyPiece("call", match.group(1), self.calls - 1)]
        if (
            match is not None
            or len(self._pending) > _MAX_HEAD
            or _CLOSE_CALL in self._pending
            or _OPEN_CALL in self._pending
        ):
            self._mode, self._searched = self._whole_call, 0
        return []

    def _call_arguments(self) -> list[ReplyPiece]:
        """Inside the arguments: their JSON text as it comes, to its closing bracket."""
        end = self._arguments.end(self._pending)
        text, self._pending = self._pending[:end], self._pending[end:]
        if self._arguments.closed:
            self._mode = self._tail
        return [ReplyPiece("arguments", text, self.calls - 1)] if text else []

    def _tail(self) -> list[ReplyPiece]:
        """After the arguments: nothing counts up to the end of the call."""
        _, closed, rest = self._pending.partition(_CLOSE_CALL)
        if closed:
            self._pending, self._mode = rest.lstrip("\n"), self._content
        else:
            self._take(_CLOSE_CALL)
        return []

    def _whole_call(self) -> list[ReplyPiece]:
        """A call in another order: read when it is complete, or text if it is none. Its marks are never text."""
        ends = [
            (at, mark) for mark in (_CLOSE_CALL, _OPEN_CALL) if (at := self._pending.find(mark, self._searched)) >= 0
        ]
        if not ends:
            self._searched = max(0, len(self._pending) - len(_CLOSE_CALL) + 1)
            if len(self._pending) > _MAX_CALL:
                text, self._pending, self._mode = self._pending, "", self._content
                return self._emit_text("content", text)
            return []
        at, mark = min(ends)
        body, self._pending = self._pending[:at], self._pending[at + len(mark) :]
        self._mode, self._searched = (self._content if mark == _CLOSE_CALL else self._head), 0
        return self._call_of(body, closed=mark == _CLOSE_CALL)

    def _call_of(self, body: str, *, closed: bool) -> list[ReplyPiece]:
        """The pieces of a call as a whole; of one that is none its text, unless it was cut off."""
        call = read_call(body)
        if call is None:
            return self._emit_text("content", body) if closed or not begins_call(body) else []
        self.calls += 1
        name, arguments = call.name, to_json(call.arguments)
        return [ReplyPiece("call", name, self.calls - 1), ReplyPiece("arguments", arguments, self.calls - 1)]

    def _take(self, *marks: str) -> str:
        """The held text but for an end that may be the beginning of a mark."""
        cut = self._pending.find("<", max(0, len(self._pending) - max(map(len, marks)) + 1))
        while cut >= 0 and not any(mark.startswith(self._pending[cut:]) for mark in marks):
            cut = self._pending.find("<", cut + 1)
        if cut < 0:
            cut = len(self._pending)
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return text

    def _emit_text(self, kind: Literal["reasoning", "content"], text: str) -> list[ReplyPiece]:
        """`text` without the white space at the beginning and, until more comes, at the end."""
        text = self._blank[kind] + text
        if not self._begun[kind]:
            text = text.lstrip()
        visible = text.rstrip()
        self._blank[kind] = text[len(visible) :]
        if not visible:
            return []
        self._begun[kind] = True
        return [ReplyPiece(kind, visible)]


class _Arguments:
    """Follows the brackets of a JSON object that comes in pieces, each character once."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped, self.closed = 0, False, False, False

    def end(self, text: str) -> int:
        """How much of `text` belongs to the object; sets `closed` at its last bracket."""
        for at, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = character == "\\", character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.closed = True
                    return at + 1
        return len(text)


def _callable(name: str) -> bool:
    try:
        return bool(tool_name("tool_call", name))
    except ValueError:
        return False
