"""Replies that are held to a form, and calls of tools, as clients get them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.support.serving import error_of, read_events

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"
SCHEMA: dict[str, Any] = {
    "type": "object", "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}}, "required": ["a", "b"],
}  # fmt: skip
WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "w", "parameters": SCHEMA}}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}


def chat(http: TestClient, **fields: Any) -> dict[str, Any]:
    answer = http.post(CHAT, json={"messages": HELLO, "max_tokens": 100, "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def only(answer: dict[str, Any]) -> dict[str, Any]:
    (choice,) = answer["choices"]
    return choice


def streamed(http: TestClient, **fields: Any) -> tuple[str, list[dict[str, Any]], str]:
    """Content, calls and the reason for the end, put together from a stream."""
    body = {"messages": HELLO, "max_tokens": 100, "temperature": 0, "stream": True, **fields}
    content, calls, reason = "", list[dict[str, Any]](), ""
    for chunk in read_events(http.post(CHAT, json=body)):
        choice = chunk["choices"][0]
        content += choice["delta"].get("content") or ""
        reason = choice["finish_reason"] or reason
        for call in choice["delta"].get("tool_calls", ()):
            if call["index"] == len(calls):
                calls.append({"name": call["function"]["name"], "arguments": ""})
            calls[call["index"]]["arguments"] += call["function"].get("arguments") or ""
    return content, calls, reason


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
        {"json_schema": json.dumps(SCHEMA)},
        {"guided_json": SCHEMA, "ignore_eos": True},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
    ],
)
def test_json_under_every_name(http: TestClient, fields: dict[str, Any]) -> None:
    choice = only(chat(http, **fields))
    content = choice["message"]["content"]
    data = json.loads(content)
    assert set(data) == {"a", "b"} and content == json.dumps(data, separators=(",", ":"))
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"regex": "[ab]{3}"}, {a + b + c for a in "ab" for b in "ab" for c in "ab"}),
        ({"guided_regex": "[ab]"}, {"a", "b"}),
        ({"guided_choice": ["yes", "no"]}, {"yes", "no"}),
        ({"ebnf": 'root ::= "a" | "b"'}, {"a", "b"}),
        ({"guided_grammar": 'start: "a" | "b"'}, {"a", "b"}),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, {"a"}),
    ],
)
def test_other_forms_under_every_name(http: TestClient, fields: dict[str, Any], texts: set[str]) -> None:
    assert only(chat(http, **fields))["message"]["content"] in texts
    answer = http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 20, **fields})
    assert answer.json()["choices"][0]["text"] in texts


@pytest.mark.parametrize("fields", [{"structured_outputs": {"choice": ["yes"]}}, {"guided_regex": "yes"}])
def test_forms_of_responses(http: TestClient, fields: dict[str, Any]) -> None:
    body = {"input": "x", "max_output_tokens": 20, **fields}
    answer = http.post("/v1/responses", json=body).json()
    assert answer["output"][-1]["content"][0]["text"] == "yes"
    body |= {"text": {"format": {"type": "json_object"}}}
    assert "exclude each other" in error_of(http.post("/v1/responses", json=body))["message"]


def test_text_with_tagged_json_in_it(http: TestClient) -> None:
    tags = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f"]}
    tag = {"begin": "<f>", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "</f>"}
    other = {"type": "triggered_tags", "triggers": ["<f"], "tags": [tag]}
    for value in ({"type": "structural_tag", **tags}, {"type": "structural_tag", "format": other}):
        assert chat(http, response_format=value, max_tokens=4)["choices"]
    wrong = {"type": "structural_tag", "structures": tags["structures"], "triggers": ["<g"]}
    assert "no trigger" in error_of(http.post(CHAT, json={"messages": HELLO, "response_format": wrong}))["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_form_after_reasoning_is_kept_or_the_reply_was_cut(http: TestClient, stream: bool) -> None:
    """The model may not end its reply inside the reasoning."""
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    fields: dict[str, Any] = {"response_format": form, "chat_template_kwargs": {"enable_thinking": True}}
    for tokens, more in ((6, {}), (60, {"thinking_token_budget": 5})):
        if stream:
            content, _, reason = streamed(http, max_tokens=tokens, **fields, **more)
        else:
            choice = only(chat(http, max_tokens=tokens, **fields, **more))
            content, reason = choice["message"]["content"], choice["finish_reason"]
        assert reason == ("stop" if more else "length")
        if more:
            assert set(json.loads(content)) == {"a", "b"}


@pytest.mark.parametrize(
    "value", [[], "x", 1, {"type": []}, {"type": "json_schema"}, {"type": "json_schema", "schema": []}]
)
def test_a_format_that_is_none(http: TestClient, value: Any) -> None:
    error = error_of(http.post("/v1/responses", json={"input": "x", "text": {"format": value}}))
    assert error["param"].startswith("text.format")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "str"}}}}, "response_format"),
        ({"structured_outputs": {"regex": "[.*"}}, "structured_outputs"),
        ({"guided_json": {"type": "str"}}, "guided_json"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "str"}}}],
          "tool_choice": "required"}, "tools"),
    ],
)  # fmt: skip
def test_forms_that_cannot_be_read_name_their_field(http: TestClient, fields: dict[str, Any], param: str) -> None:
    error = error_of(http.post(CHAT, json={"messages": HELLO, **fields}))
    assert error["param"] == param and "|" not in error["message"] and "<tool_call>" not in error["message"]


# Tools


@pytest.mark.parametrize(
    ("choice", "name"), [("required", None), ({"type": "function", "function": {"name": "clock"}}, "clock")]
)
def test_a_call_ends_the_reply(http: TestClient, choice: Any, name: str | None) -> None:
    fields = {"tools": [WEATHER, CLOCK], "tool_choice": choice, "parallel_tool_calls": False}
    result = only(chat(http, **fields))
    (call,) = result["message"]["tool_calls"]
    assert result["finish_reason"] == "tool_calls" and not result["message"]["content"]
    assert call["function"]["name"] == (name or call["function"]["name"])
    assert set(json.loads(call["function"]["arguments"])) == (
        set() if call["function"]["name"] == "clock" else {"a", "b"}
    )
    function = {key: call["function"][key] for key in ("name", "arguments")}
    assert streamed(http, **fields) == ("", [function], "tool_calls")


def test_a_call_that_is_cut_off_goes_back_and_shows_no_mark(http: TestClient) -> None:
    fields: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required"}
    complete = chat(http, **fields)["usage"]["completion_tokens"]
    cut_inside = 0
    for tokens in range(1, complete, 5):
        result = only(chat(http, max_tokens=tokens, **fields))
        message = result["message"]
        calls = [call["function"] for call in message.get("tool_calls", ())]
        assert result["finish_reason"] == "length"
        assert not message["content"]
        assert streamed(http, max_tokens=tokens, **fields) == ("", calls, "length")
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": "cut off"} for call in message.get("tool_calls", ())
        ]
        assert chat(http, messages=[*HELLO, message, *results], tools=[WEATHER], max_tokens=1)["choices"]
        cut_inside += any(bool(call["arguments"]) for call in calls)
    assert cut_inside


@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
def test_tools_of_other_types_are_left_out_with_a_note(http: TestClient, path: str) -> None:
    body = {"messages": HELLO, "max_tokens": 2} if path == CHAT else {"input": "x", "max_output_tokens": 2}
    tools = [{"type": "web_search"}, {"type": "custom", "name": "shell"}]
    answer = http.post(path, json={**body, "tools": [*tools, CLOCK]}).json()
    assert "custom, web_search" in "".join(answer["keye"]["notes"])
    assert error_of(http.post(path, json={**body, "tools": tools, "tool_choice": "required"}))["param"] == "tool_choice"


def test_some_of_the_tools_are_allowed(http: TestClient) -> None:
    only_clock = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [CLOCK]}}
    result = only(chat(http, tools=[WEATHER, CLOCK], tool_choice=only_clock, parallel_tool_calls=False))
    assert [call["function"]["name"] for call in result["message"]["tool_calls"]] == ["clock"]
    wrong = {"type": "allowed_tools", "tools": []}
    error_of(http.post(CHAT, json={"messages": HELLO, "tools": [CLOCK], "tool_choice": wrong}))
