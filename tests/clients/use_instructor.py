"""instructor: typed replies in each of its modes that a server can serve."""

from __future__ import annotations

from typing import Any, Literal

import common
import instructor
from common import KEY, MODEL, case, check_answer, check_interval, raises
from instructor.core import InstructorRetryException
from openai import OpenAI
from pydantic import BaseModel


class Verdict(BaseModel):
    """A form of a reply."""

    answer: Literal["yes", "no"]


class Moment(BaseModel):
    """An answer about a video."""

    text: Literal["2.0 to 14.0", "0.0 to 1.0"]


official = OpenAI(base_url=common.API, api_key=KEY, max_retries=0)
HELLO: Any = [{"role": "user", "content": "hello"}]
MODES = (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS, instructor.Mode.JSON)


def ask(mode: instructor.Mode, messages: Any = HELLO, kind: Any = Verdict, **fields: Any) -> Any:
    client = instructor.from_openai(official, mode=mode)
    options = {"max_tokens": 300, "max_retries": 1, **fields}
    return client.chat.completions.create(model=MODEL, messages=messages, response_model=kind, **options)


@case("chat")
def _() -> None:
    client = instructor.from_openai(official)
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, response_model=None, max_tokens=24)
    assert answer.choices[0].message.content


@case("structured")
def _() -> None:
    check_answer(ask(instructor.Mode.JSON_SCHEMA).model_dump())


@case("tools")
def _() -> None:
    check_answer(ask(instructor.Mode.TOOLS).model_dump())


@case("stream")
def _() -> None:
    client = instructor.from_openai(official, mode=instructor.Mode.JSON_SCHEMA)
    parts = list(
        client.chat.completions.create_partial(model=MODEL, messages=HELLO, response_model=Verdict, max_tokens=300)
    )
    check_answer(parts[-1].model_dump())


@case("image")
def _() -> None:
    content = ["what colour is it?", instructor.Image.from_base64(common.image_url())]
    check_answer(ask(instructor.Mode.JSON_SCHEMA, [{"role": "user", "content": content}]).model_dump())


@case("video")
def _() -> None:
    check_interval(ask(instructor.Mode.JSON_SCHEMA, [common.video_message()], Moment).text)


@case("responses")
def _() -> None:
    client = instructor.from_openai(official, mode=instructor.Mode.RESPONSES_TOOLS)
    check_answer(client.responses.create(model=MODEL, input="hello", response_model=Verdict).model_dump())


@case("errors")
def _() -> None:
    raises(InstructorRetryException, lambda: ask(instructor.Mode.TOOLS, temperature=9), "temperature")


common.report()
