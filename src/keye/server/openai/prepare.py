"""From the body of a request to a job for the engine: messages, media, tools, thinking, the form of the reply.

Everything here that blocks runs in a thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from keye.chat.messages import Message
from keye.chat.template import ChatTemplate, Segment, opens_reasoning
from keye.engine.guide import Form, Guide
from keye.engine.prompt import Prompt
from keye.engine.request import Request as Job
from keye.engine.sampling import MAX_SEED
from keye.errors import KeyeError
from keye.server.context import Context
from keye.server.edge.errors import ApiError
from keye.server.errors import error_of_mistake
from keye.server.notes import add_note, current_notes
from keye.server.openai.forms import chosen_tools, form_of
from keye.server.openai.lengths import check_length
from keye.server.openai.media_parts import media_of, open_sources, to_messages
from keye.server.openai.media_settings import media_settings
from keye.server.openai.schemas import ChatRequest, Sampling, StreamOptions, TemplateFields

_SWITCHES: Final = {"/think": True, "/no_think": False}
#: Messages, and characters of each, that are prepared in the event loop.
_SHORT_MESSAGES, _SHORT_TEXT = 4, 1000


@dataclass(frozen=True)
class Prepared:
    """A job with its rendered prompt, and what the reply needs to be read: whether tools were offered, and whether the
    prompt has opened the block of reasoning. `notes` are sentences on settings that are not honoured; `shown` says
    what becomes of reasoning; `continues` that the reply goes on with a text of the prompt, and `echo` is that text
    where the reply is to repeat it."""

    job: Job
    prompt: Sequence[Segment]
    tools: bool = False
    reasoning: bool = False
    notes: Sequence[str] = ()
    shown: ShownReasoning = "apart"
    continues: bool = False
    echo: str = ""


#: Reasoning stands beside the answer, in it, or nowhere.
ShownReasoning = Literal["apart", "inside", "nowhere"]


@dataclass(frozen=True)
class Wanted:
    """What a chat asks for, whichever route it came by."""

    messages: Sequence[Mapping[str, Any]]
    sampling: Sampling
    max_tokens: int | None = None
    n: int = 1
    logprobs: int | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: object = None
    several_calls: bool = True
    form: Form | None = None
    thinking: bool | None = None
    media_defaults: Mapping[str, Any] | None = None
    evidence: bool = False
    prompt_logprobs: int | None = None
    begins_reply: bool = True
    continues: bool = False
    echo: bool = False
    shown: ShownReasoning = "apart"


async def prepare(context: Context, owner: str, wanted: Wanted) -> Prepared:
    """The job of a chat; `KeyeError` and `ApiError` for whatever is wrong with it."""
    notes = current_notes()
    context.check_model(wanted.sampling.model)
    if len(wanted.messages) > context.settings.messages:
        raise ApiError(400, f"messages: more than {context.settings.messages:,} cannot be read", param="messages")
    if not _continues(wanted) and [one.get("role") for one in wanted.messages[-2:]] == ["assistant"] * 2:
        sentence = "messages end with two replies of the assistant; end with a message of the user"
        raise ApiError(400, sentence, param="messages")
    if _is_short(wanted) and isinstance(context.model.runtime.template, ChatTemplate):  # others use a process
        return replace(_prepare(context, owner, wanted), notes=notes)
    return replace(await context.in_thread(_prepare, context, owner, wanted), notes=notes)


def _is_short(wanted: Wanted) -> bool:
    """Whether preparing takes less time than handing it to a thread: a few words, without media, tools or a form."""
    if wanted.tools or wanted.form is not None or len(wanted.messages) > _SHORT_MESSAGES:
        return False
    contents = [message.get("content") for message in wanted.messages]
    return all(isinstance(one, str) and len(one) <= _SHORT_TEXT for one in contents)


def prompt_of(context: Context, owner: str, wanted: Wanted) -> list[Segment]:
    """The rendered prompt of a chat, its media opened and not decoded. Blocks."""
    opener = context.opener(owner)
    messages = to_messages(wanted.messages, opener, wanted.media_defaults)
    if (count := len(media_of(messages))) > context.settings.media:
        raise ApiError(400, f"messages hold {count} media, more than {context.settings.media}", param="messages")
    check_length(context.model, messages)
    messages, typed = _without_switch(messages)
    offered, _ = _tools(wanted)
    return context.model.render(
        open_sources(messages, opener),
        thinking=typed if wanted.thinking is None else wanted.thinking,
        tools=offered,
        add_generation_prompt=wanted.begins_reply,
        continue_final_message=_continues(wanted),
    )


def _tools(wanted: Wanted) -> tuple[Sequence[Mapping[str, Any]], Form | None]:
    return chosen_tools(wanted.tools, wanted.tool_choice, wanted.form, several=wanted.several_calls)


def _continues(wanted: Wanted) -> bool:
    """Whether the last message is the beginning of the reply, because the request says so or the message itself."""
    last = wanted.messages[-1]
    asks = last.get("role") == "assistant" and (last.get("prefix") is True or last.get("partial") is True)
    return wanted.continues or asks


def text_of(prompt: Sequence[Segment]) -> str:
    """The text of a rendered prompt; for each medium one of the tokens that stand for it."""
    return "".join(segment.value if isinstance(segment.value, str) else f"<|{segment.kind}_pad|>" for segment in prompt)


def tokens_of(context: Context, owner: str, wanted: Wanted) -> int:
    """How many tokens the prompt of a chat takes. Blocks: media are looked into."""
    return context.model.measure(prompt_of(context, owner, wanted), context.salt(owner)).prompt_tokens


def _prepare(context: Context, owner: str, wanted: Wanted) -> Prepared:
    segments = prompt_of(context, owner, wanted)
    offered, form = _tools(wanted)
    reasoning = opens_reasoning(segments)
    guide = guide_of(context, form, wanted.sampling, after_reasoning=reasoning)
    job = replace(
        job_of(context, owner, segments, wanted.sampling, wanted.max_tokens, held=guide is not None),
        n=wanted.n, logprobs=wanted.logprobs, prompt_logprobs=wanted.prompt_logprobs, guide=guide,
        evidence=wanted.evidence, reasoning=reasoning,
    )  # fmt: skip
    echo = _text_of(wanted.messages[-1]) if wanted.echo and _continues(wanted) else ""
    return Prepared(
        job, segments, bool(offered), reasoning, shown=wanted.shown, continues=_continues(wanted), echo=echo
    )


def _text_of(message: Mapping[str, Any]) -> str:
    """The text of a message as it came."""
    content = message.get("content") or ""
    parts = [{"text": content}] if isinstance(content, str) else content
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, Mapping))


def guide_of(context: Context, form: Form | None, sampling: Sampling, *, after_reasoning: bool = False) -> Guide | None:
    """What holds a reply to a form; None where there is none. Blocks for the time it takes to read the form."""
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


def job_of(
    context: Context,
    owner: str,
    prompt: Sequence[Segment] | Prompt,
    sampling: Sampling,
    max_tokens: int | None,
    *,
    held: bool = False,
) -> Job:
    """A job with the settings of sampling; what is not given is the model's own. `held` says that a form ends it."""
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
    return Job(
        prompt,
        params,
        context.model.runtime.resolve_attention(sampling.attention),
        ignore_eos=bool(sampling.ignore_eos) and not held,
        skip_special=sampling.skip_special_tokens is not False,
        deterministic=bool(sampling.deterministic),
        clamp=not context.settings.strict_limits,
        salt=context.salt(owner),
        seconds=context.settings.request_seconds,
    )


