"""langchain-openai: ChatOpenAI over chat completions and over responses."""

from __future__ import annotations

from typing import Any, Literal

import common
import openai
from common import KEY, MODEL, case, check_answer, check_city, check_interval, raises
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel


class Verdict(BaseModel):
    """A form of a reply."""

    answer: Literal["yes", "no"]


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def model(**fields: Any) -> ChatOpenAI:
    options = {"max_tokens": 24, "max_retries": 0, "temperature": 0, **fields}
    return ChatOpenAI(model=MODEL, base_url=common.API, api_key=KEY, **options)


@case("chat")
def _() -> None:
    answer = model().invoke("hello")
    assert answer.content and answer.usage_metadata["total_tokens"] > 0


@case("stream")
def _() -> None:
    text = "".join(chunk.content for chunk in model().stream("hello"))
    assert text == model().invoke("hello").content


@case("image")
def _() -> None:
    block = {"type": "image", "base64": common.image_base64(), "mime_type": "image/png"}
    assert model().invoke([HumanMessage([block, {"type": "text", "text": "what colour is it?"}])]).content


@case("video")
def _() -> None:
    check_interval(model().invoke([HumanMessage(common.video_message()["content"])]).content)


@case("tools")
def _() -> None:
    bound = model(max_tokens=200).bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False)
    message = bound.invoke("hello")
    check_city(message.tool_calls[0]["args"])
    result = get_weather.invoke(message.tool_calls[0])
    assert isinstance(result, ToolMessage)
    assert model().bind_tools([get_weather]).invoke([HumanMessage("hello"), message, result])


@case("structured")
def _() -> None:
    for method in ("json_schema", "function_calling"):
        verdict = model(max_tokens=200).with_structured_output(Verdict, method=method).invoke("hello")
        check_answer(verdict.model_dump())


@case("responses")
def _() -> None:
    responses = model(use_responses_api=True, use_previous_response_id=True)
    first = responses.invoke("hello")
    assert first.text and responses.invoke([HumanMessage("hello"), first, HumanMessage("more")]).text
    assert "".join(chunk.text for chunk in responses.stream("hello")) == first.text


@case("completions")
def _() -> None:
    assert isinstance(OpenAI(model=MODEL, base_url=common.API, api_key=KEY, max_tokens=8).invoke("hello"), str)


@case("errors")
def _() -> None:
    raises(openai.BadRequestError, lambda: model(temperature=9).invoke("hello"), "temperature")


common.report()
