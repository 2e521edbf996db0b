"""Requests that would cost much before their limits are refused, in sentences of keye's own and never with 5xx."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from benchmarks.refused_requests import Hostile, hostile, picture
from tests.support.serving import Running

#: Words of libraries that must not be in a sentence.
INTERNALS = re.compile(
    r"pydantic|constrained|Input should|llguidance|torch|Traceback|0x[0-9a-f]{6}|\.py\b", re.IGNORECASE
)
CASES = {case.name: case for case in hostile()}
#: Bodies of many megabytes, and what takes seconds to read.
LARGE = (
    " MB", "emoji", "control tokens", "in a reply", "parts", "messages", "base64 in a text", "to be counted", "a role",
    "a kind of part", "400,000", "49,000", "500,000", "100,000", "arguments", "256 large", "64 large", "5,000",
)  # fmt: skip


def check(running: Running, case: Hostile) -> None:
    kind = {"content-type": "application/json"}
    answer = httpx.post(running.url + case.path, content=case.body(), headers=kind, timeout=120)
    assert answer.status_code in (400, 413, 422), answer.text
    error = answer.json()["error"]
    assert error["message"] and not INTERNALS.search(error["message"]), error


@pytest.mark.parametrize("name", [name for name in CASES if not any(word in name for word in LARGE)])
def test_a_small_request_is_refused(running: Running, name: str) -> None:
    check(running, CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if any(word in name for word in LARGE)])
def test_a_large_request_is_refused(running: Running, name: str) -> None:
    check(running, CASES[name])


def message(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 1}


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/v1/chat/completions", message("word " * 60_000), "messages", "context_length_exceeded"),
        ("/v1/responses", {"input": "word " * 60_000}, "input", "context_length_exceeded"),
        ("/v1/completions", {"prompt": "word " * 60_000}, "prompt", "context_length_exceeded"),
        ("/v1/chat/completions", message("x") | {"temperature": "hot"}, "temperature", None),
        ("/v1/chat/completions", message("x") | {"stop": [1]}, "stop[0]", None),
        ("/v1/chat/completions", message("x") | {"n": 17}, "n", None),
        ("/v1/chat/completions", message([{"type": "image_url", "image_url": {"url": "x", "fps": 1}}]), None, None),
        ("/v1/chat/completions", {}, "messages", None),
        ("/v1/chat/completions", {"messages": "x"}, "messages", None),
        (
            "/v1/chat/completions",
            message([{"type": "image_url", "image_url": {"url": picture(), "min_pixels": 1e12, "max_pixels": 1e12}}]),
            "min_pixels",
            None,
        ),
        ("/v1/files/file-x", None, "file_id", "not_found"),
    ],
)
def test_errors_name_the_field_and_have_the_codes_of_openai(
    running: Running, path: str, body: dict[str, Any] | None, param: str | None, code: str | None
) -> None:
    url = running.url + path
    answer = httpx.get(url) if body is None else httpx.post(url, json=body, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (404 if code == "not_found" else 400, code), error
    assert param is None or error["param"] == param, error
    assert not INTERNALS.search(error["message"]), error


def test_pictures_of_tools_and_of_the_system_are_seen(running: Running) -> None:
    part = {"type": "image_url", "image_url": {"url": picture()}}
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": [part]},
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": [part], "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": [part, {"type": "text", "text": "seen"}]},
    ]
    body = {"messages": messages, "max_tokens": 1}
    answer = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["usage"]["media"]) == 3
    assert json.loads(answer.text)["usage"]["prompt_tokens_details"]["media_tokens"] > 0
