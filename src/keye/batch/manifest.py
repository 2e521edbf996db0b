"""The questions of a batch: a file of JSON lines or CSV, each line one question about media, or a line of OpenAI's
batch format. Whatever a line says becomes the body of one chat completion; one that cannot becomes `BadLine`.

Opens no medium; of those whose kind the line leaves open it reads the first bytes.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from keye.config.media import IMAGE_OPTIONS, VIDEO_OPTIONS
from keye.errors import KeyeError
from keye.media.source.fetch import fetch_source, media_kind
from keye.units import MIB, format_bytes

#: Longest line, in bytes.
MAX_LINE: Final = 64 * MIB
#: Settings of replies that a line may give; commands have options for most.
SAMPLING: Final = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "attention",
    "frequency_penalty", "presence_penalty", "logit_bias", "allowed_token_ids", "stop_token_ids", "min_tokens",
    "bad_words", "include_stop_str_in_output", "thinking_token_budget", "ignore_eos", "deterministic",
)  # fmt: skip
#: Other names for settings of videos, those of the command line.
_SHORT: Final = {"start": "video_start", "end": "video_end"}
_KINDS: Final = ("video", "image", "media")
_NATIVE: Final = {
    "id", "question", "system", "schema", "think", "evidence", *_KINDS, *SAMPLING, *_SHORT, *VIDEO_OPTIONS
}  # fmt: skip
_OPENAI: Final = ("custom_id", "method", "url", "body")
_URL: Final = "/v1/chat/completions"
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_NUMBERED: Final = re.compile(r"line-\d+")
#: Surrogates, which no text in UTF-8 has.
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
#: Longest cell of a CSV file, in characters: texts of questions are far shorter.
_MOST_CELL: Final = 1 << 17
#: Digits of the longest whole number that is read.
_MOST_DIGITS: Final = 400
#: What servers call files that were uploaded before.
_STORED_PREFIXES: Final = ("file-", "index-")


@dataclass(frozen=True)
class Item:
    """One question. `body` is that of a chat completion in which media are named by absolute paths or URLs, `media`
    those names; `digest` tells whether a line asks the same as before. `openai` says in which form the answer is
    written."""

    id: str
    line: int
    digest: str
    body: Mapping[str, Any]
    media: tuple[str, ...]
    openai: bool = False


@dataclass(frozen=True)
class BadLine:
    """A line that asks nothing: `id` is always `line-N`, since its own may be missing or taken."""

    id: str
    line: int
    digest: str
    reason: str


def read_manifest(path: Path, defaults: Mapping[str, Any] | None = None) -> list[Item | BadLine]:
    """All lines in their order; empty ones and, in JSON lines, those that begin with # are left out. `defaults` are
    settings, under the names that lines have them, for lines that do not give their own. Relative paths start at the
    manifest's folder. `KeyeError` for a manifest that cannot be read at all; never for one line of it."""
    lines_read: list[Item | BadLine] = []
    lines: dict[str, int] = {}
    folder = path.absolute().parent
    for number, raw, fields in _lines(path):
        digest = hashlib.sha256(raw + json.dumps(defaults or {}, sort_keys=True).encode()).hexdigest()[:16]
        try:
            item = _item(number, digest, fields, defaults or {}, folder)
            if item.id in lines:
                raise KeyeError(f"the id {item.id[:100]!r} stands on line {lines[item.id]} already; give each its own")
            lines[item.id] = number
            lines_read.append(item)
        except KeyeError as error:
            lines_read.append(BadLine(f"line-{number}", number, digest, str(error)))
        except (ValueError, TypeError, LookupError, OSError, RecursionError):  # of unexpected names and values
            reason = "the line holds values that mean nothing here; check the names and settings in it"
            lines_read.append(BadLine(f"line-{number}", number, digest, reason))
    if not lines_read:
        raise KeyeError(f'{path} has no lines: write one question a line, as {{"video": "a.mp4", "question": "..."}}')
    return lines_read


def _lines(path: Path) -> Iterator[tuple[int, bytes, object]]:
    """Number, bytes and content of each line; the content is the sentence of what is wrong with it, if that is so."""
    try:
        with path.open("rb") as file:
            if path.suffix.lower() == ".csv":
                yield from _csv_lines(path, file.read())
                return
            for number, raw in _raw_lines(file):
                text = raw.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip()
                if text and not text.startswith(b"#"):
                    yield number, text, _parsed(text)
    except OSError as error:
        raise KeyeError(f"{path} cannot be read ({error.strerror}): give a manifest of JSON lines or CSV") from None


