"""Requests as vLLM takes them: every medium as a data: URL, fetched by keye under the server's rules. A path on the
server is never opened, and vLLM fetches nothing itself."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, Final

from keye.chat.messages import Medium
from keye.media.container.kinds import HEAD_BYTES
from keye.media.source.fetch import Source, is_index
from keye.server.edge.errors import ApiError
from keye.server.openai.media_parts import media_of, media_settings, open_medium, to_messages
from keye.server.openai.schemas import MediaDefaults
from keye.server.settings import Settings
from keye.server.stores import MediaOpener

#: Fields of a body that set options of media; they stand beside each medium afterwards.
_DEFAULTS: Final = ("preprocess_kwargs", "mm_processor_kwargs", "media_io_kwargs")
#: Parts of messages that are text, or that vLLM is left to judge.
_TEXTS: Final = ("text", "input_text", "output_text", "refusal", "thinking", "tool_use")
#: Media types of pictures by their first bytes.
_TYPES: Final = {b"\x89PNG": "image/png", b"\xff\xd8": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}


def needs_engine(what: str) -> ApiError:
    """The error for what vLLM cannot do."""
    sentence = f"{what} needs keye's own engine: start keye serve without --engine vllm"
    return ApiError(501, sentence, code="needs_keye_engine")


def prepare_body(body: dict[str, Any], path: str, opener: MediaOpener, settings: Settings) -> dict[str, Any]:
    """The body of a request for vLLM. `ApiError` and `KeyeError` as for the server's own engine. Blocks."""
    own = body.get("keye")
    if isinstance(own, Mapping) and own.get("evidence"):
        raise needs_engine("evidence")
    if body.get("attention") == "dense":
        raise needs_engine('attention "dense"')
    fields = MediaDefaults.model_validate({name: body[name] for name in _DEFAULTS if body.get(name) is not None})
    defaults = media_settings(fields) or {}
    changed = {name: value for name, value in body.items() if name not in (*_DEFAULTS, "keye")}
    field = "input" if path.startswith("/v1/responses") else "messages"
    messages, writer = changed.get(field), _Writer(path, opener, defaults, settings.media)
    if isinstance(messages, list):
        if len(messages) > settings.messages:
            raise ApiError(400, f"{field}: more than {settings.messages:,} cannot be read", param=field)
        changed[field] = [writer.message(f"{field}[{number}]", message) for number, message in enumerate(messages)]
    if isinstance(system := changed.get("system"), list):
        changed["system"] = writer.parts("system", system)
    return changed


class _Writer:
    """Writes the messages of one request; counts its media."""

    def __init__(self, path: str, opener: MediaOpener, defaults: Mapping[str, Any], most: int) -> None:
        self._path, self._opener, self._defaults, self._most = path, opener, defaults, most
        self._count = 0

    def message(self, where: str, message: Any) -> Any:
        if not isinstance(message, Mapping):
            return message
        lists = {name: message[name] for name in ("content", "output") if isinstance(message.get(name), list)}
        return {**message, **{name: self.parts(f"{where}.{name}", parts) for name, parts in lists.items()}}

    def parts(self, where: str, parts: list[Any]) -> list[Any]:
        """The parts of a message, or of what a tool has returned."""
        return [self._part(f"{where}[{i}]", part) for i, part in enumerate(parts)]

    def _part(self, where: str, part: Any) -> Any:
        if isinstance(part, Mapping) and part.get("type") == "tool_result":
            return self.message(where, part)
        if not isinstance(part, Mapping) or part.get("type") in _TEXTS or set(part) == {"text"}:
            return part
        if part.get("type") == "image" and isinstance(source := part.get("source"), Mapping):  # Anthropic's form
            if source.get("type") != "base64":
                raise needs_engine(f"{where}: an image that is not sent as base64")
            return part
        media = media_of(to_messages([{"role": "user", "content": [part]}], self._opener, self._defaults))
        if not media:
            return part
        self._count += 1
        if self._count > self._most:
            raise ApiError(400, f"messages hold more than {self._most} media", param="messages")
        return self._write(where, open_medium(media[0], self._opener))

    def _write(self, where: str, medium: Medium) -> dict[str, Any]:
        source = medium.source
        if not isinstance(source, Source):
            raise needs_engine(f"{where}: a list of pictures")
        if is_index(source):
            raise needs_engine(f"{where}: an index")
        if self._path.startswith("/v1/messages") or (self._path.startswith("/v1/responses") and medium.kind == "video"):
            raise needs_engine(f"{where}: a {medium.kind} in {self._path}")
        url = data_url(source, medium.kind)
        if self._path.startswith("/v1/responses"):
            return {"type": "input_image", "image_url": url, "detail": "auto"}
        kind = f"{medium.kind}_url"
        return {"type": kind, kind: {"url": url, **medium.options}}


def data_url(source: Source, kind: str) -> str:
    """A file as a data: URL. vLLM reads files by their bytes, so that any type of the right kind will do."""
    head = source.head(HEAD_BYTES)
    media_type = next((name for begin, name in _TYPES.items() if head.startswith(begin)), f"{kind}/mp4")
    with source.open() as file:
        return f"data:{media_type};base64,{base64.b64encode(file.read()).decode()}"
