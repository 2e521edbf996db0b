"""From the body of a chat to a request for the engine: messages, media, tools, thinking, the form of the reply.

Everything here that blocks runs in a thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from keye.api import Keye
from keye.chat.messages import Message
from keye.chat.template import ChatTemplate, Segment, count_marks, opens_reasoning
from keye.engine.guide import Form, Guide
from keye.engine.prompt import Prompt
from keye.engine.request import GenerationRequest
from keye.engine.sampling import MAX_SEED
from keye.errors import ContextError, KeyeError
from keye.server.context import Context
from keye.server.edge.errors import ApiError
from keye.server.errors import error_of_mistake
from keye.server.notes import add_note, current_notes
from keye.server.openai.forms import choose_tools, form_of
from keye.server.openai.media_parts import media_of, media_settings, open_sources, to_messages
from keye.server.openai.schemas import ChatRequest, Sampling, StreamOptions, TemplateFields

_SWITCHES: Final = {"/think": True, "/no_think": False}
#: Messages, and characters of each, that are prepared in the event loop.
_SHORT_MESSAGES, _SHORT_TEXT = 4, 1000

#: Reasoning is returned beside the answer, inside it, or not at all.
ReasoningPlace = Literal["apart", "inside", "nowhere"]


@dataclass(frozen=True)
class ChatQuery:
    """What a chat asks for, from any route. `continues`: the last message is the beginning of the reply, which `echo`
    repeats."""

    messages: Sequence[Mapping[str, Any]]
    sampling: Sampling
    max_tokens: int | None = None
    n: int = 1
    logprobs: int | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: object = None
    parallel_calls: bool = True
    form: Form | None = None
    thinking: bool | None = None
    media_defaults: Mapping[str, Any] | None = None
    evidence: bool = False
    prompt_logprobs: int | None = None
    add_generation_prompt: bool = True
    continues: bool = False
    echo: bool = False
    reasoning_place: ReasoningPlace = "apart"

    @property
    def continues_reply(self) -> bool:
        """Whether the request or the last message itself says that it is the beginning of the reply."""
        last = self.messages[-1]
        marked = last.get("prefix") is True or last.get("partial") is True
        return self.continues or (last.get("role") == "assistant" and marked)

    @property
    def is_short(self) -> bool:
        """Whether preparing takes less time than handing it to a thread: a few words, without media, tools or a
        form."""
        if self.tools or self.form is not None or len(self.messages) > _SHORT_MESSAGES:
            return False
        contents = [message.get("content") for message in self.messages]
        return all(isinstance(content, str) and len(content) <= _SHORT_TEXT for content in contents)


@dataclass(frozen=True)
class PreparedChat:
    """A request with its rendered prompt, and what its reply needs to be parsed: whether `tools` were offered, where
    reasoning is placed, whether the reply `continues` a text of the prompt, and that text where it is to be repeated
    (`echo`). `notes` are sentences on settings that are not honoured."""

    request: GenerationRequest
    prompt: Sequence[Segment]
    tools: bool = False
    notes: Sequence[str] = ()
    reasoning_place: ReasoningPlace = "apart"
    continues: bool = False
    echo: str = ""


async def prepare_chat(context: Context, owner: str, query: ChatQuery) -> PreparedChat:
    """The engine's request of a chat; `KeyeError` and `ApiError` for mistakes in it."""
    context.check_model(query.sampling.model)
    if len(query.messages) > context.settings.messages:
        raise ApiError(400, f"messages: more than {context.settings.messages:,} cannot be read", param="messages")
    roles = [message.get("role") for message in query.messages[-2:]]
    if roles == ["assistant"] * 2 and not query.continues_reply:
        sentence = "messages end with two replies of the assistant; end with a message of the user"
        raise ApiError(400, sentence, param="messages")
    notes = current_notes()
    if query.is_short and isinstance(context.model.runtime.template, ChatTemplate):  # others run in a process
        return replace(_prepare(context, owner, query), notes=notes)
    return replace(await context.in_thread(_prepare, context, owner, query), notes=notes)


