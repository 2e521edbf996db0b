"""litellm: one interface for many providers; keye is an `openai/` model, and through Anthropic's interface too."""

from __future__ import annotations

import json
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it fetches prices from the network otherwise

import common
import litellm
from common import KEY, MODEL, SCHEMA, TOOL, case, check_answer, check_city, check_interval, raises

litellm.telemetry = False
HELLO: Any = [{"role": "user", "content": "hello"}]
PLACE: Any = {"model": f"openai/{MODEL}", "api_base": common.API, "api_key": KEY, "max_retries": 0}


def chat(messages: Any = HELLO, **fields: Any) -> Any:
    return litellm.completion(messages=messages, **{**PLACE, "max_tokens": 24, **fields})


@case("chat")
def _() -> None:
    answer = chat()
    assert answer.choices[0].message.content and answer.usage.total_tokens > 0


@case("stream")
def _() -> None:
    chunks = list(chat(stream=True, temperature=0, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat(temperature=0).choices[0].message.content


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
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "name": "get_weather", "content": "sunny"}
    assert chat([*HELLO, message.model_dump(), result], tools=[TOOL]).choices


@case("structured")
def _() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA, "strict": True}}
    check_answer(json.loads(chat(response_format=form, max_tokens=100).choices[0].message.content))


@case("responses")
def _() -> None:
    answer = litellm.responses(input="hello", max_output_tokens=24, **PLACE)
    assert answer.output[-1].content[0].text


@case("anthropic")
def _() -> None:
    place = {**PLACE, "model": f"anthropic/{MODEL}", "api_base": common.URL}
    answer = litellm.completion(messages=HELLO, max_tokens=24, **place)
    assert answer.choices[0].message.content
    pieces = litellm.completion(messages=HELLO, max_tokens=24, stream=True, **place)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces)


@case("errors")
def _() -> None:
    raises(litellm.BadRequestError, lambda: chat(temperature=9), "temperature")
    raises(litellm.ContextWindowExceededError, lambda: chat([{"role": "user", "content": "word " * 40_000}]))


common.report()
