"""The bodies of requests. Every number has its range, every list its length, and a field that is not here is refused.

Messages and their parts are open objects here: `keye.chat` and `media_parts` check them, with sentences of their own.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from keye.engine.sampling import MAX_SEED

Text = Annotated[str, Field(max_length=1_000_000)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Stop = StopText | Annotated[list[StopText], Field(max_length=16)] | None
Object = dict[str, Any]
Objects = Annotated[list[Object], Field(min_length=1, max_length=1024)]
Interval = Annotated[list[Annotated[float, Field(ge=0, le=1e7)]], Field(min_length=2, max_length=2)]

#: Fields of OpenAI's that change nothing here and may be sent.
_HARMLESS = frozenset(
    {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "verbosity"}
)
#: Fields of OpenAI's that would change the answer, with the values under which they do not.
_UNMET: dict[str, tuple[tuple[Any, ...], str]] = {
    "store": ((None, False), "nothing is stored here; leave it out"),
    "audio": ((None,), "keye writes text only"),
    "modalities": ((None, ["text"]), "keye writes text only"),
    "logit_bias": ((None, {}), "it is not supported; use structured_outputs to restrict a reply"),
    "frequency_penalty": ((None, 0), "it is not supported; use repetition_penalty"),
    "presence_penalty": ((None, 0), "it is not supported; use repetition_penalty"),
    "functions": ((None, []), "it is out of date; use tools"),
    "function_call": ((None, "none", "auto"), "it is out of date; use tool_choice"),
    "prediction": ((None,), "it is not supported"),
    "web_search_options": ((None,), "keye does not search the web"),
    "moderation": ((None,), "it is not supported"),
    "suffix": ((None, ""), "it is not supported"),
    "background": ((None, False), "requests run while the client waits"),
    "previous_response_id": ((None,), "nothing is stored here; send the whole conversation as input"),
    "conversation": ((None,), "nothing is stored here; send the whole conversation as input"),
    "prompt": ((None,), "stored prompts are not supported"),
    "include": ((None, []), "it is not supported"),
    "truncation": ((None, "disabled"), "a prompt that is too long is refused, never cut"),
}


class Body(BaseModel):
    """What every body has in common: unknown fields are refused, numbers are numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class OpenAIBody(Body):
    """A body that OpenAI's clients send: what means nothing here is dropped, what cannot be done is refused."""

    @model_validator(mode="before")
    @classmethod
    def _without_unmet(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, (fine, reason) in _UNMET.items():
            if name in data and name not in cls.model_fields and data[name] not in fine:
                raise ValueError(f"{name} cannot be used: {reason}")
        dropped = (_HARMLESS | _UNMET.keys()) - cls.model_fields.keys()
        return {key: value for key, value in data.items() if key not in dropped}


class Sampling(OpenAIBody):
    """How tokens are drawn; what is not given is the model's own."""

    model: Name | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = Field(default=None, description="0 and -1 switch it off")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=MAX_SEED)] | None = None
    stop: Stop = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    attention: Literal["sparse", "dense"] | None = None


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None
    continuous_usage_stats: Literal[False] | None = None


class KeyeFields(Body):
    """keye's own: which frames an answer rests on, and how far a request has come."""

    evidence: bool = False
    progress: bool = False


class StructuredOutputs(Body):
    """A form of the reply; one of them."""

    json_schema: Object | None = Field(default=None, alias="json")
    regex: Annotated[str, Field(min_length=1, max_length=65_536)] | None = None
    choice: Annotated[list[StopText], Field(min_length=1, max_length=1024)] | None = None
    grammar: Annotated[str, Field(min_length=1, max_length=65_536)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.json_schema, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("give one of json, regex, choice and grammar")
        return self


class TemplateFields(Body):
    enable_thinking: bool | None = None


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
TokenCount = Annotated[int, Field(ge=1, le=10_000_000)]


class ChatRequest(Sampling):
    messages: Objects
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Object], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Object | None = None
    parallel_tool_calls: bool | None = None
    response_format: Object | None = None
    structured_outputs: StructuredOutputs | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: TemplateFields | None = None
    preprocess_kwargs: Object | None = Field(default=None, description="settings of every medium without its own")
    keye: KeyeFields = KeyeFields()


class CompletionRequest(Sampling):
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=64)]
    max_tokens: TokenCount | None = 16
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    best_of: Annotated[int, Field(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    structured_outputs: StructuredOutputs | None = None


class Reasoning(Body):
    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseRequest(Sampling):
    input: Text | Objects
    instructions: Text | None = None
    previous_response_id: Annotated[str, Field(max_length=256)] | None = Field(
        default=None, description="the stored response that this one follows"
    )
    store: bool | None = Field(default=None, description="false: the response cannot be referred to later")
    metadata: Annotated[dict[str, Any], Field(max_length=16)] | None = None
    max_output_tokens: TokenCount | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[Object], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Object | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[int, Field(ge=1, le=1024)] | None = None
    text: Object | None = None
    reasoning: Reasoning | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    preprocess_kwargs: Object | None = None


class PlanRequest(Body):
    model: Name | None = None
    content: Annotated[list[Object], Field(min_length=1, max_length=256)]
    preprocess_kwargs: Object | None = None


class GroundRequest(Sampling):
    video: Object
    event: Annotated[str, Field(min_length=1, max_length=10_000)]
    max_tokens: TokenCount | None = None
    stream: bool | None = None
    evidence: bool = False
    preprocess_kwargs: Object | None = None


class ClipsRequest(Body):
    file_id: Name
    intervals: Annotated[list[Interval], Field(min_length=1, max_length=100)]
    preprocess_kwargs: Object | None = None


class IndexRequest(Body):
    model: Name | None = None
    file_id: Name
    preprocess_kwargs: Object | None = None


class LiveRequest(Body):
    model: Name | None = None
    keep: Literal["all", "recent"] = "all"
    preprocess_kwargs: Object | None = None


class LiveAppend(Body):
    frames: (
        Annotated[list[Annotated[str, Field(max_length=50_000_000)]], Field(min_length=1, max_length=256)] | None
    ) = None
    timestamps: Annotated[list[Annotated[float, Field(ge=0, le=1e7)]], Field(max_length=256)] | None = None
    file_id: Name | None = None
    offset: Annotated[float, Field(ge=0, le=1e7)] = 0.0


class LiveAsk(Body):
    question: Annotated[str, Field(min_length=1, max_length=100_000)]
    max_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stream: bool | None = None
    evidence: bool = False


class TokenizeRequest(Body):
    model: Name | None = None
    prompt: Text | None = None
    messages: Objects | None = None
    tools: Annotated[list[Object], Field(max_length=128)] | None = None
    chat_template_kwargs: TemplateFields | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of them")
        return self