def _raw_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers; of one that is too long, a little more than may be read."""
    number = 0
    while line := file.readline(MAX_LINE + 2):
        number += 1
        yield number, line
        while len(line) > MAX_LINE and not line.endswith(b"\n"):
            line = file.readline(1 << 20) or b"\n"


def _parsed(text: bytes) -> object:
    if len(text) > MAX_LINE:
        return f"the line has more than {format_bytes(MAX_LINE)}; name files instead of sending them"
    try:
        value = json.loads(text.decode(), parse_int=_parse_int, parse_float=_parse_float, parse_constant=_parse_float)
    except KeyeError as error:
        return str(error)
    except RecursionError:
        return "the line is nested too deeply; write one JSON object a line"
    except UnicodeDecodeError:
        return "the line is not in UTF-8; save the file as UTF-8"
    except json.JSONDecodeError as error:
        return f"the line is not JSON ({error}); write one JSON object a line"
    return value if isinstance(value, dict) else "the line is not a JSON object; write {...} with a question"


def _parse_int(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise KeyeError(f"the line holds a number of {len(text):,} digits, more than anything takes")
    return int(text)


def _parse_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise KeyeError(f"the line holds {text[:20]}, which is not a finite number")
    return number


def _csv_lines(path: Path, data: bytes) -> Iterator[tuple[int, bytes, object]]:
    text = data.decode("utf-8-sig", "surrogateescape")
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        if _is_broken(rows.fieldnames):
            raise KeyeError(f"{path} is not CSV in UTF-8: save it as UTF-8 with names of columns in the first row")
    except csv.Error as error:
        raise KeyeError(
            f"{path} is not CSV ({error}): save it as UTF-8 with names of columns in the first row"
        ) from None
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            number = rows.line_num
            yield number, f"{number}".encode(), f"the row is not CSV ({error}); quote its cells"
            continue
        if row is None:
            return
        surplus = row.pop(None, None)
        if any(len(cell) > _MOST_CELL for cell in row.values() if cell):
            yield rows.line_num, f"{rows.line_num}".encode(), f"a cell has more than {_MOST_CELL:,} characters"
            continue
        raw = json.dumps(row, sort_keys=True).encode()
        if _is_broken(row.values()) or _is_broken(surplus):
            yield rows.line_num, raw, "the row is not in UTF-8; save the file as UTF-8"
            continue
        fields = {name: _cell(name, value) for name, value in row.items() if value not in (None, "")}
        yield rows.line_num, raw, "the row has more cells than the first row has names" if surplus else fields


def _is_broken(texts: Iterable[str | None] | None) -> bool:
    """Whether a text holds surrogates, which invalid UTF-8 becomes."""
    return any(_SURROGATE.search(text) for text in texts or () if text)


def _cell(name: str, value: str) -> object:
    """Text as it stands; settings, and lists of media, as JSON has them."""
    if name in ("id", "question", "system") or (name in _KINDS and not value.startswith("[")):
        return value
    try:
        return json.loads(value, parse_int=_parse_int, parse_float=_parse_float, parse_constant=_parse_float)
    except (ValueError, RecursionError):  # a number that is none here stands as it is, to be named by who takes it
        return value


def _item(number: int, digest: str, fields: object, defaults: Mapping[str, Any], folder: Path) -> Item:
    if isinstance(fields, str):
        raise KeyeError(fields)
    assert isinstance(fields, dict)
    openai = "custom_id" in fields
    name = fields.get("custom_id" if openai else "id", f"line-{number}")
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not name or len(name) > 512 or _SURROGATE.search(name):
        raise KeyeError("the id is not a text of up to 512 characters; give another")
    if _NUMBERED.fullmatch(name) and name != f"line-{number}":
        raise KeyeError(f"the id {name!r} is that of a line without one; give another")
    body = _openai_body(fields) if openai else _native_body(fields, folder)
    media = tuple(_settle(holder, key, kind, defaults, folder) for holder, key, kind in media_places(body))
    for option in SAMPLING:
        if option in defaults and not (option == "max_tokens" and "max_completion_tokens" in body):
            body.setdefault(option, defaults[option])
    if "think" in defaults:
        body.setdefault("chat_template_kwargs", {"enable_thinking": defaults["think"]})
    return Item(name, number, digest, body, media, openai)


def _openai_body(fields: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(fields) - set(_OPENAI)):
        raise KeyeError(f"{unknown[0]!r} is not a key of a batch line; keys are {', '.join(_OPENAI)}")
    if fields.get("method", "POST") != "POST" or fields.get("url") != _URL:
        raise KeyeError(f"method and url must be POST and {_URL}")
    body = fields.get("body")
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise KeyeError("body must be an object with messages")
    if body.get("stream"):
        raise KeyeError("stream cannot be used in a batch; leave it out")
    return body


def _native_body(fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    if unknown := sorted(str(name) for name in set(fields) - _NATIVE):
        raise KeyeError(f"{unknown[0][:100]!r} is not a key of a line; keys are {', '.join(sorted(_NATIVE))}")
    question = fields.get("question")
    if not isinstance(question, str) or not question.strip():
        raise KeyeError("the question is missing or empty; ask something about the media")
    options = {_SHORT.get(name, name): fields[name] for name in (*_SHORT, *VIDEO_OPTIONS) if name in fields}
    parts: list[dict[str, Any]] = []
    for name in _KINDS:
        value = fields.get(name, [])
        for source in value if isinstance(value, list) else [value]:
            if not isinstance(source, str) or not source:
                raise KeyeError(f"{name} must be a path or an address, or a list of them")
            kind = _kind(source, folder) if name == "media" else name
            known = {key: value for key, value in options.items() if kind == "video" or key in IMAGE_OPTIONS}
            parts.append({"type": kind, kind: source, **known})
    if not parts:
        raise KeyeError("the media are missing; give video, image or media")
    system = [{"role": "system", "content": fields["system"]}] if "system" in fields else []
    body: dict[str, Any] = {
        "messages": [*system, {"role": "user", "content": [*parts, {"type": "text", "text": question}]}],
        **{name: fields[name] for name in SAMPLING if name in fields},
    }
    if "schema" in fields:
        body["response_format"] = {
            "type": "json_schema", "json_schema": {"name": "reply", "schema": fields["schema"]},
        }  # fmt: skip
    if "think" in fields:
        body["chat_template_kwargs"] = {"enable_thinking": fields["think"]}
    if "evidence" in fields:
        body["keye"] = {"evidence": fields["evidence"]}
    return body


def _kind(source: str, folder: Path) -> str:
    if _is_address(source, folder):
        raise KeyeError("what is at an address is not known before it is fetched; name it video or image")
    return media_kind(fetch_source(_path(source, folder)))


def _is_address(source: str, folder: Path) -> bool:
    """Whether a name is an address: it looks like one, and no file has it."""
    return _SCHEME.match(source) is not None and not os.path.isfile(folder / source)


def _path(source: str, folder: Path) -> Path:
    """The path that a manifest in a folder names: the file that has this very name, else with ~ for a home."""
    path = folder / source
    if not source.startswith("~") or path.is_file():
        return path
    try:
        return Path(source).expanduser()
    except RuntimeError:  # no such user
        return path


def media_places(body: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Where a body names media: the object, the key in it under which the name stands, and the kind. Settings of the
    medium stand in the same object."""
    for message in body["messages"]:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            kind = str(part.get("type")).removesuffix("_url") if isinstance(part, dict) else ""
            if kind not in ("video", "image"):
                continue
            key = kind if kind in part else f"{kind}_url"
            holder = part[key] if isinstance(part.get(key), dict) else part
            key = "url" if holder is not part else key
            if isinstance(holder.get(key), str):
                yield holder, key, kind


def _settle(holder: dict[str, Any], key: str, kind: str, defaults: Mapping[str, Any], folder: Path) -> str:
    """Writes the whole path, and the defaults, where a medium is named; returns its name."""
    inner = holder.get("preprocess_kwargs")
    source, own = holder[key], holder.keys() | (inner.keys() if isinstance(inner, dict) else set())
    if not _is_address(source, folder):
        path = _path(source, folder)
        if path.exists() or not source.startswith(_STORED_PREFIXES):
            source = holder[key] = str(path)
    known = VIDEO_OPTIONS if kind == "video" else IMAGE_OPTIONS
    holder |= {name: value for name, value in defaults.items() if name in known and name not in own}
    return str(source)


def by_media(items: Sequence[Item]) -> dict[tuple[str, ...], list[Item]]:
    """Items that ask about the same media, in the order in which media are first met; those about none stand alone."""
    groups: dict[tuple[str, ...], list[Item]] = {}
    for item in items:
        groups.setdefault(key_of(item), []).append(item)
    return groups


def key_of(item: Item) -> tuple[str, ...]:
    """What items that belong together have in common."""
    return item.media or ("", item.id)
