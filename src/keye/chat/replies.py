"""A finished reply taken apart: answer, reasoning, calls of tools, times and places."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from keye.chat.grounding import Region, parse_regions
from keye.chat.messages import ToolCall, tool_name
from keye.chat.times import Interval, parse_intervals

_OPEN_CALL: Final = "<tool_call>"
_CLOSE_CALL: Final = "</tool_call>"


@dataclass(frozen=True)
class Reply:
    """The answer without its wrapping, the reasoning or None, and what the answer holds: intervals of seconds, marked
    regions, calls of tools. Calls that could be read are not in `text`; everything else the model wrote is."""

    text: str
    reasoning: str | None = None
    intervals: tuple[Interval, ...] = ()
    regions: tuple[Region, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()


def parse_reply(text: str) -> Reply:
    """Split a finished reply.

    Reasoning is what stands in `<think>` and `<analysis>`, also if the prompt opened the block or the reply was cut off
    inside it; the answer is the last `<answer>` body if there is one. This is the official order of extraction, except
    that a final `\\boxed{}` is left to the evaluation of the task that asks for one. Nothing is an error: malformed
    syntax stays in the text, but for the marks of calls; a call that was cut off is left out.
    """
    reasoning: list[str] = []
    for tag in ("analysis", "think"):
        inside, text = _split_block(text, tag)
        if inside:
            reasoning.append(inside)
    text, calls = _split_calls(text)
    _, opened, answer = text.rpartition("<answer>")
    text = (answer.partition("</answer>")[0] if opened else text).strip()
    return Reply(
        text, "\n\n".join(reasoning) or None, tuple(parse_intervals(text) or ()), tuple(parse_regions(text)), calls
    )


def _split_block(text: str, tag: str) -> tuple[str, str]:
    """What stands in the block `tag` at the start of `text`, and the rest."""
    inside, closed, rest = text.rpartition(f"</{tag}>")
    if closed:
        return inside.replace(f"<{tag}>", "", 1).strip(), rest
    before, opened, inside = text.partition(f"<{tag}>")
    if opened and not before.strip():
        return inside.strip(), ""
    return "", text


def _split_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """The text without the calls in it, and the calls in their order."""
    before, *blocks = text.split(_OPEN_CALL)
    texts, calls = [before], []
    for block in blocks:
        body, closed, after = block.partition(_CLOSE_CALL)
        call = read_call(body)
        if call is not None:
            calls.append(call)
            texts.append(after.lstrip("\n"))
        elif closed or not begins_call(body):
            texts.append(body + after)
    return "".join(texts).replace(_CLOSE_CALL, ""), tuple(calls)


def begins_call(body: str) -> bool:
    """Whether what follows the mark of a call is one that was cut off, or nothing yet, and no text."""
    return not body.strip() or body.lstrip().startswith("{")


def read_call(body: str) -> ToolCall | None:
    """The call in `{"name": ..., "arguments": {...}}`, or None if it is anything else."""
    try:
        call = json.loads(body)
        arguments = call["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(arguments, dict):
            return None
        return ToolCall(tool_name("tool_call", call["name"]), arguments)
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
