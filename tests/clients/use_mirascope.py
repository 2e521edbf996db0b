"""mirascope: calls, tools and formats over the OpenAI provider at another address."""

from __future__ import annotations

from typing import Any, Literal

import common
from common import KEY, MODEL, case, check_answer, check_city, raises
from mirascope import llm
from pydantic import BaseModel

llm.register_provider("openai", scope="openai/", base_url=common.API, api_key=KEY)


class Verdict(BaseModel):
    """A form of a reply."""

    answer: Literal["yes", "no"]


@llm.tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def model(kind: str = "completions", **fields: Any) -> Any:
    return llm.Model(f"openai/{MODEL}:{kind}", **{"max_tokens": 200, **fields})


@case("chat")
def _() -> None:
    response = model().call("hello")
    assert response.text() and response.resume("and then?").text()


@case("stream")
def _() -> None:
    assert "".join(model().stream("hello").text_stream()).rstrip("\n") == model().call("hello").text()


@case("image")
def _() -> None:
    picture = llm.Image.from_bytes(common.png())
    assert model().call([llm.messages.user(["what colour is it?", picture])]).text()


@case("tools")
def _() -> None:
    response = model().call("hello", tools=[get_weather])
    for call in response.tool_calls:
        check_city(call.args)
    check_answer(model().call("hello", format=llm.format(Verdict, mode="tool")).parse().model_dump())


@case("structured")
def _() -> None:
    check_answer(model().call("hello", format=llm.format(Verdict, mode="strict")).parse().model_dump())


@case("responses")
def _() -> None:
    assert model("responses").call("hello").text()
    check_answer(model("responses").call("hello", format=llm.format(Verdict, mode="strict")).parse().model_dump())


@case("errors")
def _() -> None:
    raises(llm.BadRequestError, lambda: model().call("word " * 40_000), "context")


common.report()
