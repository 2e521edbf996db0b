"""llama.cpp's fields of streams, and conversations in forms that its clients and others send."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.support.serving import error_of, read_events

HELLO: Any = [{"role": "user", "content": "hello"}]


def chat(http: TestClient, **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": HELLO, "max_tokens": 6, "ignore_eos": True, "stream": True, **fields}
    return read_events(http.post("/v1/chat/completions", json=body))


def check_timings(timings: dict[str, Any], most: int) -> None:
    assert 0 < timings["predicted_n"] <= most and timings["prompt_n"] + timings["cache_n"] > 0
    assert timings["prompt_per_second"] > 0 and timings["predicted_per_second"] > 0


def test_chunks_tell_how_fast_tokens_come(http: TestClient) -> None:
    chunks = chat(http, timings_per_token=True, stream_options={"include_usage": True})
    assert "timings" not in chunks[0]
    check_timings(chunks[-1]["timings"], 6)
    assert chunks[-1]["timings"]["predicted_n"] == chunks[-1]["usage"]["completion_tokens"]
    assert not any("timings" in chunk for chunk in chat(http))


def test_chunks_tell_how_far_the_prompt_has_come(http: TestClient) -> None:
    steps = [chunk["prompt_progress"] for chunk in chat(http, return_progress=True) if "prompt_progress" in chunk]
    assert steps[0]["processed"] == steps[0]["cache"] and steps[-1]["processed"] == steps[-1]["total"] > 0
    assert len({step["total"] for step in steps}) == 1


def test_responses_tell_the_same(http: TestClient) -> None:
    body = {"input": "hello", "max_output_tokens": 20, "temperature": 1.0, "seed": 1, "stream": True,
            "timings_per_token": True, "return_progress": True}  # fmt: skip
    text = http.post("/v1/responses", json=body).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    assert events[0]["type"] == "response.created"
    assert {event["type"] for event in events if "prompt_progress" in event} == {"response.in_progress"}
    check_timings(events[-1]["timings"], 20)
    assert all("timings" in event for event in events if event["type"] == "response.output_text.delta")
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_tells_the_text_of_its_prompt(http: TestClient, stream: bool) -> None:
    body = {"messages": HELLO, "max_tokens": 2, "verbose": True, "stream": stream}
    answer = http.post("/v1/chat/completions", json=body)
    result = read_events(answer)[-1] if stream else answer.json()
    assert result["__verbose"]["prompt"] == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_the_system_may_speak_again(http: TestClient) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "hi"}, {"role": "developer", "content": "Be brief."}, *HELLO]
    body = {"messages": messages, "max_tokens": 2, "verbose": True}
    prompt = http.post("/v1/chat/completions", json=body).json()["__verbose"]["prompt"]
    assert "<|im_end|>\n<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>" in prompt


def test_two_replies_at_the_end_are_a_mistake(http: TestClient) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]
    error = error_of(http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2}))
    assert error["param"] == "messages"


def test_a_text_to_cut_may_be_called_content(http: TestClient) -> None:
    tokens = http.post("/tokenize", json={"content": "hello"}).json()["tokens"]
    assert tokens == http.post("/tokenize", json={"prompt": "hello"}).json()["tokens"]


def test_how_many_tokens_a_prompt_takes(http: TestClient) -> None:
    chat = http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1}).json()
    count = chat["usage"]["prompt_tokens"]
    for path, body in (("chat/completions", {"messages": HELLO}), ("responses", {"input": "hello"})):
        assert http.post(f"/v1/{path}/input_tokens", json=body).json()["input_tokens"] == count