def chat_wanted(body: ChatRequest) -> Wanted:
    """What a body of /v1/chat/completions asks for."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if body.continue_final_message and body.add_generation_prompt:
        message = "continue_final_message excludes add_generation_prompt: a message that goes on does not begin"
        raise ApiError(400, message, param="continue_final_message")
    check_stream_options(body.stream, body.stream_options)
    return Wanted(
        messages=body.messages,
        sampling=body,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        n=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        tools=body.tools or (),
        tool_choice=body.tool_choice,
        several_calls=body.parallel_tool_calls is not False,
        form=form_of(body),
        thinking=_thinking(body),
        media_defaults=media_settings(body),
        evidence=body.keye is not None and body.keye.evidence,
        prompt_logprobs=body.prompt_logprobs,
        begins_reply=body.add_generation_prompt is not False,
        continues=bool(body.continue_final_message),
        echo=bool(body.echo),
        shown=_shown(body),
    )


def _thinking(body: ChatRequest) -> bool | None:
    """Whether reasoning is asked for, under any of the names of the switch."""
    switch = body.thinking.get("type") == "enabled" if isinstance(body.thinking, dict) else body.thinking
    switch = body.enable_thinking if body.enable_thinking is not None else switch
    own = thinking_of(body.chat_template_kwargs, None if switch is not None else body.reasoning_effort)
    return switch if own is None else own


def _shown(body: ChatRequest) -> ShownReasoning:
    if body.include_reasoning is False:
        return "nowhere"
    return "inside" if body.separate_reasoning is False else "apart"


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


def _without_switch(messages: Sequence[Message]) -> tuple[list[Message], bool | None]:
    """The messages without /think or /no_think at the end of the last text of the user, and what it asks for."""
    found = list(messages)
    last = max((i for i, message in enumerate(found) if message.role == "user"), default=-1)
    text = found[last].parts[-1] if last >= 0 and found[last].parts else None
    if not isinstance(text, str):
        return found, None
    for switch, thinking in _SWITCHES.items():
        kept = text.rstrip()
        if kept.endswith(switch) and (kept == switch or kept[-len(switch) - 1].isspace()):
            parts = (*found[last].parts[:-1], kept.removesuffix(switch).rstrip())
            found[last] = replace(found[last], parts=parts)
            return found, thinking
    return found, None
