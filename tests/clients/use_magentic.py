"""magentic: functions whose bodies are prompts."""

from typing import Any, Literal

import common
import openai
from common import KEY, MODEL, case, check_answer, check_city, raises
from magentic import FunctionCall, ImageBytes, OpenaiChatModel, StreamedStr, UserMessage, chatprompt, prompt
from pydantic import BaseModel


class Verdict(BaseModel):
    """A form of a reply."""

    answer: Literal["yes", "no"]


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def model(**fields: Any) -> OpenaiChatModel:
    return OpenaiChatModel(MODEL, api_key=KEY, base_url=common.API, **{"max_tokens": 200, "temperature": 0, **fields})


@prompt("hello", model=model())
def say() -> str: ...


@prompt("hello", model=model())
def stream() -> StreamedStr: ...


@prompt("hello", model=model())
def judge() -> Verdict: ...


@prompt("hello", functions=[get_weather], model=model())
def call() -> FunctionCall[str]: ...


@chatprompt(UserMessage([ImageBytes(common.png()), "what colour is it?"]), model=model())
def look() -> str: ...


@prompt("hello", model=model(temperature=9))
def fail() -> str: ...


@case("chat")
def _() -> None:
    assert say()


@case("stream")
def _() -> None:
    assert "".join(stream()) == say()


@case("image")
def _() -> None:
    assert look()


@case("tools")
def _() -> None:
    called = call()
    check_city(called.arguments)
    assert called().startswith("sunny")


@case("structured")
def _() -> None:
    check_answer(judge().model_dump())


@case("errors")
def _() -> None:
    raises(openai.BadRequestError, fail, "temperature")


common.report()
