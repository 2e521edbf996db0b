"""The official OpenAI client, unmodified, against a server behind a socket."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, Literal

import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from pydantic import BaseModel

MODEL = "tiny"
HELLO: Any = [{"role": "user", "content": "hello"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "cut_clip",
        "description": "cuts a clip",
        "parameters": {
            "type": "object",
            "properties": {"where": {"type": "string", "enum": ["start", "end"]}},
            "required": ["where"],
            "additionalProperties": False,
        },
    },
}


class Verdict(BaseModel):
    """What a reply is held to."""

    answer: Literal["yes", "no"]


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL


def test_a_chat_and_its_stream_say_the_same(client: OpenAI) -> None:
    complete = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=12, seed=1, temperature=1.0)
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=12, seed=1, temperature=1.0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == complete.choices[0].message.content
    assert complete.usage is not None and chunks[-1].usage == complete.usage
    assert complete.usage.completion_tokens <= 12


def test_replies_say_what_made_them(client: OpenAI) -> None:
    item, two = (client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1) for _ in range(2))
    assert item.system_fingerprint and item.system_fingerprint == two.system_fingerprint
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2, stream=True))
    assert {chunk.system_fingerprint for chunk in chunks} == {item.system_fingerprint}
    assert (
        client.completions.create(model=MODEL, prompt="a", max_tokens=1).system_fingerprint == item.system_fingerprint
    )


def test_several_choices_with_probabilities(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, n=2, temperature=1.0, seed=3, max_tokens=3, logprobs=True, top_logprobs=2,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.finish_reason == "length" and choice.logprobs is not None and choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 3
        for token in choice.logprobs.content:
            assert token.logprob <= 0 and len(token.top_logprobs) == 2
            assert token.top_logprobs[0].logprob >= max(token.logprob, token.top_logprobs[1].logprob)


def test_the_parse_helper_gets_its_type(client: OpenAI) -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Verdict, max_tokens=300)
    assert isinstance(answer.choices[0].message.parsed, Verdict)


def test_a_required_tool_is_called(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_tokens=400
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
    call: Any = choice.message.tool_calls[0]
    assert call.function.name == "cut_clip" and json.loads(call.function.arguments)["where"] in ("start", "end")
    again: Any = [*HELLO, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    assert client.chat.completions.create(model=MODEL, messages=again, tools=[TOOL], max_tokens=2).choices


def test_a_tool_call_comes_in_pieces(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=HELLO, tools=[TOOL], max_tokens=400, parallel_tool_calls=False,
        tool_choice={"type": "function", "function": {"name": "cut_clip"}},
    ) as stream:  # fmt: skip
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    calls: Any = final.choices[0].message.tool_calls
    assert json.loads(calls[0].function.arguments)["where"] in ("start", "end")


def test_a_video_is_uploaded_and_asked_about(client: OpenAI, video: Path) -> None:
    file = client.files.create(file=video, purpose="user_data")
    assert client.files.retrieve(file.id).bytes == video.stat().st_size
    assert client.files.content(file.id).read() == video.read_bytes()
    content: Any = [{"type": "file", "file": {"file_id": file.id}}, {"type": "text", "text": "what happens?"}]
    answer: Any = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": content}], max_tokens=2
    )
    assert answer.usage.media[0]["frames"] == 8
    assert client.files.delete(file.id).deleted
    with pytest.raises(NotFoundError):
        client.files.retrieve(file.id)


def test_a_picture_in_a_data_url(client: OpenAI) -> None:
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (112, 56), "red").save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    part: Any = {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}
    answer: Any = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": [part]}], max_tokens=2
    )
    assert (answer.usage.media[0]["source_width"], answer.usage.media[0]["source_height"]) == (112, 56)


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=3, echo=True)
    assert [choice.text[0] for choice in answer.choices] == ["a", "b"]
    pieces = client.completions.create(model=MODEL, prompt="a", max_tokens=3, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == answer.choices[0].text[1:]


def test_responses(client: OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="hello", max_output_tokens=8)
    again = client.responses.create(
        model=MODEL, max_output_tokens=8, input=[{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]
    )
    assert answer.output_text == again.output_text
    assert answer.usage is not None and answer.usage.output_tokens <= 8


def test_responses_stream(client: OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="hello", text_format=Verdict, max_output_tokens=400) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [events[0].type, events[-1].type] == ["response.created", "response.completed"]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == final.output_text
    assert [event.sequence_number for event in events] == sorted(event.sequence_number for event in events)


def test_responses_call_a_function_and_read_its_result(client: OpenAI) -> None:
    tool: Any = {"type": "function", **TOOL["function"], "strict": True}
    first = client.responses.create(
        model=MODEL, input="hello", tools=[tool], tool_choice="required", max_output_tokens=400
    )
    call: Any = first.output[0]
    assert call.type == "function_call" and json.loads(call.arguments)
    conversation: Any = [{"role": "user", "content": "hello"}, *first.output]
    conversation.append({"type": "function_call_output", "call_id": call.call_id, "output": "done"})
    assert client.responses.create(model=MODEL, input=conversation, tools=[tool], max_output_tokens=2).output


def test_responses_parse(client: OpenAI) -> None:
    answer = client.responses.parse(model=MODEL, input="hello", text_format=Verdict, max_output_tokens=300)
    assert isinstance(answer.output_parsed, Verdict)


def test_mistakes_are_the_clients_own_exceptions(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="top_p") as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, top_p=7)
    assert caught.value.param == "top_p"
    with pytest.raises(NotFoundError, match="is not served here"):
        client.models.retrieve("gpt-5")
    with pytest.raises(BadRequestError, match="context holds 2048"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a b " * 2048}], stream=True)
