"""Which format a row has, by the names of its fields alone: no set needs to be registered."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from keye.data.files.lists import KEY
from keye.data.files.rows import Row
from keye.data.formats import conversations, grounding, pretraining
from keye.data.formats.context import Context, rename
from keye.data.formats.media import OPTIONS
from keye.data.formats.talk import Talk, build_sample
from keye.data.samples import BadRow, Sample
from keye.errors import KeyeError, closest

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
    "start_time": "name it video_start", "end_time": "name it video_end", "start": "name it video_start",
    "end": "name it video_end", "video_max_token_num": "give max_pixels",
    "margin": "margins of preferences are not learnt", "kto_tag": "labels of single replies (KTO) are not learnt",
    "loss_scale": "give messages a loss of true or false", "positive_messages": "embeddings are not trained",
    "negative_messages": "embeddings are not trained",
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """A way to write a sample down. A row has it that has one of each group of names in `needs`; those in `aliases`
    then take ours."""

    name: str
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[Mapping[str, Any], Context], Talk]
    knows: frozenset[str] = frozenset()
    aliases: tuple[tuple[str, str], ...] = ()


_TALK: Final = conversations.SHARED
_MESSAGES: Final = (("conversations", "messages"), ("conversation", "messages"), ("dialog", "messages"))
_ANSWERS: Final = (("question", "query"), ("answer", "response"))
_MOMENT: Final = frozenset({"task", *grounding.UNUSED, *OPTIONS})
FORMATS: Final = (
    Format("preference", (("chosen",), ("rejected",), ("instruction",)), conversations.read_instruction,
           _TALK | {"input", "history"}),
    Format("preference", (("chosen",), ("rejected",)), conversations.read_preference,
           _TALK | {"prompt", "messages"}, _MESSAGES),
    Format("messages", (("messages",),), conversations.read_messages, _TALK),
    Format("ShareGPT", (("conversations", "conversation", "dialog"),), conversations.read_messages, _TALK, _MESSAGES),
    Format("query and response", (("response",),), conversations.read_response, _TALK | {"query", "history"}),
    Format("query and response", (("question",), ("answer",)), conversations.read_response, _TALK | {"history"},
           _ANSWERS),
    Format("Alpaca", (("instruction",), ("output",)), conversations.read_instruction, _TALK | {"input", "history"}),
    Format("moments", (grounding.VIDEOS, grounding.EVENTS, (*grounding.SPANS, "start")), grounding.read_moment,
           _MOMENT | {"end"}),
    Format("interleaved", (("texts",),), pretraining.read_interleaved, _TALK),
    Format("texts and captions", (("text", "caption"),), pretraining.read_text, _TALK),
)  # fmt: skip
CHARADES: Final = Format("Charades-STA", (("text",),), grounding.read_charades)
#: Other names of the medium of a row.
_MEDIA: Final[dict[str, str]] = {
    "image_path": "image", "image_file": "image", "img": "image", "img_path": "image", "picture": "image",
    "video_path": "video", "video_file": "video", "vid_path": "video",
}  # fmt: skip
#: Our names, to which columns may be mapped; "ignore" drops one.
OURS: Final = frozenset({"ignore", "file_name", "events", *_MEDIA}).union(
    *(known.knows | {name for group in known.needs for name in group} for known in FORMATS),
    *({name for name, _ in known.aliases} for known in FORMATS), *grounding.PAIRED,
)  # fmt: skip


@lru_cache(maxsize=4096)
def find_format(names: tuple[str, ...]) -> Format | None:
    """The format of a row with these fields."""
    present = frozenset(names)
    return next((known for known in FORMATS if all(present.intersection(group) for group in known.needs)), None)


def name_fields(fields: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """The fields of a row that have a value, under our names."""
    return rename_fields(context.prepare(fields) if context.prepare is not None else fields, context.columns)


def rename_fields(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The fields that have a value, with the columns renamed."""
    return {name: value for name, value in rename(fields, columns).items() if value is not None}


