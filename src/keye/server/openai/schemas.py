"""The bodies of requests. Every number has its range and every list its length. A field that is not here is refused in
the bodies that are keye's own, and read by `fields` in those that many programs write.

Messages and their parts are open objects here: `keye.chat` and `media_parts` check them, with sentences of their own.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from keye.engine.sampling import MAX_LISTED, MAX_SEED
from keye.server.openai.fields import read_fields

Text = Annotated[str, Field(max_length=1_000_000)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Stop = StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=16)] | None
Object = dict[str, Any]
Objects = Annotated[list[Object], Field(fail_fast=True, min_length=1, max_length=1024)]
Tools = Annotated[list[Object], Field(fail_fast=True, max_length=128)]
TokenText = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_LISTED)]
PromptIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=1_048_576)]
Interval = Annotated[list[Annotated[float, Field(ge=0, le=1e7)]], Field(min_length=2, max_length=2)]


Bias = Annotated[float, Field(ge=-100, le=100)]


def _check_count(value: object) -> object:
    """A table of at most as many entries as there may be; each wrong one would make an error."""
    if isinstance(value, dict) and len(value) > MAX_LISTED:
        raise ValueError(f"it has more than {MAX_LISTED:,} entries")
    return value


class Body(BaseModel):
    """What every body has in common: unknown fields are refused, numbers are numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Tolerant(BaseModel):
    """An object that programs send, in whatever dialect: see `fields`. `_where` stands before its fields' names."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)
    _where: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return read_fields(data, known, where=cls._where)


class Sampling(Tolerant):
    """How tokens are drawn; what is not given is the model's own."""

    model: Annotated[str, Field(max_length=256)] | None = Field(
        default=None, description="any name is taken where one model is served"
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = Field(default=None, description="0 and -1 switch it off")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenText, Bias], BeforeValidator(_check_count)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=MAX_SEED)] | None = None
    stop: Stop = None
    stop_token_ids: TokenIds | None = None
    min_tokens: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    bad_words: Annotated[list[StopText], Field(fail_fast=True, max_length=256)] | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = Field(default=None, description="SGLang's name of include_stop_str_in_output")
    thinking_token_budget: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    attention: Literal["sparse", "dense"] | None = None
    deterministic: bool | None = None


class StreamOptions(Tolerant):
    _where = "stream_options."

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class KeyeFields(Body):
    """keye's own: which frames an answer rests on, and how far a request has come."""

    evidence: bool = False
    progress: bool = False


Schema = Object | Annotated[str, Field(min_length=1, max_length=65_536)]
Pattern = Annotated[str, Field(min_length=1, max_length=65_536)]
Choices = Annotated[list[StopText], Field(fail_fast=True, min_length=1, max_length=1024)]


class StructuredOutputs(Tolerant):
    """A form of the reply; one of them."""

    _where = "structured_outputs."

    json_schema: Schema | None = Field(default=None, alias="json")
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Pattern | None = Field(default=None, description="in Lark's syntax, or in GBNF with a rule `root`")
    json_object: bool | None = None
    structural_tag: Schema | None = None


class Forms(BaseModel):
    """The same forms under the names that other servers give them; `form_of` takes one of all."""

    response_format: Object | None = None
    structured_outputs: StructuredOutputs | None = None
    json_schema: Schema | None = None
    regex: Pattern | None = None
    ebnf: Pattern | None = None
    grammar: Pattern | None = None
    structural_tag: Schema | None = None
    guided_json: Schema | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Pattern | None = None


class TemplateFields(Tolerant):
    _where = "chat_template_kwargs."

    enable_thinking: bool | None = None
    thinking: bool | None = None


class MediaIO(Tolerant):
    """vLLM's settings of videos."""

    _where = "media_io_kwargs."

    video: Object | None = None
    image: Object | None = None


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
TokenCount = Annotated[int, Field(ge=1, le=10_000_000)]
Alternatives = Annotated[int, Field(ge=0, le=20)]


class Preprocess(BaseModel):
    preprocess_kwargs: Object | None = Field(default=None, description="settings of every medium without its own")


class MediaDefaults(Preprocess):
    mm_processor_kwargs: Object | None = Field(default=None, description="the same under vLLM's names")
    media_io_kwargs: MediaIO | None = None


