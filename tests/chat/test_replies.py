"""What a reply marks becomes data: places, moments, calls of tools. Nothing a model writes is an error."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye.chat.messages import ToolCall
from keye.chat.replies import Region, parse_regions, parse_reply
from keye.chat.tokenizer import MARKUP_TOKENS, POLYGON_TOKENS


def box(*points: tuple[float, float], **label: Any) -> Region:
    return Region("box", points, **label)


@pytest.mark.parametrize(
    ("text", "regions"),
    [
        ("<|point_start|>[[1, 2], [3, 4]]<|point_end|>", [Region("point", ((1, 2),)), Region("point", ((3, 4),))]),
        ("<|point_start|>[500,500]<|point_end|>", [Region("point", ((500, 500),))]),
        ("a <|box_start|>[[1,2,3,4],[5,6,7,8]]<|box_end|> b", [box((1, 2), (3, 4)), box((5, 6), (7, 8))]),
        ("<|box_start|>(1,2),(3,4)<|box_end|>", [box((1, 2), (3, 4))]),
        ("<|box_start|>[30, 40, 10, 20]<|box_end|>", [box((10, 20), (30, 40))]),
        (
            "<|object_ref_start|>the dog<|object_ref_end|><|box_start|>[[1,2,3,4]]<|box_end|>",
            [box((1, 2), (3, 4), label="the dog", label_kind="object")],
        ),
        (
            "<|ocr_text_start|>EXIT 5<|ocr_text_end|> <|quad_start|>(1,1),(9,1),(9,5),(1,5)<|quad_end|>",
            [Region("quad", ((1, 1), (9, 1), (9, 5), (1, 5)), label="EXIT 5", label_kind="text")],
        ),
        (
            "<|polygon_start|>[[[0,0],[999,0],[500.5,999]]]<|polygon_end|>",
            [Region("polygon", ((0, 0), (999, 0), (500.5, 999)))],
        ),
        (
            "<|clip_time_start|>[1.0, 2.5]<|clip_time_end|>a dog runs\nthen <|clip_time_start|>[00:03, 00:04]"
            "<|clip_time_end|>",
            [
                Region("clip", interval=(1.0, 2.5), label="a dog runs", label_kind="caption"),
                Region("clip", interval=(3, 4)),
            ],
        ),
        ("<|ocr_text_start|>STOP<|ocr_text_end|> is written", [Region("label", label="STOP", label_kind="text")]),
        (
            "<|object_ref_start|>cat<|object_ref_end|> sits. <|box_start|>[[1,2,3,4]]<|box_end|>",
            [Region("label", label="cat", label_kind="object"), box((1, 2), (3, 4))],
        ),
        (
            "<|object_ref_start|>cats<|object_ref_end|><|box_start|>[1,2,3,4]<|box_end|><|box_start|>[5,6,7,8]<|box_end|>",
            [
                box((1, 2), (3, 4), label="cats", label_kind="object"),
                box((5, 6), (7, 8), label="cats", label_kind="object"),
            ],
        ),
    ],
)  # fmt: skip
def test_regions(text: str, regions: list[Region]) -> None:
    assert parse_regions(text) == regions


@pytest.mark.parametrize(
    "body",
    ["", "[]", "[1,2,3]", "[[1,2],[3]]", "[1,2,3,1001]", "[-1,2,3,4]", "[1,2,3,NaN]", "[1,2,3,1e999]", "[true,2,3,4]",
     "one, two", "{}", "[[[[[[1,2,3,4]]]]]]", "9" * 5000, "[1,2,3,4", '["1","2","3","4"]'],
)  # fmt: skip
def test_malformed_boxes_stay_text(body: str) -> None:
    text = f"<|box_start|>{body}<|box_end|>"
    reply = parse_reply(text)
    assert (reply.text, reply.regions) == (text, ())


@pytest.mark.parametrize(
    "text",
    ["<|box_start|>[[1,2,3,4]]", "[[1,2,3,4]]<|box_end|>", "<|box_start|>[[1,2,3,4]]<|point_end|>",
     "<|box_start|><|box_start|><|box_end|>"],
)  # fmt: skip
def test_marks_that_do_not_pair_mark_nothing(text: str) -> None:
    assert parse_regions(text) == []


marks = st.sampled_from([*MARKUP_TOKENS, *POLYGON_TOKENS])
pieces = st.one_of(
    st.text(), marks, st.sampled_from(["[[1,2,3,4]]", "[1, 2]", "[", "]", ",", '{"name": "f"', "<answer>"])
)


@given(st.lists(pieces).map("".join))
def test_nothing_a_model_writes_is_an_error(text: str) -> None:
    reply = parse_reply(text)
    json.dumps([region.to_dict() for region in reply.regions])


@pytest.mark.parametrize(
    "piece",
    ["<|box_start|>", "<|object_ref_start|>x<|object_ref_end|>", "<|box_start|>[", "<tool_call>", "</tool_call>"],
)
def test_long_strange_replies_are_read(piece: str) -> None:
    parse_reply(piece * 20_000)


def test_coordinates_are_thousandths_of_the_picture() -> None:
    assert box((0, 500), (250, 1000)).in_pixels(400, 200) == ((0, 100), (100, 200))


def test_regions_as_json_leave_out_what_they_lack() -> None:
    assert box((1, 2), (3, 4), label="a", label_kind="object").to_dict() == {
        "kind": "box", "points": [[1, 2], [3, 4]], "label": "a", "label_kind": "object",
    }  # fmt: skip
    assert Region("clip", interval=(1.0, 2.0)).to_dict() == {"kind": "clip", "interval": [1.0, 2.0]}


def test_calls_leave_the_text() -> None:
    reply = parse_reply(
        '<think>hm</think>Let me look.\n<tool_call>\n{"name": "crop", "arguments": {"box": [1, 2]}}\n</tool_call>\n'
        '<tool_call>{"name": "zoom", "arguments": "{}"}</tool_call>'
    )
    assert reply.tool_calls == (ToolCall("crop", {"box": [1, 2]}), ToolCall("zoom", {}))
    assert (reply.text, reply.reasoning) == ("Let me look.", "hm")


@pytest.mark.parametrize(
    "body",
    ['{"name": "f"}', '{"name": "f", "arguments": [1]}', '{"name": "a b", "arguments": {}}', "[]", "{", "null",
     '{"name": 3, "arguments": {}}', "[" * 100_000],
)  # fmt: skip
def test_malformed_calls_stay_text(body: str) -> None:
    """Without the marks, which are for programs."""
    reply = parse_reply(f"<tool_call>{body}</tool_call>")
    assert (reply.text, reply.tool_calls) == (body, ())


def test_an_unfinished_call_stays_text() -> None:
    assert parse_reply('<tool_call>{"name": "f", "arguments": {}').tool_calls == ()
