"""Thinking modes: the texts that replies have in each, and which questions are worth thinking about.

A release switches reasoning in one of two styles (`keye.chat.template.ChatTemplate.thinking`):

| mode | suffix (Preview, 1.5) | prefill (2.0, 671B) |
|---|---|---|
| think | `<think>...</think><answer>...</answer>` | `<think>\\n...\\n</think>\\n\\n...` |
| no_think | the answer | the answer |
| auto | `<analysis>...</analysis>`, then one of the two | one of the two |

The modes image (think with image: calls of tools that return pictures) and video are kinds of data: their last replies
have the form of think where they have reasoning, and else that of no_think.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from keye.chat.messages import Message
from keye.chat.replies import parse_reply
from keye.errors import KeyeError

Style = Literal["suffix", "prefill"]

#: What the analysis of an auto reply says where the data has none.
ANALYSES: Final = {
    True: "Several things have to be put together to answer this, so I think first.",
    False: "This can be answered directly.",
}
_TAG: Final = re.compile(r"</?(?:think|analysis|answer)>")
_THINK: Final = {
    "suffix": re.compile(r"<think>(.+?)</think>\s*<answer>(.+?)</answer>", re.DOTALL),
    "prefill": re.compile(r"<think>\n(.+?)\n</think>\n\n(.+)", re.DOTALL),
}
_ANALYSIS: Final = re.compile(r"<analysis>(.+?)</analysis>\s*", re.DOTALL)


def write_reply(answer: str, reasoning: str | None, mode: str, style: Style, analysis: str | None = None) -> str:
    """The text of a reply in a mode. `KeyeError` for mode think without `reasoning`."""
    if mode == "think" and not reasoning:
        raise KeyeError("a reply of mode think needs reasoning in <think>...</think>")
    thinks = bool(reasoning) and mode != "no_think"
    if not thinks:
        text = answer
    elif style == "suffix":
        text = f"<think>{reasoning}</think><answer>{answer}</answer>"
    else:
        text = f"<think>\n{reasoning}\n</think>\n\n{answer}"
    if mode == "auto" and style == "suffix":
        text = f"<analysis>{analysis or ANALYSES[thinks]}</analysis>{text}"
    return text


def is_well_formed(text: str, mode: str, style: Style) -> bool:
    """Whether a reply has the form of its mode and nothing else; `text` begins with what the prompt opened."""
    if mode == "auto" and style == "suffix":
        match = _ANALYSIS.match(text)
        if match is None or _TAG.search(match[1]):
            return False
        text = text[match.end() :]
    thought = _THINK[style].fullmatch(text)
    if mode == "think" or (mode != "no_think" and thought is not None):
        return thought is not None and not any(_TAG.search(part) for part in thought.groups())
    return bool(text.strip()) and _TAG.search(text) is None


def rewrite(messages: Sequence[Message], mode: str | None, style: Style) -> tuple[Message, ...]:
    """The messages with the last one, a reply, in the form of `mode`; unchanged without a mode, and where the reply
    ends with calls of tools. `KeyeError` where the mode needs reasoning that the reply does not have."""
    *before, last = messages
    if mode is None or last.role != "assistant" or last.tool_calls:
        return tuple(messages)
    text = "".join(part for part in last.parts if isinstance(part, str))
    analysis = _ANALYSIS.match(text)
    rest = text if analysis is None else text[analysis.end() :]
    reply = parse_reply(rest)
    answer = _answer_of(rest)
    if not answer:
        raise KeyeError("the reply has reasoning and no answer")
    text = write_reply(answer, reply.reasoning, mode, style, None if analysis is None else analysis[1])
    return (*before, replace(last, parts=(text,)))


def _answer_of(text: str) -> str:
    """What stands after the reasoning, without the marks of an answer."""
    text = text.rpartition("</think>")[2]
    _, opened, answer = text.rpartition("<answer>")
    return (answer.partition("</answer>")[0] if opened else text).strip()


@dataclass(frozen=True)
class PassRates:
    """Shares of sampled replies to a question that were right: of those `direct`, and of those after `thinking`."""

    direct: float
    thinking: float

    def needs_thinking(self, least: float = 0.5) -> bool:
        """Whether an auto reply to the question thinks: not where at least the share `least` of direct replies is
        right already, nor where thinking does not help."""
        return self.direct < least and self.thinking > self.direct