class Streamed(BaseModel):
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatFields(Streamed, MediaDefaults):
    """What chats and responses share."""

    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | Object | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Alternatives | None = None
    chat_template_kwargs: TemplateFields | None = None
    timings_per_token: bool | None = Field(default=None, description="llama.cpp's: chunks have the speed of tokens")
    return_progress: bool | None = Field(
        default=None, description="llama.cpp's: chunks have the progress of the prompt"
    )


class ChatRequest(Sampling, Forms, ChatFields):
    messages: Objects
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    logprobs: bool | None = None
    prompt_logprobs: Alternatives | None = None
    return_token_ids: bool | None = None
    reasoning_effort: Effort | None = None
    separate_reasoning: bool | None = None
    include_reasoning: bool | None = None
    enable_thinking: bool | None = None
    thinking: bool | Object | None = Field(default=None, description='or {"type": "enabled"}, as others have it')
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = Field(default=None, description="with continue_final_message: the reply repeats its beginning")
    verbose: bool | None = Field(default=None, description="llama.cpp's: the reply has the text of the prompt")
    keye: KeyeFields | None = None


class CompletionRequest(Sampling, Forms, Streamed):
    prompt: (
        Text | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=64)] | PromptIds
        | Annotated[list[PromptIds], Field(fail_fast=True, min_length=1, max_length=64)]
    )  # fmt: skip
    max_tokens: Annotated[int, Field(ge=0, le=10_000_000)] | None = Field(
        default=16, description="0 with echo: nothing is generated, the prompt alone is scored"
    )
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    best_of: Annotated[int, Field(ge=1, le=16)] | None = None
    logprobs: Alternatives | None = None
    prompt_logprobs: Alternatives | None = None
    echo: bool | None = None
    return_token_ids: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=10_000_000)] | None = None


class Reasoning(Tolerant):
    _where = "reasoning."

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseRequest(Sampling, Forms, ChatFields):
    input: Text | Objects
    instructions: Text | None = None
    previous_response_id: Annotated[str, Field(max_length=256)] | None = Field(
        default=None, description="the stored response that this one follows"
    )
    store: bool | None = Field(default=None, description="false: the response cannot be referred to later")
    metadata: Annotated[dict[str, Any], Field(max_length=16)] | None = None
    max_output_tokens: TokenCount | None = None
    text: Object | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=64)] | None = None


class LoadAdapterRequest(Body):
    """POST /v1/load_lora_adapter. With `load_inplace` it takes the place of one that is called so."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadAdapterRequest(Body):
    """POST /v1/unload_lora_adapter. The number that vLLM gives adapters has no meaning here."""

    lora_name: Name
    lora_int_id: int | None = None


class TokenizeRequest(Tolerant):
    model: Annotated[str, Field(max_length=256)] | None = None
    prompt: Text | None = None
    messages: Objects | None = None
    tools: Tools | None = None
    chat_template_kwargs: TemplateFields | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of them")
        return self


# Interfaces beside OpenAI's: Anthropic's messages, SGLang's generate, vLLM's detokenize.

PromptTokens = Annotated[
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


class CountTokensRequest(Sampling, Preprocess):
    """A prompt in Anthropic's form, as /v1/messages/count_tokens takes it."""

    messages: Objects
    system: Text | Annotated[list[Object], Field(fail_fast=True, max_length=256)] | None = None
    tools: Tools | None = None
    tool_choice: Object | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: Object | None = None
    mcp_servers: Annotated[list[Object], Field(fail_fast=True, max_length=0)] | None = None


class MessagesRequest(CountTokensRequest):
    """A body of /v1/messages."""

    max_tokens: TokenCount
    stop_sequences: Annotated[list[StopText], Field(fail_fast=True, max_length=16)] | None = None
    stream: bool | None = None


class GenerateRequest(Tolerant, Preprocess):
    """A body of /generate: one prompt, or a list of them, as text or as token ids."""

    text: Text | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=64)] | None = None
    input_ids: (
        PromptTokens | Annotated[list[PromptTokens], Field(fail_fast=True, min_length=1, max_length=64)] | None
    ) = None
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

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        if (self.text is None) == (self.input_ids is None):
            raise ValueError("give text or input_ids, one of them")
        return self


class DetokenizeRequest(Tolerant):
    """A body of /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, le=10_000_000)]], Field(fail_fast=True, max_length=300_000)]
    skip_special_tokens: bool = False
