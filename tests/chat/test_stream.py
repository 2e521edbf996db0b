"""A reply taken apart while it is written gives what the finished reply gives, however it is cut."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye.chat.replies import parse_reply
from keye.chat.stream import ReplyPiece, ReplyStream

CALL = '<tool_call>\n{"name": "cut_clip", "arguments": {"start": 1.5, "title": "a \\"}\\" b"}}\n</tool_call>'
REPLIES = [
    "It is red.",
    "  It is red.\n",
    "<think>\nFirst the frames.\n</think>\n\nIt is red.",
    "<analysis>short</analysis><think>long</think><answer>B</answer>",
    "<think>\ncut off",
    CALL,
    "I call it.\n" + CALL + "\n" + CALL,
    '<tool_call>\n{"arguments": {"x": 1}, "name": "other_order"}\n</tool_call> done',
    "<tool_call>no call</tool_call> after",
    '<tool_call>\n{"name": "cut',
    '<tool_call>\n{"arguments": {"x"',
    CALL + "\n<tool_call>",
    CALL[:-12],
    "<tool_call>no call",
    "<tool_call>no call" + CALL,
    "stray</tool_call> mark",
    "a < b and <b> c <think",
    "<answer>[[1.0, 2.5]]</answer>",
]


@dataclass(frozen=True)
class StreamedReply:
    """A whole reply, put together from its pieces."""

    text: str
    reasoning: str | None
    calls: tuple[tuple[str, str], ...]


def joined_reply(pieces: list[ReplyPiece]) -> StreamedReply:
    """Answer, reasoning, and the name and the JSON text of the arguments of each call."""
    calls: list[list[str]] = []
    for piece in pieces:
        if piece.kind == "call":
            calls.append([piece.text, ""])
        elif piece.kind == "arguments":
            calls[piece.index][1] += piece.text
    text, reasoning = ("".join(p.text for p in pieces if p.kind == kind) for kind in ("content", "reasoning"))
    return StreamedReply(text, reasoning or None, tuple((name, arguments) for name, arguments in calls))


def in_pieces(text: str, cuts: list[int], *, tools: bool = True, reasoning: bool = False) -> list[ReplyPiece]:
    stream, pieces, start = ReplyStream(tools=tools, reasoning=reasoning), [], 0
    for cut in [*sorted(cut % (len(text) + 1) for cut in cuts), len(text)]:
        pieces += stream.push(text[start:cut])
        start = cut
    return pieces + stream.finish()


@pytest.mark.parametrize("text", REPLIES)
def test_the_pieces_are_the_finished_reply(text: str) -> None:
    streamed, full = joined_reply(in_pieces(text, list(range(len(text))))), parse_reply(text)
    assert streamed.text == full.text
    assert streamed.reasoning == full.reasoning
    calls = [(name, json.loads(arguments)) for name, arguments in streamed.calls]
    assert calls == [(call.name, call.arguments) for call in full.tool_calls]


@given(st.sampled_from(REPLIES), st.lists(st.integers(0, 200), max_size=8))
def test_cuts_do_not_matter(text: str, cuts: list[int]) -> None:
    assert joined_reply(in_pieces(text, cuts)) == joined_reply(in_pieces(text, []))


@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "<think>", "</think>", "{", '"name"', "a", " "])))
def test_any_text_comes_through(parts: list[str]) -> None:
    text = "".join(parts)
    assert joined_reply(in_pieces(text, [])) == joined_reply(in_pieces(text, list(range(len(text)))))


def test_a_block_that_the_prompt_opened() -> None:
    reply = joined_reply(in_pieces("I look.\n</think>\n\nRed.", [3, 9], reasoning=True))
    assert (reply.reasoning, reply.text) == ("I look.", "Red.")


def test_calls_are_text_where_no_tools_were_offered() -> None:
    assert joined_reply(in_pieces(CALL, [], tools=False)).text == CALL


def test_arguments_come_as_they_are_written() -> None:
    stream = ReplyStream(tools=True)
    assert stream.push('<tool_call>{"name": "f", "arguments": {"a": [') == [
        ReplyPiece("call", "f", 0), ReplyPiece("arguments", '{"a": [', 0),
    ]  # fmt: skip
    assert stream.push("1, 2") == [ReplyPiece("arguments", "1, 2", 0)]
    assert stream.push("]}}</tool_call>") == [ReplyPiece("arguments", "]}", 0)]


@pytest.mark.parametrize("end", range(1, len(CALL)))
def test_a_call_that_is_cut_off_never_shows_its_mark(end: int) -> None:
    reply = joined_reply(in_pieces("I look. " + CALL[:end], list(range(end))))
    assert reply.text in ("I look.", "I look. <")
    assert len(reply.calls) <= 1


def test_a_reply_that_goes_on_keeps_the_space_it_begins_with() -> None:
    stream = ReplyStream(continues=True)
    assert joined_reply(stream.push(" red") + stream.push(" one ") + stream.finish()).text == " red one"


def test_an_endless_call_is_read_once() -> None:
    """No piece is looked at again and again: the text that is held stays bounded."""
    stream, pieces = ReplyStream(tools=True), []
    for _ in range(20_000):
        pieces += stream.push("<tool_call>x[")
    assert len(joined_reply(pieces).text) >= 39_000