def _prepare(context: Context, owner: str, query: ChatQuery) -> PreparedChat:
    tools, form = choose_tools(query.tools, query.tool_choice, query.form, parallel=query.parallel_calls)
    segments = _render(context, owner, query, tools)
    reasoning = opens_reasoning(segments)
    guide = make_guide(context, form, query.sampling, after_reasoning=reasoning)
    request = replace(
        make_request(context, owner, segments, query.sampling, query.max_tokens, has_form=guide is not None),
        n=query.n, logprobs=query.logprobs, prompt_logprobs=query.prompt_logprobs, guide=guide,
        evidence=query.evidence, reasoning=reasoning,
    )  # fmt: skip
    continues = query.continues_reply
    echo = _text_of(query.messages[-1]) if query.echo and continues else ""
    return PreparedChat(
        request, segments, bool(tools), reasoning_place=query.reasoning_place, continues=continues, echo=echo
    )


def count_prompt_tokens(context: Context, owner: str, query: ChatQuery) -> int:
    """How many tokens the prompt of a chat takes. Blocks: media are probed."""
    tools, _ = choose_tools(query.tools, query.tool_choice, query.form, parallel=query.parallel_calls)
    return context.model.measure(_render(context, owner, query, tools), context.salt(owner)).prompt_tokens


def _render(context: Context, owner: str, query: ChatQuery, tools: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """The rendered prompt of a chat, its media opened and not decoded. Blocks."""
    opener = context.opener(owner)
    messages = to_messages(query.messages, opener, query.media_defaults)
    if (count := len(media_of(messages))) > context.settings.media:
        raise ApiError(400, f"messages hold {count} media, more than {context.settings.media}", param="messages")
    _check_length(context.model, messages)
    messages, switch = _take_switch(messages)
    return context.model.render(
        open_sources(messages, opener),
        thinking=switch if query.thinking is None else query.thinking,
        tools=tools,
        add_generation_prompt=query.add_generation_prompt,
        continue_final_message=query.continues_reply,
    )


def _check_length(model: Keye, messages: Sequence[Message]) -> None:
    """`ContextError` where the context cannot hold the texts of `messages`, by a lower bound of their tokens, before
    anything is made of them. Marks in replies are tokens of their own, however short."""
    limit, least = model.config.text.max_position_embeddings, 0
    for message in messages:
        for part in message.parts:
            if isinstance(part, str) and message.role == "assistant":
                part = part.rpartition("</think>")[2]  # earlier reasoning may be left out
                least += max(model.tokenizer.least_tokens(part), count_marks(part, limit))
            elif isinstance(part, str):
                least += model.tokenizer.least_tokens(part)
        if least > limit:
            raise ContextError(f"the prompt takes at least {least} tokens, but the context holds {limit}; send less")


def _take_switch(messages: Sequence[Message]) -> tuple[list[Message], bool | None]:
    """The messages without /think or /no_think at the end of the last text of the user, and what it asks for."""
    messages = list(messages)
    last = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
    text = messages[last].parts[-1] if last >= 0 and messages[last].parts else None
    if not isinstance(text, str):
        return messages, None
    for switch, thinking in _SWITCHES.items():
        stripped = text.rstrip()
        if stripped.endswith(switch) and (stripped == switch or stripped[-len(switch) - 1].isspace()):
            parts = (*messages[last].parts[:-1], stripped.removesuffix(switch).rstrip())
            messages[last] = replace(messages[last], parts=parts)
            return messages, thinking
    return messages, None


def prompt_text(prompt: Sequence[Segment]) -> str:
    """The text of a rendered prompt, with one pad token for each medium."""
    return "".join(segment.value if isinstance(segment.value, str) else f"<|{segment.kind}_pad|>" for segment in prompt)


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    parts = [{"text": content}] if isinstance(content, str) else content
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, Mapping))


def make_guide(
    context: Context, form: Form | None, sampling: Sampling, *, after_reasoning: bool = False
) -> Guide | None:
    """The guide that keeps a reply to a form; None without one. Blocks for the time it takes to compile the form."""
    if form is None:
        return None
    if context.guides is None:
        raise ApiError(400, "response_format needs llguidance, which this server lacks", param="response_format")
    if sampling.ignore_eos:
        add_note("ignore_eos was ignored: the reply ends where its form is complete")
    try:
        return context.guides.guide(form, after_reasoning=after_reasoning)
    except KeyeError as error:
        raise error_of_mistake(error, param=form.field) from None


