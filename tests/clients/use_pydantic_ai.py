"""pydantic-ai: agents over chat completions and over responses."""

from __future__ import annotations

from typing import Any, Literal

import common
from common import KEY, MODEL, case, check_answer, raises
from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=common.API, api_key=KEY)
chat = OpenAIChatModel(MODEL, provider=provider)
SETTINGS: Any = {"max_tokens": 24, "temperature": 0}


class Verdict(BaseModel):
    """A form of a reply."""

    answer: Literal["yes", "no"]


def agent(model: Any = chat, **fields: Any) -> Agent[None, Any]:
    return Agent(model, model_settings={**SETTINGS, **fields.pop("settings", {})}, **fields)


@case("chat")
def _() -> None:
    result = agent(system_prompt="Be brief.").run_sync("hello")
    assert result.output
    assert agent().run_sync("and then?", message_history=result.all_messages()).output


@case("stream")
async def _() -> None:
    async with agent().run_stream("hello") as stream:
        text = await stream.get_output()
    assert text == (await agent().run("hello")).output


@case("image")
def _() -> None:
    assert agent().run_sync(["what colour is it?", BinaryContent(common.png(), media_type="image/png")]).output


@case("tools")
def _() -> None:
    def get_weather(city: Literal["Paris", "Rome"]) -> str:
        """The weather of a city."""
        return f"sunny in {city}"

    # A function whose result ends the run: the model must call it.
    caller = agent(output_type=get_weather, settings={"max_tokens": 200, "parallel_tool_calls": False})
    result = caller.run_sync("hello")
    assert result.output in ("sunny in Paris", "sunny in Rome")
    assert agent().run_sync("and then?", message_history=result.all_messages()).output


@case("structured")
def _() -> None:
    settings = {"max_tokens": 200}
    check_answer(agent(output_type=NativeOutput(Verdict), settings=settings).run_sync("hello").output.model_dump())
    check_answer(agent(output_type=ToolOutput(Verdict), settings=settings).run_sync("hello").output.model_dump())


@case("responses")
def _() -> None:
    responses = OpenAIResponsesModel(MODEL, provider=provider)
    result = agent(responses).run_sync("hello")
    assert result.output
    assert agent(responses).run_sync("and then?", message_history=result.all_messages()).output
    settings = {"max_tokens": 200}
    check_answer(agent(responses, output_type=Verdict, settings=settings).run_sync("hello").output.model_dump())


@case("errors")
def _() -> None:
    raises(ModelHTTPError, lambda: agent(settings={"temperature": 9}).run_sync("hello"), "temperature")


common.report()
