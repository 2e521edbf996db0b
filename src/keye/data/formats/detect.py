"""Which format a row has, by the names of its fields alone: no set needs to be registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from keye.data.files.rows import Row
from keye.data.formats import conversations
from keye.data.formats.context import Context, rename
from keye.data.formats.talk import Talk, build_sample
from keye.data.samples import BadRow, Sample
from keye.errors import closest

#: Fields that say where a row comes from and change nothing.
_HARMLESS: Final = ("_id", "_ids", "_path", "_name", "_type", "_url")
#: Fields of other programs that would change what is learnt, and what to do instead.
_MEANINGFUL: Final = {
    "video_fps": "name it fps", "sample_fps": "name it fps", "frame_rate": "name it fps",
    "fps_max_frames": "name it max_frames", "fps_min_frames": "name it min_frames",
    "video_maxlen": "name it max_frames",
    "num_frames": "name it nframes",
    "video_max_pixels": "name it max_pixels", "video_min_pixels": "name it min_pixels",
    "image_max_pixels": "name it max_pixels", "image_min_pixels": "name it min_pixels",
    "start_time": "name it video_start", "end_time": "name it video_end", "video_max_token_num": "give max_pixels",
    "margin": "margins of preferences are not learnt", "label": "labels of single replies (KTO) are not learnt",
    "kto_tag": "labels of single replies (KTO) are not learnt", "channel": "give sets weights instead",
    "loss_scale": "give messages a loss of true or false", "positive_messages": "embeddings are not trained",
    "negative_messages": "embeddings are not trained",
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """A way to write a sample down. A row has it that has all of `needs`, under these names or those of `aliases`."""

    name: str
    needs: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Talk]
    knows: frozenset[str] = frozenset()
    aliases: tuple[tuple[str, str], ...] = ()


_MESSAGES: Final = (("conversations", "messages"), ("conversation", "messages"))
_RESPONSE_ALIASES: Final = (("question", "query"), ("answer", "response"))
FORMATS: Final = (
    Format("preference", ("chosen", "rejected", "instruction"), conversations.read_instruction,
           conversations.SHARED | {"input", "history"}),
    Format("preference", ("chosen", "rejected"), conversations.read_preference,
           conversations.SHARED | {"prompt", "messages"}, _MESSAGES),
    Format("messages", ("messages",), conversations.read_messages, conversations.SHARED),
    Format("ShareGPT", ("conversations",), conversations.read_messages, conversations.SHARED,
           (("conversations", "messages"),)),
    Format("ShareGPT", ("conversation",), conversations.read_messages, conversations.SHARED,
           (("conversation", "messages"),)),
    Format("query and response", ("response",), conversations.read_response,
           conversations.SHARED | {"query", "history"}),
    Format("query and response", ("question", "answer"), conversations.read_response,
           conversations.SHARED | {"history"}, _RESPONSE_ALIASES),
    Format("Alpaca", ("instruction", "output"), conversations.read_instruction,
           conversations.SHARED | {"input", "history"}),
)  # fmt: skip


@lru_cache(maxsize=4096)
def find_format(names: tuple[str, ...]) -> Format | None:
    """The format of a row with these fields."""
    present = frozenset(names)
    return next((known for known in FORMATS if present.issuperset(known.needs)), None)


def convert(row: Row, context: Context) -> Sample:
    """The sample of a row. Raises `BadRow` for one that cannot be learnt from."""
    fields = {name: value for name, value in rename(row.fields, context.columns).items() if value is not None}
    known = find_format(tuple(fields))
    if known is None:
        raise BadRow(explain_unknown(fields))
    check_unknown(tuple(fields), known, context)
    if known.aliases:
        fields = rename(fields, dict(known.aliases))
    return build_sample(known.read(fields), row, context)


def explain_unknown(fields: Mapping[str, Any]) -> str:
    """Why no format fits a row with these fields."""
    names = ", ".join(sorted(map(str, fields))[:12]) or "none"
    return f"no known format has the fields {names}; name those that you mean with columns, such as messages=dialogue"


def check_unknown(names: tuple[str, ...], known: Format, context: Context) -> None:
    """Notes fields that change nothing; `BadRow` for those that would."""
    harmless, fault = _judge_unknown(names, known)
    if fault is not None:
        raise BadRow(fault)
    for name in harmless:
        context.notes.add(f"the field {name} is not used")


@lru_cache(maxsize=4096)
def _judge_unknown(names: tuple[str, ...], known: Format) -> tuple[tuple[str, ...], str | None]:
    expected = known.knows | {*known.needs, *(theirs for theirs, _ in known.aliases)}
    harmless = []
    for name in names:
        if name in expected:
            continue
        if name in _MEANINGFUL:
            return (), f"the field {name} would change what is learnt and is not read: {_MEANINGFUL[name]}"
        near = None if name == "id" or name.endswith(_HARMLESS) else closest(name, expected)
        if near is not None:
            return (), f"the field {name} is not known; did you mean {near}?"
        harmless.append(name)
    return tuple(harmless), None
