"""The messages of a request, in every form that clients send, to the messages of `keye.chat`; and the media in them to
files that may be opened.

Two steps. `to_messages` checks and converts, touches no file and is quick. `open_sources` finds uploads, decodes data
URLs and downloads what may be downloaded; it blocks and belongs into a thread. A path on the server is never opened.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, cast

from keye.chat.messages import Medium, Message, normalize
from keye.config.media import IMAGE_OPTIONS, VIDEO_OPTIONS, MediaOptions, MediumKind, media_options
from keye.errors import KeyeError
from keye.media.container.kinds import HEAD_BYTES, find_kind, is_image_format
from keye.media.source.fetch import Source, is_index, media_kind, parse_data_url
from keye.server.edge.errors import ApiError
from keye.server.library import LIBRARY
from keye.server.openai.fields import note_ignored, read_fields
from keye.server.openai.schemas import MediaDefaults
from keye.server.stores import MediaOpener, is_stored

#: Keys of messages that OpenAI's clients send back and that mean nothing in a prompt.
_IGNORED: Final = {
    "system": {"name"},
    "user": {"name"},
    "assistant": {"name", "refusal", "annotations", "audio", "function_call", "prefix", "partial"},
    "tool": set[str](),
}
#: Keys of messages, and of parts of messages that are media, that mean something.
_KEYS: Final = {"assistant": {"role", "content", "tool_calls"}, "tool": {"role", "content", "tool_call_id", "name"}}
_OTHER_KEYS: Final = {"role", "content"}
_PART_KEYS: Final = {"type", "image", "video", "image_url", "video_url", "preprocess_kwargs", *VIDEO_OPTIONS}
_INNER_KEYS: Final = {"url", "detail", "preprocess_kwargs", *VIDEO_OPTIONS}
#: Processors of transformers, whose arguments vLLM passes on, call some settings otherwise.
_PROCESSOR_NAMES: Final = {"num_frames": "nframes", "shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
_GROUPS: Final = ("size", "images_kwargs", "videos_kwargs")
#: Keys by which a part without a type says what it is.
_KINDS: Final = ("text", "image_url", "video_url", "image", "video", "file", "input_image", "input_video")
_SOURCES: Final = ("file_id", "url", "data", "file_data", "image_url", "video_url", "file_url")
#: First bytes of a file in a data URL that are looked at.
_SEEN_BYTES: Final = 1 << 16
#: Keys of parts of text that replies have and that are sent back.
_FROM_REPLIES: Final = ("annotations", "logprobs", "prompt_cache_breakpoint", "cache_control")
_PLAIN_TEXT: Final = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def to_messages(
    messages: Sequence[Mapping[str, Any]], opener: MediaOpener, defaults: Mapping[str, Any] | None = None
) -> list[Message]:
    """The messages of a chat; `defaults` are settings of media that have none of their own. The sources of media are
    still what the client sent; `opener` only says what kind of medium an upload is."""
    plain = [_message(f"messages[{index}]", message, opener) for index, message in enumerate(messages)]
    count = next((i for i, message in enumerate(plain) if message.get("role") != "system"), len(plain))
    if count > 1:  # neighbouring messages of the system (and developer) at the beginning become one
        parts: list[Any] = []
        for message in plain[:count]:
            content = message.get("content")
            parts += ["\n\n"] if parts else []
            parts += content if isinstance(content, list) else [content]
        plain[:count] = [{"role": "system", "content": parts}]
    checked = normalize(plain)
    return _with_defaults(checked, defaults) if defaults else checked


def media_of(messages: Sequence[Message]) -> list[Medium]:
    """All media, in their order."""
    return [part for message in messages for part in message.parts if isinstance(part, Medium)]


def named_video(video: Mapping[str, Any], opener: MediaOpener, defaults: Mapping[str, Any] | None = None) -> Medium:
    """The one video of a body's field `video`: a part of a message, or only its file_id or url. Not opened yet."""
    if set(video) == {"library_id"}:
        video = {"file_id": f"{LIBRARY}{video['library_id']}"}
    if "type" not in video and ("file_id" in video or "url" in video):
        video = {"type": "input_video", "input_video": video}
    media = media_of(to_messages([{"role": "user", "content": [video]}], opener, defaults))
    if [medium.kind for medium in media] != ["video"]:
        raise ApiError(400, "video: give one video, as file_id, url, video_url or input_video", param="video")
    return media[0]


def open_video(
    video: Mapping[str, Any], opener: MediaOpener, defaults: Mapping[str, Any] | None = None
) -> tuple[Source, MediaOptions]:
    """The file of the one video that a body names, and its settings; `ApiError` for pictures in the place of a file, or
    an index. Blocks."""
    medium = open_medium(named_video(video, opener, defaults), opener)
    if not isinstance(medium.source, Source) or is_index(medium.source):
        raise ApiError(400, "video: give a video file here, not pictures and not an index", param="video")
    return medium.source, media_options("video", medium.options)


