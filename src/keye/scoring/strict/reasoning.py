"""A reply without its reasoning: what stands outside of the blocks in which models think, inside of those that hold
the answer.

Knows the tags of Keye (Preview, 1.5 and 2.0) and of other families; knows no question. Linear in the text's length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_REASONING = "think|thinking|thought|thoughts|analysis|reasoning|reason|rationale|scratchpad|seed:think"
_ANSWER = "answer|final_answer|finalanswer|final|choice|option|response|solution|output|result"
_REASONING_TAG = re.compile(
    rf"<(?P<close>/?)(?P<name>{_REASONING})>|◁(?P<close2>/?)(?P<name2>think)▷|\[(?P<close3>/?)(?P<name3>THINK)\]"
    r"|<\|(?P<channel>channel)\|>(?P<name4>analysis|commentary|final)<\|message\|>",
    re.IGNORECASE,
)
_ANSWER_TAG = re.compile(rf"<(/?)({_ANSWER})>", re.IGNORECASE)
_BOX_TAG = re.compile(r"<\|(begin|end)_of_box\|>")
_MARKS = ("<", "◁", "[")


@dataclass(frozen=True)
class Stripped:
    """`answer` without reasoning, tags and outer spaces; the text of all reasoning; whether no block was left open."""

    answer: str
    reasoning: str
    closed: bool

    @property
    def conclusion(self) -> str:
        """What can be read for an answer: the answer, or the reasoning of a reply that has nothing else."""
        return self.answer or self.reasoning


def strip_reasoning(text: str) -> Stripped:
    """Splits a reply into its answer and its reasoning.

    A closing tag without an opening one ends reasoning that the prompt opened; a block that is never closed reaches to
    the end, unless an answer is tagged in it. Of several tagged answers the last that is not empty counts.
    """
    if not any(mark in text for mark in _MARKS):
        return Stripped(text.strip(), "", True)
    outside, reasoning, closed = _split_blocks(text)
    answer = _tagged_answer(outside)
    if not answer and not closed and (inner := _tagged_answer(reasoning)) and inner != reasoning.strip():
        answer = inner
    return Stripped(answer, reasoning.strip(), closed)


def _split_blocks(text: str) -> tuple[str, str, bool]:
    """Text outside of reasoning blocks, text inside of them, whether the last block was closed."""
    outside: list[str] = []
    inside: list[str] = []
    name, position = "", 0
    for tag in _REASONING_TAG.finditer(text):
        tag_name = (tag["name"] or tag["name2"] or tag["name3"] or tag["name4"]).lower()
        is_close = bool(tag["close"] or tag["close2"] or tag["close3"])
        if tag["channel"]:
            (inside if name else outside).append(text[position : tag.start()])
            name = "" if tag_name == "final" else tag_name
        elif not is_close and not name:
            outside.append(text[position : tag.start()])
            name = tag_name
        elif is_close and name == tag_name:
            inside.append(text[position : tag.start()])
            name = ""
        elif is_close and not name:
            inside += [*outside, text[position : tag.start()]]
            outside = []
        else:  # a tag that the reasoning itself speaks of
            continue
        position = tag.end()
    (inside if name else outside).append(text[position:])
    return "".join(outside), "\n".join(inside), not name


def _tagged_answer(text: str) -> str:
    """The last answer in tags that is not empty; all of the text where nothing is tagged."""
    contents: list[str] = []
    start, name = None, ""
    for tag in _ANSWER_TAG.finditer(text):
        if not tag[1]:
            start, name = tag.end(), tag[2].lower()
        elif start is not None and name == tag[2].lower():
            contents.append(text[start : tag.start()])
            start = None
    if start is not None:
        contents.append(text[start:])
    for tag in _BOX_TAG.finditer(text):
        if tag[1] == "begin":
            start = tag.end()
        elif start is not None:
            contents.append(text[start : tag.start()])
            start = None
    if not contents:
        return text.strip()
    return next((content.strip() for content in reversed(contents) if content.strip()), "")


def find_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces are balanced; to the end of the text where they are not."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    start = text.index("{", start) + 1
    depth = 1
    for brace in re.finditer(r"\\?[{}]", text[start:]):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : start + brace.start()]
    return text[start:]
