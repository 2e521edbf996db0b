"""The chat template that came with a checkpoint, rendered without trusting it or the user.

The template runs in a sandbox in a process with limits (`template_worker`). It never sees what a user wrote: every text
is replaced by a random stand-in and restored as plain text afterwards. So the special tokens that count are those that
the template itself writes.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from keye.chat.messages import Medium, Message, normalize_tools, to_json
from keye.chat.template import (
    SUFFIXES,
    TEMPLATE_FILES,
    ChatTemplate,
    Segment,
    find_last_user_turn,
    joined,
    prepare_turns,
    split_reply,
)
from keye.chat.template_process import TemplateLimits, templates
from keye.config import read_special_tokens
from keye.errors import KeyeError, KeyeWarning, warn

MAX_TEMPLATE_CHARS: Final = 1 << 20
_PADS: Final = re.compile(r"<\|(image|video)_pad\|>")
_RISKY: Final = re.compile(r"[<|>]")
"""Characters without which no special token can be written."""


@dataclass(frozen=True)
class CheckpointTemplate:
    """Jinja text from a checkpoint. `tool_text` takes its place when functions are offered (None: it offers none).

    `name` is for messages to people. `thinking` says how reasoning is switched, as in `ChatTemplate`: by a suffix of
    the last user text, or by the template's variables `enable_thinking` and `thinking`. `default_system` comes first
    where a conversation has no system message; None leaves that to the template. `tokens` are variables that stand for
    special tokens, such as `bos_token`. `fallback` renders what this template has no place for: conversations with
    tools where it offers none.
    """

    name: str
    text: str
    tool_text: str | None = None
    default_system: str | None = None
    thinking: Literal["prefill", "suffix"] = "prefill"
    tokens: Mapping[str, str] = field(default_factory=dict)
    limits: TemplateLimits = field(default_factory=TemplateLimits)
    fallback: ChatTemplate | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any] | Message],
        *,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        add_vision_id: bool = False,
    ) -> list[Segment]:
        """The prompt as segments, like `ChatTemplate.render`. Raises KeyeError also for a template that fails, goes on
        for ever, or leaves out the user's words or media."""
        if tools and self.tool_text is None and self.fallback is not None:
            note = f"{self.name} has no place for tools; keye's own template is used with tools"
            warn(KeyeWarning(note), stacklevel=2)
            return self.fallback.render(messages, add_generation_prompt=add_generation_prompt, thinking=thinking,
                                        tools=tools, add_vision_id=add_vision_id)  # fmt: skip
        suffix = SUFFIXES[bool(thinking)] if self.thinking == "suffix" and thinking is not None else None
        turns = prepare_turns(messages, add_generation_prompt, self.default_system, suffix)
        offered = normalize_tools(tools)
        template = self.tool_text if offered else self.text
        if template is None:
            raise KeyeError(f"{self.name} has no place for tools: leave tools out, or load it with template keye.")
        hidden = _Hidden()
        lists = any(mark in template for mark in ("image_pad", "vision_start"))
        variables: dict[str, Any] = {
            **self.tokens,
            "messages": [hidden.message(turn, lists=lists) for turn in turns],
            "tools": hidden.data(offered) if offered else None,
            "add_generation_prompt": add_generation_prompt,
            "add_vision_id": add_vision_id,
        }
        if thinking is not None and self.thinking == "prefill":
            variables |= {"enable_thinking": thinking, "thinking": thinking}  # Qwen's name for it, and DeepSeek's
        rendered = templates.render(self.name, template, variables, hidden.nonce, self.limits)
        segments = list(hidden.restore(self.name, rendered))
        _check_last_words(self.name, turns, segments)
        return joined(_insert_media(self.name, turns, segments))

    def for_model(
        self, own: ChatTemplate, default_system: str | None, *, fall_back: bool = False
    ) -> CheckpointTemplate:
        """This template for a model whose own template of keye is `own`: reasoning is switched as there, and with
        `fall_back` `own` renders conversations with tools that this one has no place for."""
        return replace(
            self, thinking=own.thinking, default_system=default_system, fallback=own if fall_back else self.fallback
        )