def open_sources(messages: Sequence[Message], opener: MediaOpener) -> list[Message]:
    """The same messages with files in the place of what the client named. Blocks."""
    return [
        replace(
            message,
            parts=tuple(open_medium(part, opener) if isinstance(part, Medium) else part for part in message.parts),
        )
        for message in messages
    ]


def open_medium(medium: Medium, opener: MediaOpener) -> Medium:
    """One medium with its file, or its list of pictures. Blocks."""
    value = medium.source
    if isinstance(value, Source):
        return medium
    if isinstance(value, str) and not is_stored(value):
        pictures = opener.policy.fetch_list(value)
        if pictures is not None:
            return replace(medium, source=pictures)
    if isinstance(value, list):
        if len(value) > opener.policy.list_frames:
            raise KeyeError(f"a list of frames has more than {opener.policy.list_frames:,} pictures; send fewer")
        return replace(medium, source=[opener.open(picture, "image") for picture in value])
    source = opener.open(value, medium.kind)
    content_kind = media_kind(source)
    if medium.kind == "image" and content_kind != "image" and not is_image_format(source.head(HEAD_BYTES)):
        raise KeyeError(f"{source.name} is not an image that keye reads; send a video as video_url")
    if medium.kind == "video" and content_kind == "image":
        raise KeyeError(f"{source.name} is an image; send it as image_url")
    return replace(medium, source=source)


def _message(where: str, message: Mapping[str, Any], opener: MediaOpener) -> dict[str, Any]:
    fields = {key: value for key, value in message.items() if value is not None or key == "role"}
    role = fields.get("role")
    if role == "developer":
        role = fields["role"] = "system"
    ignored = _IGNORED.get(role, {"name"}) if isinstance(role, str) else set[str]()
    if fields.get("function_call") is not None or fields.get("audio") is not None:
        raise ApiError(400, f"{where}: function_call and audio cannot be read; use tool_calls and text", param=where)
    fields = {key: value for key, value in fields.items() if key not in ignored}
    reasoning = fields.pop("reasoning_content", None) or fields.pop("reasoning", None) if role == "assistant" else None
    fields = read_fields(fields, _KEYS.get(str(role), _OTHER_KEYS), where=f"{where}.")
    content = fields.get("content")
    if isinstance(content, list):
        fields["content"] = [_part(f"{where}.content[{index}]", part, opener) for index, part in enumerate(content)]
    if role == "assistant" and content in ("", []) and fields.get("tool_calls"):
        del fields["content"]
    elif role == "assistant" and content is None and "content" in message and not fields.get("tool_calls"):
        fields["content"] = ""  # a reply that was reasoning alone, or that was cut off before it said anything
    if reasoning is not None:  # in front of the reply as the model generated it
        if not isinstance(reasoning, str):
            raise ApiError(400, f"{where}.reasoning_content is not a text", param=f"{where}.reasoning_content")
        content = fields.get("content", "")
        parts = [content] if isinstance(content, str) else list(cast(list[Any], content))
        fields["content"] = [f"<think>\n{reasoning}\n</think>\n\n", *(part for part in parts if part != "")]
    return fields


def _part(where: str, part: object, opener: MediaOpener) -> object:
    """A part of a message in the forms of `keye.chat`."""
    if not isinstance(part, Mapping):
        return part
    if "type" not in part and (implied := next((kind for kind in _KINDS if kind in part), None)) is not None:
        part = {"type": implied, **part}
    kind = part.get("type")
    if isinstance(kind, str) and kind in _PLAIN_TEXT:
        known = {"type", _PLAIN_TEXT[kind]}
        kept_fields = {key: value for key, value in part.items() if key not in _FROM_REPLIES}
        return {"type": "text", "text": read_fields(kept_fields, known, where=f"{where}.").get(_PLAIN_TEXT[kind])}
    if kind in ("input_video", "file", "input_image", "input_file"):
        return _named_file(where, cast(str, kind), part, opener)
    if kind not in ("image", "video", "image_url", "video_url"):
        return part
    fields = {key: value for key, value in part.items() if value is not None}
    part_fields = read_fields(fields, _PART_KEYS, where=f"{where}.")
    for key in ("image_url", "video_url"):
        if isinstance(inner := part_fields.get(key), Mapping):
            options = {name: value for name, value in inner.items() if value is not None}
            part_fields[key] = read_fields(options, _INNER_KEYS, where=f"{where}.{key}.")
    for holder in (part_fields, *(inner for inner in part_fields.values() if isinstance(inner, dict))):
        if isinstance(settings := holder.get("preprocess_kwargs"), Mapping):
            holder["preprocess_kwargs"] = read_fields(settings, VIDEO_OPTIONS, where=f"{where}.preprocess_kwargs.")
    return part_fields


