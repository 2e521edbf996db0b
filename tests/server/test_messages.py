"""Anthropic's interface over HTTP: blocks in, blocks and events out, errors in its shape."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

HELLO: Any = [{"role": "user", "content": "hello"}]
TOOL: Any = {
    "name": "cut_clip",
    "description": "cuts a clip",
    "input_schema": {
        "type": "object",
        "properties": {"where": {"type": "string", "enum": ["start", "end"]}},
        "required": ["where"],
        "additionalProperties": False,
    },
}


def png() -> str:
    file = BytesIO()
    Image.new("RGB", (56, 56), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def image_block() -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": png()}}


def ask(http: TestClient, messages: Any = HELLO, *, path: str = "/v1/messages", **fields: Any) -> dict[str, Any]:
    limit = {"max_tokens": 4} if path == "/v1/messages" else {}
    answer = http.post(path, json={"model": "tiny", "messages": messages, **limit, **fields})
    assert answer.status_code == 200, answer.text
    matches: dict[str, Any] = answer.json()
    return matches


def events_of(http: TestClient, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream; the name of each is its type."""
    body = {"model": "tiny", "max_tokens": 4, "messages": HELLO, "stream": True, **fields}
    answer = http.post("/v1/messages", json=body)
    assert answer.status_code == 200, answer.text
    blocks = [block.split("\n") for block in answer.text.strip().split("\n\n") if not block.startswith(":")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [item["type"] for item in events]
    return events


def test_a_message(http: TestClient) -> None:
    message = ask(http, system="Be brief.", metadata={"user_id": "someone"})
    assert message["id"].startswith("msg_") and (message["type"], message["role"]) == ("message", "assistant")
    assert [block["type"] for block in message["content"]] == ["text"]
    assert message["stop_reason"] == "max_tokens" and message["stop_sequence"] is None
    assert message["usage"]["output_tokens"] == 4
    assert message["usage"]["input_tokens"] + message["usage"]["cache_read_input_tokens"] > 4


def test_the_same_prompt_as_a_chat_has(http: TestClient) -> None:
    chat = http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 4}).json()
    message = ask(http)
    usage = message["usage"]
    assert message["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == chat["usage"]["prompt_tokens"]
    assert ask(http, path="/v1/messages/count_tokens") == {"input_tokens": chat["usage"]["prompt_tokens"]}


def test_images_are_counted_and_seen(http: TestClient) -> None:
    content = [image_block(), {"type": "text", "text": "what is it?"}]
    message = ask(http, [{"role": "user", "content": content}])
    assert message["usage"]["media"][0]["source_width"] == 56
    usage = message["usage"]
    count = ask(http, [{"role": "user", "content": content}], path="/v1/messages/count_tokens")["input_tokens"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == count


def test_a_video_by_its_file_id(http: TestClient, file_id: str) -> None:
    block = {"type": "video", "source": {"type": "file", "file_id": file_id}}
    message = ask(http, [{"role": "user", "content": [block, {"type": "text", "text": "when?"}]}])
    assert message["usage"]["media"][0]["frames"] == 8


def test_a_stream_says_the_same(http: TestClient) -> None:
    events = events_of(http)
    kinds = [item["type"] for item in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[0]["message"]["usage"]["input_tokens"] > 0 and events[0]["message"]["content"] == []
    text = "".join(item["delta"]["text"] for item in events if item["type"] == "content_block_delta")
    complete = ask(http)
    assert text == complete["content"][0]["text"]
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == complete["usage"]["output_tokens"]


def test_a_tool_is_used_and_its_result_sent_back(http: TestClient) -> None:
    message = ask(http, tools=[TOOL], tool_choice={"type": "any"}, max_tokens=200)
    used = message["content"][-1]
    assert message["stop_reason"] == "tool_use" and (used["type"], used["name"]) == ("tool_use", "cut_clip")
    assert used["input"]["where"] in ("start", "end") and used["id"].startswith("toolu_")
    result = {"type": "tool_result", "tool_use_id": used["id"], "content": [{"type": "text", "text": "done"}]}
    again = [
        *HELLO,
        {"role": "assistant", "content": message["content"]},
        {"role": "user", "content": [{"type": "text", "text": "here it is"}, result]},
    ]
    assert ask(http, again, tools=[TOOL])["content"]


def test_a_tool_comes_in_pieces(http: TestClient) -> None:
    choice = {"type": "tool", "name": "cut_clip", "disable_parallel_tool_use": True}
    events = events_of(http, tools=[TOOL], tool_choice=choice, max_tokens=200)
    (start,) = (item for item in events if item["type"] == "content_block_start")
    assert start["content_block"]["name"] == "cut_clip" and start["content_block"]["input"] == {}
    pieces = [item["delta"] for item in events if item["type"] == "content_block_delta"]
    assert {piece["type"] for piece in pieces} == {"input_json_delta"}
    assert json.loads("".join(piece["partial_json"] for piece in pieces))["where"] in ("start", "end")
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_a_stop_sequence_is_named(http: TestClient) -> None:
    fields: Any = {"temperature": 1.0, "seed": 1, "max_tokens": 16}
    text = ask(http, **fields)["content"][0]["text"]
    stop = text[len(text) // 2 :][:2]
    message = ask(http, stop_sequences=["never written", stop], **fields)
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", stop)
    assert message["content"][0]["text"] == text.partition(stop)[0].rstrip()
    assert events_of(http, stop_sequences=[stop], **fields)[-2]["delta"]["stop_sequence"] == stop


def test_a_reply_that_was_begun_goes_on(http: TestClient) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "The"}]
    chat = http.post("/v1/chat/completions", json={"messages": begun, "max_tokens": 4,
                                                   "continue_final_message": True}).json()  # fmt: skip
    assert ask(http, begun)["content"][0]["text"] == chat["choices"][0]["message"]["content"]


def test_reasoning_is_a_block_of_its_own(http: TestClient) -> None:
    fields: Any = {
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "temperature": 1.0,
        "seed": 1,
        "max_tokens": 9,
    }
    events = events_of(http, **fields)
    assert events[2]["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}
    message = ask(http, **fields)
    assert message["content"][0]["type"] == "thinking"
    again = [*HELLO, {"role": "assistant", "content": [*message["content"], {"type": "text", "text": "hi"}]}, *HELLO]
    assert ask(http, again)["content"]


def test_a_reply_in_a_form(http: TestClient) -> None:
    schema = TOOL["input_schema"]
    message = ask(http, max_tokens=200, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert json.loads(message["content"][0]["text"])["where"] in ("start", "end")


def test_tools_of_others_are_left_out_with_a_note(http: TestClient) -> None:
    message = ask(http, tools=[{"type": "web_search_20250305", "name": "web_search"}, TOOL])
    (note,) = message["keye"]["notes"]
    assert "tools[0]" in note and "web_search_20250305" in note


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": "x"}]}]}, "source"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url"}}]}]}, "source"),
        ({"tools": [{"name": "f"}]}, "input_schema"),
        ({"tools": [TOOL], "tool_choice": {"type": "all"}}, "tool_choice"),
        ({"thinking": {"type": "perhaps"}}, "thinking"),
    ],
)
def test_mistakes_have_the_shape_that_clients_read(http: TestClient, fields: dict[str, Any], sentence: str) -> None:
    answer = http.post("/v1/messages", json={"model": "tiny", "max_tokens": 4, "messages": HELLO, **fields})
    error = answer.json()
    assert answer.status_code == 400 and error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error" and sentence in error["error"]["message"]


def test_a_mistake_found_late_is_an_error_too(http: TestClient) -> None:
    body = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "word " * 4000}], "stream": True}
    answer = http.post("/v1/messages", json=body)
    assert answer.status_code == 400 and answer.json()["type"] == "error"


def test_what_is_ignored_is_noted_and_a_budget_of_reasoning_is_kept(http: TestClient) -> None:
    fields: Any = {
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "output_config": {"effort": "high"},
        "temperature": 1.0,
        "seed": 1,
        "max_tokens": 9,
    }
    message = ask(http, **fields, thinking={"type": "enabled", "budget_tokens": 3, "display": "full"})
    notes = " | ".join(message["keye"]["notes"])
    for part in ("metadata", "service_tier", "output_config.effort", "thinking.display"):
        assert part in notes, notes
    longer = ask(http, **fields, thinking={"type": "enabled", "budget_tokens": 1024})
    stored, complete = message["content"][0]["thinking"], longer["content"][0]["thinking"]
    assert len(stored) < len(complete) and complete.startswith(stored)