class _Hidden:
    """The texts of a conversation, and the stand-ins that the template sees in their place.

    Whitespace at both ends stays as it is, because templates trim it; so do the marks that a reply may hold.
    """

    def __init__(self) -> None:
        self.nonce = secrets.token_hex(16).upper()
        self._texts: list[str] = []
        self._pattern = re.compile(rf"K([TJ]){self.nonce}N([0-9]+)E")

    def text(self, text: str) -> str:
        core = text.strip()
        if not core:
            return text
        before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
        self._texts.append(core)
        return f"{before}KT{self.nonce}N{len(self._texts) - 1}E{after}"

    def reply(self, text: str) -> str:
        return "".join(piece if index % 2 else self.text(piece) for index, piece in enumerate(split_reply(text)))

    def data(self, value: Any) -> Any:
        """JSON data whose strings are hidden where they could hold a special token; a template may look at others."""
        if isinstance(value, str):
            return self.text(value) if _RISKY.search(value) else value
        if isinstance(value, Mapping):
            return {self.data(key): self.data(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.data(item) for item in value]
        return value

    def message(self, turn: Message, *, lists: bool) -> dict[str, Any]:
        """One message for the template. Media are parts of a list where `lists`, else their marks stand in the text."""
        hide = self.reply if turn.role == "assistant" else self.text
        content: Any
        # Templates expect lists in turns of the user only.
        if lists and turn.role == "user" and any(isinstance(part, Medium) for part in turn.parts):
            content = [
                {"type": part.kind, part.kind: ""} if isinstance(part, Medium) else {"type": "text", "text": hide(part)}
                for part in turn.parts
            ]
        else:
            content = "".join(
                f"<|vision_start|><|{part.kind}_pad|><|vision_end|>" if isinstance(part, Medium) else hide(part)
                for part in turn.parts
            )
        message: dict[str, Any] = {"role": turn.role, "content": content}
        if turn.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": self.text(call.arguments_json())}}
                for call in turn.tool_calls
            ]
        return message

    def restore(self, name: str, rendered: str) -> Iterable[Segment]:
        """What the template wrote, with the texts back in their places."""
        end = 0
        for match in self._pattern.finditer(rendered):
            yield self._own(name, rendered[end : match.start()])
            text = self._texts[int(match[2])]
            yield Segment("text", to_json(text)[1:-1] if match[1] == "J" else text)
            end = match.end()
        yield self._own(name, rendered[end:])

    def _own(self, name: str, text: str) -> Segment:
        if self.nonce in text.upper():
            raise KeyeError(
                f"{name} rewrites what the user wrote, which keye does not allow: load it with template keye."
            )
        return Segment("template", text)


def _check_last_words(name: str, turns: Sequence[Message], segments: Sequence[Segment]) -> None:
    """The last text of the user must be in the prompt: a template that cannot read a message drops it silently."""
    index = find_last_user_turn(turns)
    texts = {part.strip() for part in turns[index].parts if isinstance(part, str)} if index >= 0 else set()
    if texts - {"", *(segment.value for segment in segments if segment.kind == "text")}:
        raise KeyeError(f"{name} leaves out what the user wrote last: load it with template keye or correct it.")


def _insert_media(name: str, turns: Sequence[Message], segments: Iterable[Segment]) -> Iterable[Segment]:
    """Puts the media where the template wrote their placeholder tokens."""
    media = [part for turn in turns for part in turn.parts if isinstance(part, Medium)]
    placed = 0
    for segment in segments:
        if segment.kind == "text":
            yield segment
            continue
        for index, piece in enumerate(_PADS.split(str(segment.value))):
            if index % 2 == 0:
                yield Segment("template", piece)
                continue
            if placed == len(media) or media[placed].kind != piece:
                raise KeyeError(
                    f"{name} has a place for {piece} where the conversation has none: load it with template keye."
                )
            yield Segment(media[placed].kind, media[placed])
            placed += 1
    if placed < len(media):
        raise KeyeError(f"{name} leaves out {len(media) - placed} of {len(media)} media: load it with template keye.")


def find_template(folder: Path) -> CheckpointTemplate | None:
    """The template that a checkpoint folder brings, None if it brings none; as `load_template` finds it."""
    return load_template(folder) if any(_read_templates(folder / name) for name in TEMPLATE_FILES) else None


def load_template(path: str | Path) -> CheckpointTemplate:
    """The template of a checkpoint folder, or of one file (`.jinja`, or `.json` with a `chat_template`).

    In a folder, chat_template.jinja comes before chat_template.json and tokenizer_config.json. Where the first of them
    knows no tools (Preview's does not), the next that does is taken for conversations with tools.
    """
    path = Path(path)
    if not path.exists():
        raise KeyeError(f"{path} does not exist: give a chat template file, a checkpoint folder, keye or checkpoint.")
    files = [path / name for name in TEMPLATE_FILES]
    listed_templates = [template for file in (files if path.is_dir() else [path]) for template in _read_templates(file)]
    if not listed_templates:
        raise KeyeError(f"{path} holds no chat template: choose template keye or auto.")
    named = dict(reversed(listed_templates))
    text = named.get("default", listed_templates[0][1])
    tool_text = named.get("tool_use") or next(
        (text for _, text in listed_templates if re.search(r"\btools\b", text)), None
    )
    tokens = read_special_tokens(path if path.is_dir() else path.parent)
    return CheckpointTemplate(f"The chat template of {path}", text, tool_text, tokens=tokens)


def _read_templates(file: Path) -> list[tuple[str, str]]:
    """The named templates in one file; none if it is missing or has no template."""
    try:
        text = file.read_text(encoding="utf-8") if file.stat().st_size <= 16 * MAX_TEMPLATE_CHARS else None
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise KeyeError(f"{file} cannot be read ({error}): give a readable chat template.") from None
    if text is not None and file.suffix == ".json":
        try:
            content = json.loads(text).get("chat_template")
        except (ValueError, AttributeError, RecursionError):
            raise KeyeError(f"{file} cannot be read as a JSON object: download it again.") from None
    else:
        content = text
    if content is None and text is not None:
        return []
    listed = content if isinstance(content, list) else [{"name": "default", "template": content}]
    try:
        listed_templates = [(str(entry["name"]), entry["template"]) for entry in listed]
    except (TypeError, LookupError):
        raise KeyeError(f"{file} has a chat_template that is neither a text nor a list of named texts.") from None
    if not all(isinstance(template, str) and len(template) <= MAX_TEMPLATE_CHARS for _, template in listed_templates):
        raise KeyeError(f"{file} has a chat template that is not a text of at most {MAX_TEMPLATE_CHARS:,} characters.")
    return listed_templates