def make_request(
    context: Context,
    owner: str,
    prompt: Sequence[Segment] | Prompt,
    sampling: Sampling,
    max_tokens: int | None,
    *,
    has_form: bool = False,
) -> GenerationRequest:
    """The engine's request for a prompt; settings that are not given are the model's own. A form ends its reply."""
    bias = sampling.logit_bias
    params = context.model.runtime.sampling_params(
        max_tokens=max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=None if sampling.top_k is None else max(sampling.top_k, 0),
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=None if sampling.seed is None else sampling.seed & MAX_SEED,
        stop=tuple(sampling.stop) if isinstance(sampling.stop, list) else sampling.stop,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logit_bias=None if bias is None else {int(token): value for token, value in bias.items()},
        allowed_token_ids=sampling.allowed_token_ids and tuple(sampling.allowed_token_ids),
        stop_token_ids=sampling.stop_token_ids and tuple(sampling.stop_token_ids),
        include_stop_str_in_output=sampling.include_stop_str_in_output or sampling.no_stop_trim,
        min_tokens=sampling.min_tokens,
        bad_words=sampling.bad_words and tuple(sampling.bad_words),
        thinking_token_budget=sampling.thinking_token_budget,
    )
    if sampling.attention == "sparse" and context.model.config.text.sparse is None:
        raise ApiError(400, "attention: this model attends densely; leave it out", param="attention")
    return GenerationRequest(
        prompt,
        params,
        context.model.runtime.resolve_attention(sampling.attention),
        ignore_eos=bool(sampling.ignore_eos) and not has_form,
        skip_special=sampling.skip_special_tokens is not False,
        deterministic=bool(sampling.deterministic),
        clamp=not context.settings.strict_limits,
        salt=context.salt(owner),
        seconds=context.settings.request_seconds,
    )


def query_of_chat(body: ChatRequest) -> ChatQuery:
    """What a body of /v1/chat/completions asks for."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if body.continue_final_message and body.add_generation_prompt:
        message = "continue_final_message excludes add_generation_prompt: a message that goes on does not begin"
        raise ApiError(400, message, param="continue_final_message")
    check_stream_options(body.stream, body.stream_options)
    switch = body.thinking.get("type") == "enabled" if isinstance(body.thinking, dict) else body.thinking
    switch = switch if body.enable_thinking is None else body.enable_thinking
    thinking = thinking_of(body.chat_template_kwargs, None if switch is not None else body.reasoning_effort)
    apart = "inside" if body.separate_reasoning is False else "apart"
    return ChatQuery(
        messages=body.messages,
        sampling=body,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        n=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        tools=body.tools or (),
        tool_choice=body.tool_choice,
        parallel_calls=body.parallel_tool_calls is not False,
        form=form_of(body),
        thinking=switch if thinking is None else thinking,
        media_defaults=media_settings(body),
        evidence=body.keye is not None and body.keye.evidence,
        prompt_logprobs=body.prompt_logprobs,
        add_generation_prompt=body.add_generation_prompt is not False,
        continues=bool(body.continue_final_message),
        echo=bool(body.echo),
        reasoning_place="nowhere" if body.include_reasoning is False else apart,  # type: ignore[arg-type]
    )


def check_stream_options(stream: bool | None, options: StreamOptions | None) -> None:
    """`ApiError` for options of a stream where there is none."""
    if options is not None and not stream and (options.include_usage or options.continuous_usage_stats):
        raise ApiError(400, "stream_options can be used with stream: true only", param="stream_options")


def thinking_of(template: TemplateFields | None, effort: str | None) -> bool | None:
    """Whether reasoning is asked for; the template's own switch goes before the effort."""
    switch = None
    if template is not None:
        switch = template.thinking if template.enable_thinking is None else template.enable_thinking
    if switch is not None or effort is None:
        return switch
    return effort not in ("none", "minimal")
