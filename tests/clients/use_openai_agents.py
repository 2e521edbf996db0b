"""openai-agents: agents over responses, its default, and over chat completions."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import common
import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from common import KEY, MODEL, case, check_answer, raises
from pydantic import BaseModel

set_tracing_disabled(True)
KINDS: Any = (OpenAIResponsesModel, OpenAIChatCompletionsModel)
requested: list[str] = []


class Verdict(BaseModel):
    """A form of a reply."""

    answer: Literal["yes", "no"]


@function_tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    requested.append(city)
    return "sunny"


def agent(kind: Any = OpenAIResponsesModel, settings: Any = None, **fields: Any) -> Agent:
    # A client of its own: each run has an event loop of its own.
    model = kind(MODEL, openai.AsyncOpenAI(base_url=common.API, api_key=KEY, max_retries=0))
    options = {"max_tokens": 24, "temperature": 0, **(settings or {})}
    return Agent("helper", instructions="Be brief.", model=model, model_settings=ModelSettings(**options), **fields)


async def text_of(streamed: Any) -> str:
    text = ""
    async for event in streamed.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            text += event.data.delta
    return text


@case("chat")
def _() -> None:
    for kind in KINDS:
        result = Runner.run_sync(agent(kind), "hello")
        assert result.final_output
        again = [*result.to_input_list(), {"role": "user", "content": "and then?"}]
        assert Runner.run_sync(agent(kind), again).final_output
    first = Runner.run_sync(agent(), "hello")
    assert Runner.run_sync(agent(), "more", previous_response_id=first.last_response_id).final_output


@case("stream")
async def _() -> None:
    for kind in KINDS:
        streamed = Runner.run_streamed(agent(kind), "hello")
        assert await text_of(streamed) == streamed.final_output == (await Runner.run(agent(kind), "hello")).final_output


@case("image")
def _() -> None:
    parts = [{"type": "input_image", "image_url": common.image_url(), "detail": "auto"},
             {"type": "input_text", "text": "what colour is it?"}]  # fmt: skip
    for kind in KINDS:
        assert Runner.run_sync(agent(kind), [{"role": "user", "content": parts}]).final_output


@case("tools")
def _() -> None:
    for kind in KINDS:
        settings = {"max_tokens": 100, "tool_choice": "required", "parallel_tool_calls": False}
        requested.clear()
        caller = agent(kind, settings, tools=[get_weather], tool_use_behavior="stop_on_first_tool")
        result = Runner.run_sync(caller, "hello")
        assert result.final_output == "sunny" and requested[0] in ("Paris", "Rome")
        again = [*result.to_input_list(), {"role": "user", "content": "and then?"}]
        check_answer(
            Runner.run_sync(agent(kind, {"max_tokens": 200}, output_type=Verdict), again).final_output.model_dump()
        )


@case("structured")
def _() -> None:
    for kind in KINDS:
        result = Runner.run_sync(agent(kind, {"max_tokens": 200}, output_type=Verdict), "hello")
        check_answer(result.final_output.model_dump())


@case("errors")
def _() -> None:
    for kind in KINDS:
        failing = agent(kind, {"temperature": 9})
        raises(openai.BadRequestError, partial(Runner.run_sync, failing, "hello"), "temperature")


common.report()
