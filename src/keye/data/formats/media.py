"""The media of a row: from names, bytes and options to `Medium` parts at the places that the texts mark."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final
from urllib.parse import unquote

from keye.chat.messages import Medium
from keye.config.media import IMAGE_OPTIONS, VIDEO_OPTIONS, MediumKind, media_options
from keye.data.files.rows import Row
from keye.data.formats.context import Context
from keye.data.samples import BadRow
from keye.errors import KeyeError, brief, is_number
from keye.media.source.fetch import MAX_IMAGE_BYTES, MAX_VIDEO_BYTES, Source
from keye.units import plural

KINDS: Final[tuple[MediumKind, ...]] = ("image", "video")
#: Fields of a row that are options of its media; a list has one for each medium.
OPTIONS: Final = (VIDEO_OPTIONS | IMAGE_OPTIONS) - {"strict_official"}
#: Names of the source inside an object that is a medium.
_SOURCES: Final = ("path", "image", "video", "url", "file", "image_url", "video_url", "bytes")
_TAG: Final = re.compile("<(image|video|audio)>")
_ADDRESS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
#: Media of one row, and pictures of one list.
MAX_MEDIA: Final = 4096
MAX_FRAMES: Final = 65_536

Parts = tuple[Any, ...]


@dataclass(frozen=True)
class Slot:
    """A place for the next medium of a kind, marked by a part without a source."""

    kind: MediumKind


@dataclass(frozen=True)
class MediaFields:
    """The media of a row as it names them, by kind, and the options that stand beside them."""

    images: Sequence[Any] = ()
    videos: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> MediaFields:
        """Those of a row with the fields image, images, video, videos and options of media. Audio is an error."""
        for name in ("audio", "audios"):
            if fields.get(name):
                raise BadRow(f"the row has {name}, which Keye does not hear; leave it out")
        return cls(
            _listed("image", fields),
            _listed("video", fields),
            {name: fields[name] for name in fields.keys() & OPTIONS if fields[name] is not None},
        )

    def entries(self, kind: MediumKind) -> Sequence[Any]:
        """The media of one kind, in their order."""
        return self.images if kind == "image" else self.videos

    def options_of(self, kind: MediumKind, index: int) -> dict[str, Any]:
        """The options beside the medium that are for it: a list has one for each medium of its kind."""
        count, options = len(self.entries(kind)), {}
        known = IMAGE_OPTIONS if kind == "image" else VIDEO_OPTIONS
        for name, value in self.options.items():
            if name not in known:
                if not (kind == "image" and self.videos):
                    raise BadRow(f"{name} is an option of videos, and the row has images alone")
                continue
            if name == "timestamps" and not isinstance(value, list | tuple):
                raise BadRow(f"timestamps is {brief(value)}; give a list of seconds")
            per_medium = name == "timestamps" and any(isinstance(times, list | tuple) for times in value)
            if isinstance(value, list | tuple) and (per_medium or name != "timestamps"):
                if len(value) != count:
                    raise BadRow(f"{name} has {len(value)} entries and the row {count} {kind}s; give one for each")
                value = value[index]
            if value is not None:
                options[name] = value
        return options


def _listed(kind: str, fields: Mapping[str, Any]) -> Sequence[Any]:
    """The media of one kind, which a row may name in the singular or the plural, alone or in a list."""
    values = [fields[name] for name in (kind, f"{kind}s") if fields.get(name) not in (None, "", [])]
    if not values:
        return ()
    if len(values) == 2:
        raise BadRow(f"the row has both {kind} and {kind}s; give one of them")
    value = values[0]
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        value = read_json(kind, value)  # tables may hold lists as their JSON text
    entries = value if isinstance(value, list | tuple) else [value]
    if len(entries) > MAX_MEDIA:
        raise BadRow(f"the row has {len(entries):,} {kind}s, more than {MAX_MEDIA:,}")
    return entries


def read_json(name: str, text: str) -> Any:
    """The value of a field that is JSON text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRow(f"{name} is not valid JSON: {brief(text)}") from None


def make_medium(kind: MediumKind, entry: Any, options: Mapping[str, Any], row: Row, context: Context) -> Medium:
    """A medium with its options checked. `entry` is a path, an address, bytes, an object of one of these and options,
    or for a video a list of pictures."""
    if isinstance(entry, Mapping):
        entry, inner = _take_apart(kind, entry)
        if repeated := sorted(options.keys() & inner.keys()):
            raise BadRow(f"{repeated[0]} stands beside the {kind} and inside it; give it once")
        options = {**options, **inner}
    if isinstance(entry, list | tuple):
        if kind == "image":
            raise BadRow("an image is a list; lists of pictures are videos")
        source: Any = _frames(entry, options, row, context)
    else:
        source = find_source(kind, entry, row, context)
        if "timestamps" in options:
            raise BadRow("timestamps stand beside a video file, which has its own; give them with lists of pictures")
    return Medium(kind, source, check_options(kind, options))