def convert(row: Row, context: Context) -> Sample:
    """The sample of a row. Raises `BadRow` for one that cannot be learnt from."""
    fields = pretraining.by_file_name(name_fields(row.fields, context))
    known = find_format(tuple(fields))
    if known is None:
        raise BadRow(explain_unknown(fields))
    if context.charades and tuple(fields) == ("text",):
        known = CHARADES
    if known.read is not grounding.read_moment:
        for name in fields.keys() & _MEDIA.keys():
            kind = _MEDIA[name]
            if not fields.get(kind) and not fields.get(f"{kind}s"):
                fields[kind] = fields.pop(name)
    check_unknown(fields, known, context)
    if known.aliases:
        fields = rename(fields, {theirs: ours for theirs, ours in known.aliases if theirs in fields})
    return build_sample(known.read(fields, context), row, context)


def explain_unknown(fields: Mapping[str, Any]) -> str:
    """Why no format fits a row with these fields."""
    names = ", ".join(sorted(map(str, fields))[:12]) or "none"
    return f"no known format has the fields {names}; name those that you mean with columns, such as messages=dialogue"


def check_unknown(fields: Mapping[str, Any], known: Format, context: Context) -> None:
    """Notes fields that change nothing; `BadRow` for those that would."""
    harmless, fault = _judge_unknown(tuple(fields), known)
    if fault is not None:
        raise BadRow(fault)
    for name in harmless:
        if name == "label" and isinstance(fields[name], bool):
            raise BadRow("labels of single replies (KTO) are not learnt; drop them with label=ignore among the columns")
        if _is_medium(fields[name]):
            raise BadRow(f"the field {name} holds a medium that is not read; name it with columns, as {name}=image, or "
                         f"drop it with {name}=ignore")  # fmt: skip
        context.notes.add(f"the field {name} is not used")


def _is_medium(value: Any) -> bool:
    """Whether the value of a field without meaning to us is the bytes of a medium."""
    if isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, bytes) or (isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes))


@lru_cache(maxsize=4096)
def _judge_unknown(names: tuple[str, ...], known: Format) -> tuple[tuple[str, ...], str | None]:
    groups = (name for group in known.needs for name in group)
    expected = known.knows | {*groups, *(theirs for theirs, _ in known.aliases)}
    harmless = []
    for name in names:
        if name in expected or name in ("id", KEY):
            continue
        if name in _MEANINGFUL:
            fault = f"the field {name} would change what is learnt and is not read: {_MEANINGFUL[name]}"
            return (), f"{fault}, or drop it with {name}=ignore among the columns"
        near = None if name.endswith(_HARMLESS) else closest(name, expected)
        if near is not None:
            return (), f"the field {name} is not known; did you mean {near}? {name}=ignore among the columns drops it"
        harmless.append(name)
    return tuple(harmless), None


def orient_columns(columns: Mapping[str, str], present: Collection[str], where: object) -> dict[str, str]:
    """Our names of columns by those of the file, which people give in either order: that of which rows have one is the
    file's. `KeyeError` for a column that no row has, and for a name that means nothing."""
    oriented: dict[str, str] = {}
    for first, second in columns.items():
        if first in present and second in OURS:
            oriented[first] = second
        elif second in present and first in OURS:
            oriented[second] = first
        elif first in present or second in present:
            theirs, ours = (first, second) if first in present else (second, first)
            near = closest(ours, OURS)
            fix = f"did you mean {near}?" if near else f"names are {', '.join(sorted(OURS))}"
            raise KeyeError(f"the column {theirs} of {where} is named {ours}, which means nothing; {fix}")
        else:
            theirs = second if first in OURS and second not in OURS else first
            raise KeyeError(f"no row of {where} has the column {theirs}; it has {', '.join(sorted(present)[:12])}")
    return oriented
