"""The official OpenAI client for Python: chat, responses, completions, files."""

from __future__ import annotations

from typing import Any, Literal

import common
from common import MODEL, SCHEMA, TOOL, case, check_answer, check_city, check_interval, raises
from openai import BadRequestError, NotFoundError, OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=common.API, api_key=common.KEY, max_retries=0)
HELLO: Any = [{"role": "user", "content": "hello"}]


class Verdict(BaseModel):
    """A form of a reply."""

    answer: Literal["yes", "no"]


def chat(messages: Any = HELLO, **fields: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages, **{"max_tokens": 24, **fields})


@case("chat")
def _() -> None:
    answer = chat()
    assert answer.choices[0].message.content and answer.usage.total_tokens > 0 and answer.system_fingerprint


@case("stream")
def _() -> None:
    chunks = list(chat(stream=True, temperature=0, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat(temperature=0).choices[0].message.content and chunks[-1].usage.completion_tokens > 0


@case("image")
def _() -> None:
    assert chat([common.image_message()]).choices[0].message.content


@case("video")
def _() -> None:
    check_interval(chat([common.video_message()]).choices[0].message.content)


@case("files")
def _() -> None:
    file = client.files.create(file=common.VIDEO_FILE, purpose="user_data")
    parts = [{"type": "file", "file": {"file_id": file.id}}, {"type": "text", "text": common.QUESTION}]
    check_interval(chat([{"role": "user", "content": parts}]).choices[0].message.content)
    assert client.files.delete(file.id).deleted
    raises(NotFoundError, lambda: client.files.retrieve(file.id))


@case("tools")
def _() -> None:
    message = chat(tools=[TOOL], tool_choice="required", max_tokens=200).choices[0].message
    check_city(message.tool_calls[0].function.arguments)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    assert chat([*HELLO, message, result], tools=[TOOL]).choices


@case("structured")
def _() -> None:
    parsed = client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Verdict, max_tokens=100)
    check_answer(parsed.choices[0].message.parsed.model_dump())
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA, "strict": True}}
    check_answer(Verdict.model_validate_json(chat(response_format=form).choices[0].message.content).model_dump())


@case("responses")
def _() -> None:
    first = client.responses.create(model=MODEL, input="hello", max_output_tokens=24)
    assert first.output_text and client.responses.retrieve(first.id).output_text == first.output_text
    second = client.responses.create(model=MODEL, input="more", max_output_tokens=24, previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert [item.type for item in client.responses.input_items.list(second.id)]
    client.responses.delete(first.id)
    raises(NotFoundError, lambda: client.responses.retrieve(first.id))


@case("responses stream")
def _() -> None:
    with client.responses.stream(model=MODEL, input="hello", text_format=Verdict, max_output_tokens=100) as stream:
        kinds = [event.type for event in stream]
        check_answer(stream.get_final_response().output_parsed.model_dump())
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"


@case("completions")
def _() -> None:
    answer = client.completions.create(model=MODEL, prompt="hello", max_tokens=8, logprobs=2)
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.completion_tokens


@case("models")
def _() -> None:
    assert MODEL in [model.id for model in client.models.list()]


@case("errors")
def _() -> None:
    raises(BadRequestError, lambda: chat(temperature=9), "temperature")
    raises(BadRequestError, lambda: chat([{"role": "user", "content": "word " * 40_000}]), "context")
    raises(BadRequestError, lambda: list(chat([{"role": "user", "content": [{"type": "sound"}]}], stream=True)))


common.report()
