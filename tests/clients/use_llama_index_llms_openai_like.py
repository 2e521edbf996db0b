"""llama-index with OpenAILike."""

from typing import Any, Literal

import common
import openai
from common import KEY, MODEL, case, check_answer, check_city, raises
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Verdict(BaseModel):
    """A form of a reply."""

    answer: Literal["yes", "no"]


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def model(**fields: Any) -> OpenAILike:
    options = {"max_tokens": 24, "max_retries": 0, "temperature": 0, **fields}
    return OpenAILike(
        model=MODEL, api_base=common.API, api_key=KEY, is_chat_model=True, is_function_calling_model=True, **options
    )


HELLO = [ChatMessage(role="user", content="hello")]


@case("chat")
def _() -> None:
    assert model().chat(HELLO).message.content and model().complete("hello").text


@case("stream")
def _() -> None:
    text = "".join(piece.delta or "" for piece in model().stream_chat(HELLO))
    assert text == model().chat(HELLO).message.content


@case("image")
def _() -> None:
    blocks = [ImageBlock(image=common.png(), image_mimetype="image/png"), TextBlock(text="what colour is it?")]
    assert model().chat([ChatMessage(role="user", blocks=blocks)]).message.content


@case("tools")
def _() -> None:
    tool = FunctionTool.from_defaults(get_weather)
    answer = model(max_tokens=200).chat_with_tools([tool], user_msg="hello", tool_required=True)
    (call,) = model().get_tool_calls_from_response(answer)[:1]
    check_city(call.tool_kwargs)
    result = ChatMessage(role="tool", content="sunny", additional_kwargs={"tool_call_id": call.tool_id})
    assert model().chat([*HELLO, answer.message, result])


@case("structured")
def _() -> None:
    structured = model(max_tokens=200).as_structured_llm(Verdict).complete("hello").raw
    check_answer(structured.model_dump())


@case("errors")
def _() -> None:
    wrong = {"additional_kwargs": {"top_p": 9}}
    raises(openai.BadRequestError, lambda: model(**wrong).chat(HELLO), "top_p")


common.report()
