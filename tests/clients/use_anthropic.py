"""The official Anthropic client for Python, against /v1/messages."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import common
from common import MODEL, PARAMETERS, SCHEMA, case, check_answer, check_city, check_interval, raises

client = anthropic.Anthropic(base_url=common.URL, api_key=common.KEY, max_retries=0)
GREEDY = {"temperature": 0}
HELLO: Any = [{"role": "user", "content": "hello"}]
TOOL: Any = {"name": "get_weather", "description": "the weather of a city", "input_schema": PARAMETERS}
PICTURE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": common.image_base64()}}


def ask(messages: Any = HELLO, **fields: Any) -> Any:
    return client.messages.create(model=MODEL, messages=messages, **{"max_tokens": 24, "extra_body": GREEDY, **fields})


@case("chat")
def _() -> None:
    message = ask(system="Be brief.", stop_sequences=["never"])
    assert message.content[0].text and message.usage.output_tokens > 0
    assert message.stop_reason in ("end_turn", "max_tokens")


@case("stream")
def _() -> None:
    with client.messages.stream(model=MODEL, messages=HELLO, max_tokens=24, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == ask().content[0].text and final.usage.input_tokens > 0
    kinds = [event.type for event in client.messages.create(model=MODEL, messages=HELLO, max_tokens=4, stream=True)]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"


@case("image")
def _() -> None:
    assert ask([{"role": "user", "content": [PICTURE, {"type": "text", "text": "what colour?"}]}]).content[0].text


@case("video")
def _() -> None:
    data = common.video_url().partition(",")[2]
    block = {"type": "video", "source": {"type": "base64", "media_type": "video/mp4", "data": data}}
    message = ask([{"role": "user", "content": [block, {"type": "text", "text": common.QUESTION}]}])
    check_interval(message.content[0].text)


@case("tools")
def _() -> None:
    message = ask(tools=[TOOL], tool_choice={"type": "tool", "name": "get_weather"}, max_tokens=200)
    used = message.content[-1]
    assert message.stop_reason == "tool_use"
    check_city(used.input)
    result = {"type": "tool_result", "tool_use_id": used.id, "content": [{"type": "text", "text": "sunny"}, PICTURE]}
    again = [*HELLO, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert ask(again, tools=[TOOL]).content
    with client.messages.stream(
        model=MODEL, messages=HELLO, max_tokens=200, tools=[TOOL], tool_choice={"type": "any"}
    ) as stream:
        check_city(stream.get_final_message().content[-1].input)


@case("structured")
def _() -> None:
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}
    message = ask(output_config=form, max_tokens=100)
    check_answer(json.loads(message.content[0].text))


@case("thinking")
def _() -> None:
    message = ask(thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=1100)
    assert {block.type for block in message.content} <= {"thinking", "text"}


@case("count tokens")
def _() -> None:
    count = client.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens
    usage = ask().usage
    assert count == usage.input_tokens + usage.cache_read_input_tokens


@case("errors")
def _() -> None:
    raises(anthropic.BadRequestError, lambda: ask([{"role": "user", "content": [{"type": "sound"}]}]), "type")
    raises(anthropic.BadRequestError, lambda: ask([{"role": "user", "content": "word " * 40_000}]), "context")


common.report()
