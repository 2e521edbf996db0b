"""Bodies of the interfaces beside OpenAI's: Anthropic's messages, SGLang's generate, vLLM's detokenize."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from keye.server.openai.schemas import Name, Object, Objects, Sampling, StopText, Text, TokenCount, Tolerant

TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=10_000_000)]], Field(fail_fast=True, min_length=1, max_length=300_000)
]
#: One value for each of several prompts.
Each = Field(fail_fast=True, max_length=64)
#: URLs, uploads or base64, each as long as a body may be.
MediaNames = str | Annotated[list[Any], Field(max_length=256)] | None


class Thinking(Tolerant):
    """Whether the model reasons before it answers."""

    _where = "thinking."

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: TokenCount | None = None


class OutputConfig(Tolerant):
    """The form of the reply."""

    _where = "output_config."

    format: Object | None = None


class CountTokensRequest(Sampling):
    """A prompt in Anthropic's form, as /v1/messages/count_tokens takes it."""

    messages: Objects
    system: Text | Annotated[list[Object], Field(fail_fast=True, max_length=256)] | None = None
    tools: Annotated[list[Object], Field(fail_fast=True, max_length=128)] | None = None
    tool_choice: Object | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: Object | None = None
    mcp_servers: Annotated[list[Object], Field(fail_fast=True, max_length=0)] | None = None
    preprocess_kwargs: Object | None = Field(default=None, description="settings of every medium without its own")


class MessagesRequest(CountTokensRequest):
    """A body of /v1/messages."""

    max_tokens: TokenCount
    stop_sequences: Annotated[list[StopText], Field(fail_fast=True, max_length=16)] | None = None
    stream: bool | None = None


class GenerateRequest(Tolerant):
    """A body of /generate: one prompt, or a list of them, as text or as token ids."""

    text: Text | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=64)] | None = None
    input_ids: TokenIds | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=64)] | None = None
    image_data: MediaNames = None
    video_data: MediaNames = None
    sampling_params: Object | Annotated[list[Object], Field(fail_fast=True, max_length=64)] | None = None
    model: Name | None = None
    rid: str | Annotated[list[str], Each] | None = Field(default=None, description="returned in meta_info.id")
    stream: bool | None = None
    return_logprob: bool | Annotated[list[bool], Each] | None = None
    logprob_start_len: int | Annotated[list[int], Each] | None = Field(
        default=None, description="-1: probabilities of new tokens only"
    )
    top_logprobs_num: Annotated[int, Field(ge=0, le=20)] | None = None
    return_text_in_logprobs: bool | None = None
    preprocess_kwargs: Object | None = Field(default=None, description="settings of every medium without its own")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.text is None) == (self.input_ids is None):
            raise ValueError("give text or input_ids, one of them")
        return self


class DetokenizeRequest(Tolerant):
    """A body of /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, le=10_000_000)]], Field(fail_fast=True, max_length=300_000)]
    skip_special_tokens: bool = False