def _take_apart(kind: MediumKind, entry: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Source and options of an object that is a medium."""
    values = {name: value for name, value in entry.items() if value is not None and name != "type"}
    names = [name for name in _SOURCES if name in values]
    if names[-1:] == ["bytes"] and values["bytes"]:  # datasets: {"bytes": ..., "path": its name}
        names, values = ["bytes"], {name: value for name, value in values.items() if name != "path"}
    if len(names) != 1:
        fault = f"two sources: {' and '.join(names)}" if names else "no path"
        raise BadRow(f"the {kind} is an object with {fault}")
    source = values.pop(names[0])
    if isinstance(source, Mapping):  # {"image_url": {"url": ...}}
        inner, more = _take_apart(kind, source)
        return inner, {**values, **more}
    known = IMAGE_OPTIONS if kind == "image" else VIDEO_OPTIONS
    if unknown := sorted(values.keys() - known):
        raise BadRow(f"the {kind} has the unknown field {brief(unknown[0])}; known are {', '.join(sorted(known))}")
    return source, values


def _frames(entry: Sequence[Any], options: Mapping[str, Any], row: Row, context: Context) -> list[Any]:
    if not entry or len(entry) > MAX_FRAMES:
        raise BadRow(f"the list of pictures has {len(entry):,} entries; a video has 1 to {MAX_FRAMES:,}")
    times = options.get("timestamps")
    if times is not None and (not isinstance(times, list | tuple) or len(times) != len(entry)):
        count = len(times) if isinstance(times, list | tuple) else brief(times)
        raise BadRow(f"{len(entry)} pictures have {count} timestamps; give one for each")
    if times is None and "fps" not in options:
        context.notes.add("lists of pictures have neither fps nor timestamps: the model is not shown their times")
    return [find_source("image", picture, row, context) for picture in entry]


def find_source(kind: MediumKind, name: Any, row: Row, context: Context) -> Any:
    """What a name in a row stands for: an absolute path that is there, an address, or a `Source`."""
    if isinstance(name, Mapping):
        name, options = _take_apart(kind, name)
        if options:
            raise BadRow(f"{sorted(options)[0]} stands inside a list of pictures; give it beside the list")
    if isinstance(name, bytes | bytearray | memoryview):
        most = MAX_IMAGE_BYTES if kind == "image" else MAX_VIDEO_BYTES
        if not 0 < len(name) <= most:
            raise BadRow(f"the {kind} in the row has {len(name):,} bytes, and 1 to {most:,} are read")
        return Source(f"{kind} of {row.place}", len(name), data=bytes(name))
    if not isinstance(name, str) or not name.strip():
        raise BadRow(f"the {kind} is {brief(name)}; give a path or an address")
    if row.members:
        if name not in row.members:
            raise BadRow(f"{name[:200]} is not in the archive under the row's name")
        return row.members[name]
    if name[:5].lower() == "file:":
        name = unquote(name[5:].removeprefix("//").removeprefix("localhost"))
    elif _ADDRESS.match(name) and not context.paths.exists(os.path.join(context.root, name)):
        return name
    path = os.path.join(context.root, name)
    context.paths.check(path)
    return path


def check_options(kind: MediumKind, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, if they are right for a medium of this kind. `BadRow` names the field at fault."""
    if not options:
        return {}
    timestamps = options.get("timestamps")
    plain = {name: value for name, value in options.items() if name != "timestamps"}
    try:
        if timestamps is not None:
            media_options(kind, {"timestamps": timestamps})
            options = {**plain, "timestamps": tuple(map(float, timestamps))}
        _check_plain(kind, tuple((name, type(value), value) for name, value in sorted(plain.items())))
    except KeyeError as error:
        raise BadRow(str(error)) from None
    except TypeError:
        raise BadRow(f"an option of the {kind} is not a number: {brief(plain)}") from None
    return dict(options)


@lru_cache(maxsize=4096)
def _check_plain(kind: MediumKind, items: tuple[tuple[str, type, Any], ...]) -> None:
    options = {name: value for name, _, value in items}  # the type is part of what is remembered: 1 and True are equal
    for name, value in options.items():
        if name not in ("adaptive_budget", "deinterlace", "tone_map", "strict_media") and not is_number(value):
            raise KeyeError(f"{name} is {brief(value)}; give a number")
    media_options(kind, options)
    start, end = options.get("video_start", 0), options.get("video_end")
    if start < 0 or (end is not None and end <= start):
        raise KeyeError(f"video_start is {start} and video_end {end}; the part must begin at 0 or later and end after "
                        "it begins")  # fmt: skip


def place_media(contents: Sequence[tuple[str, Parts]], fields: MediaFields, row: Row, context: Context) -> list[Parts]:
    """The parts of every message with the media of the row in them. `contents` are roles and parts: texts, media and
    slots.

    Media stand where tags and slots are, in their order; those of users, systems and tools count, those of assistants
    only where the numbers agree no otherwise. Without any, media come first in the first message of the user.
    """
    counts = _count_tags(contents)
    if not fields.images and not fields.videos and not counts:
        return [parts for _, parts in contents]
    tags, first = _match_tags(counts, fields, context, is_conversation=len(contents) > 1)
    used = dict.fromkeys(KINDS, 0)

    def take(kind: MediumKind) -> Medium:
        index = used[kind]
        used[kind] += 1
        return make_medium(kind, fields.entries(kind)[index], fields.options_of(kind, index), row, context)

    placed = [_fill(parts, tags[role == "assistant"], take) for role, parts in contents]
    if first:
        index = next((i for i, (role, _) in enumerate(contents) if role == "user"), 0)
        media = tuple(take(kind) for kind in first for _ in fields.entries(kind))
        placed[index] = (*media, *placed[index])
    return placed


def _count_tags(contents: Sequence[tuple[str, Parts]]) -> Counter[tuple[str, str]]:
    """How often each kind of medium is marked: by ("tag", kind), ("reply", kind) in replies, and ("slot", kind)."""
    counts = Counter[tuple[str, str]]()
    for role, parts in contents:
        for part in parts:
            if isinstance(part, Slot):
                counts["slot", part.kind] += 1
            elif isinstance(part, str) and "<" in part:
                counts.update(("reply" if role == "assistant" else "tag", name) for name in _TAG.findall(part))
    return counts


def _match_tags(
    counts: Counter[tuple[str, str]], fields: MediaFields, context: Context, *, is_conversation: bool
) -> tuple[dict[bool, dict[str, MediumKind]], list[MediumKind]]:
    """Which tags stand for which kind of medium, in replies (True) and elsewhere, and the kinds without any mark."""
    tags: dict[bool, dict[str, MediumKind]] = {False: {}, True: {}}
    first: list[MediumKind] = []
    if counts["tag", "audio"]:
        raise BadRow("the text has an <audio> tag, and Keye does not hear")
    marked = counts["tag", "video"] + counts["slot", "video"]
    if not fields.images and counts["tag", "image"] == len(fields.videos) > 0 == marked:
        context.notes.add("<image> tags stand for videos, where a row has videos alone")
        tags[False]["image"] = "video"
        return tags, first
    for kind in KINDS:
        media, slots, marks = len(fields.entries(kind)), counts["slot", kind], counts["tag", kind]
        if slots == media:
            continue
        if slots + marks == media:
            tags[False][kind] = kind
        elif slots + marks + counts["reply", kind] == media:
            tags[False][kind] = tags[True][kind] = kind
        elif not slots + marks + counts["reply", kind]:
            first.append(kind)
            if is_conversation:
                context.notes.add(f"texts have no <{kind}> tag: {kind}s come first")
        else:
            raise BadRow(f"the texts mark {plural(slots + marks, kind)} and the row has {media}; give a tag for each")
    for kind in KINDS:
        if not fields.entries(kind) and counts["tag", kind]:
            raise BadRow(f"the texts mark {plural(counts['tag', kind], kind)} and the row has none")
    return tags, first


def _fill(parts: Parts, tags: Mapping[str, MediumKind], take: Callable[[MediumKind], Medium]) -> Parts:
    """The parts of a message with media in place of tags and slots. A line break between a text and media that all
    stand before it, or all after it, only kept them on lines of their own, and goes."""
    if all(isinstance(part, str) and (not tags or "<" not in part) for part in parts):
        return parts
    filled: list[Any] = []
    for part in parts:
        if isinstance(part, Slot):
            filled.append(take(part.kind))
            continue
        pieces = _TAG.split(part) if isinstance(part, str) and tags else [part]
        for index, piece in enumerate(pieces):
            if index % 2 and piece in tags:
                filled.append(take(tags[piece]))
                continue
            text = f"<{piece}>" if index % 2 else piece
            if isinstance(text, str) and filled and isinstance(filled[-1], str) and len(pieces) > 1 and index:
                filled[-1] += text
            elif text != "":
                filled.append(text)
    return _without_breaks(filled)


def _without_breaks(parts: Sequence[Any]) -> Parts:
    texts = [i for i, part in enumerate(parts) if isinstance(part, str) and part.strip("\n")]
    media = [i for i, part in enumerate(parts) if not isinstance(part, str)]
    if not texts or not media or texts[0] < media[0] < texts[-1] or texts[0] < media[-1] < texts[-1]:
        return tuple(parts)
    if media[-1] < texts[0]:
        first = texts[0]
        return (*(parts[i] for i in media), parts[first].lstrip("\n"), *parts[first + 1 :])
    last = texts[-1]
    return (*parts[:last], parts[last].rstrip("\n"), *(parts[i] for i in media))