def _named_file(where: str, kind: str, part: Mapping[str, Any], opener: MediaOpener) -> dict[str, Any]:
    """A part that names an upload or holds a file; its settings beside it or inside it."""
    inner = part.get(kind, {})
    if isinstance(inner, str):
        inner = {"url": inner}
    if not isinstance(inner, Mapping):
        raise ApiError(400, f"{where}.{kind} is a {type(inner).__name__}; give an object", param=f"{where}.{kind}")
    outer = {key: value for key, value in part.items() if key not in ("type", kind) and value is not None}
    fields = {key: value for key, value in inner.items() if value is not None}
    if repeated := sorted(outer.keys() & fields.keys()):
        raise ApiError(400, f"{where}.{repeated[0]} stands beside {kind} and inside it; give it once", param=where)
    fields |= outer
    fields.pop("filename", None)
    fields.pop("format", None)
    if fields.get("detail") in ("auto", "low", "high", "original"):
        del fields["detail"]
    named = [key for key in _SOURCES if key in fields]
    if len(named) != 1:
        raise ApiError(400, f"{where}: give one of file_id, url and data", param=where)
    value = fields.pop(named[0])
    for holder in (outer, part, inner):  # media are not held twice
        if named[0] in ("data", "file_data") and isinstance(holder, dict):
            holder.pop(named[0], None)
    if isinstance(value, Mapping) and set(value) == {"url"}:
        value = value["url"]
    if named[0] in ("data", "file_data") and isinstance(value, str) and value[:5].lower() != "data:":
        value = f"data:application/octet-stream;base64,{value}"
    medium = "image" if kind == "input_image" else "video" if kind == "input_video" else _kind_of(value, opener)
    settings = read_fields(fields, {"preprocess_kwargs", *VIDEO_OPTIONS}, where=f"{where}.")
    return {"type": medium, medium: value, **settings}


def _kind_of(value: object, opener: MediaOpener) -> MediumKind:
    """What the file of a part is that does not say it: of an upload that is known, in a data URL it is seen from the
    first bytes; at an address it is taken for a video."""
    if isinstance(value, str) and is_stored(value):
        return opener.kind(value)
    url = parse_data_url(value)
    return "image" if url is not None and find_kind(io.BytesIO(url.head(_SEEN_BYTES))) == "image" else "video"


def _with_defaults(messages: Sequence[Message], defaults: Mapping[str, Any]) -> list[Message]:
    """Settings given for all media, where a medium has none of that name and knows it."""
    known = {"image": IMAGE_OPTIONS, "video": VIDEO_OPTIONS}
    count = {"image": 0, "video": 0}

    def completed(part: str | Medium) -> str | Medium:
        if not isinstance(part, Medium):
            return part
        number, count[part.kind] = count[part.kind], count[part.kind] + 1
        options = {
            name: _own_value(name, value, number) for name, value in defaults.items() if name in known[part.kind]
        }
        settings = {name: value for name, value in options.items() if value is not None}
        return replace(part, options={**settings, **part.options})

    return [replace(message, parts=tuple(map(completed, message.parts))) for message in messages]


def _own_value(name: str, value: object, number: int) -> object:
    """The value of medium `number` of its kind. The official utilities give a list with one for each medium."""
    if not isinstance(value, list) or not value or (name == "timestamps" and not isinstance(value[0], list)):
        return value
    return value[number] if number < len(value) else value[0] if len(value) == 1 else None


def media_settings(body: MediaDefaults) -> dict[str, Any] | None:
    """The settings of a body; what it gives under two names counts as keye's own field has it."""
    settings: dict[str, Any] = {}
    if body.media_io_kwargs is not None:
        # vLLM's loader of videos: a number of frames, -1 for all, at most at a rate.
        known = {"num_frames", "fps", *VIDEO_OPTIONS}
        settings |= read_fields(body.media_io_kwargs.video or {}, known, where="media_io_kwargs.video.")
        frames = settings.pop("num_frames", None)
        if frames not in (None, -1):
            settings["max_frames" if settings.get("fps") is not None else "nframes"] = frames
        if body.media_io_kwargs.image:
            note_ignored([f"media_io_kwargs.image.{name}" for name in body.media_io_kwargs.image])
    if body.mm_processor_kwargs is not None:
        settings |= _processor_settings(body.mm_processor_kwargs, "mm_processor_kwargs.")
    if body.preprocess_kwargs is not None:
        settings |= read_fields(body.preprocess_kwargs, VIDEO_OPTIONS, where="preprocess_kwargs.")
    return {name: value for name, value in settings.items() if value is not None} or None


def _processor_settings(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if name in _GROUPS:
            if not isinstance(value, Mapping):
                raise ApiError(400, f"{where}{name} must be an object", param=f"{where}{name}")
            flat |= _processor_settings(value, f"{where}{name}.") if name != "size" else value
        else:
            flat[name] = value
    return read_fields(
        {_PROCESSOR_NAMES.get(name, name): value for name, value in flat.items()}, VIDEO_OPTIONS, where=where
    )
