"""aisuite: one interface for many providers; keye is its openai provider at another address."""

from __future__ import annotations

import json
from typing import Any

import aisuite
import common
from aisuite.provider import LLMError
from common import KEY, MODEL, SCHEMA, TOOL, case, check_answer, check_city, check_interval, raises

client = aisuite.Client({"openai": {"base_url": common.API, "api_key": KEY, "max_retries": 0}})
HELLO: Any = [{"role": "user", "content": "hello"}]


def chat(messages: Any = HELLO, **fields: Any) -> Any:
    options = {"max_tokens": 24, "temperature": 0, **fields}
    return client.chat.completions.create(model=f"openai:{MODEL}", messages=messages, **options)


@case("chat")
def _() -> None:
    assert chat().choices[0].message.content


@case("stream")
def _() -> None:
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chat(stream=True) if chunk.choices)
    assert text == chat().choices[0].message.content


@case("image")
def _() -> None:
    assert chat([common.image_message()]).choices[0].message.content


@case("video")
def _() -> None:
    check_interval(chat([common.video_message()]).choices[0].message.content)


@case("tools")
def _() -> None:
    message = chat(tools=[TOOL], tool_choice="required", max_tokens=200).choices[0].message
    check_city(message.tool_calls[0].function.arguments)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    assert chat([*HELLO, message, result], tools=[TOOL]).choices


@case("structured")
def _() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA, "strict": True}}
    check_answer(json.loads(chat(response_format=form, max_tokens=100).choices[0].message.content))


@case("errors")
def _() -> None:
    raises(LLMError, lambda: chat(temperature=9), "temperature")


common.report()
