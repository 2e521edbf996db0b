"""From the body of a request to a job for the engine: messages, media, tools, thinking, the form of the reply.

Everything here that blocks runs in a thread.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Final

from keye.chat import Message, Segment, normalize_tools
from keye.engine.guide import ANY_OBJECT, Form, Guide
from keye.engine.prompt import Prompt
from keye.engine.request import Request as Job
from keye.engine.sampling import MAX_SEED
from keye.errors import KeyeWarning
from keye.server.context import Context
from keye.server.errors import ApiError, spelled
from keye.server.media_parts import media_of, open_sources, to_messages
from keye.server.schemas import ChatRequest, Sampling, StructuredOutputs, TemplateFields

_SWITCHES: Final = {"/think": True, "/no_think": False}
#: Sentences on settings of the request at hand that were not honoured.
notes_of_request: ContextVar[list[str] | None] = ContextVar("notes_of_request", default=None)


#: Messages, and characters of each, that are prepared in the event loop.
_SHORT_MESSAGES, _SHORT_TEXT = 4, 1000


@dataclass(frozen=True)
class Prepared:
    """A job with its rendered prompt, and what the reply needs to be read: whether tools were offered, and whether the
    prompt has opened the block of reasoning. `notes` are sentences on settings that are not honoured."""

    job: Job
    prompt: Sequence[Segment]
    tools: bool = False
    reasoning: bool = False
    notes: Sequence[str] = ()


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


async def prepare(context: Context, owner: str, wanted: Wanted) -> Prepared:
    """The job of a chat; `KeyeError` and `ApiError` for whatever is wrong with it."""
    context.check_model(wanted.sampling.model)
    if len(wanted.messages) > context.settings.messages:
        raise ApiError(400, f"messages: more than {context.settings.messages:,} cannot be read", param="messages")
    notes: list[str] = []
    notes_of_request.set(notes)
    if _is_short(wanted):
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
    openers = context.openers(owner)
    messages = to_messages(wanted.messages, openers.uploads, wanted.media_defaults)
    if (count := len(media_of(messages))) > context.settings.media:
        raise ApiError(400, f"messages hold {count} media, more than {context.settings.media}", param="messages")
    messages, typed = _without_switch(messages)
    thinking = typed if wanted.thinking is None else wanted.thinking
    offered, _ = _tools(wanted)
    return context.model.render(open_sources(messages, openers), thinking=thinking, tools=offered)


def tokens_of(context: Context, owner: str, wanted: Wanted) -> int:
    """How many tokens the prompt of a chat takes. Blocks: media are looked into."""
    return context.model.measure(prompt_of(context, owner, wanted), context.salt(owner)).prompt_tokens


def _prepare(context: Context, owner: str, wanted: Wanted) -> Prepared:
    segments = prompt_of(context, owner, wanted)
    offered, form = _tools(wanted)
    reasoning = opens_reasoning(segments)
    guide = guide_of(context, form, wanted.sampling, after_reasoning=reasoning)
    job = job_of(context, owner, segments, wanted.sampling, wanted.max_tokens)
    job = replace(job, n=wanted.n, logprobs=wanted.logprobs, guide=guide, evidence=wanted.evidence)
    return Prepared(job, segments, bool(offered), reasoning)


def guide_of(context: Context, form: Form | None, sampling: Sampling, *, after_reasoning: bool = False) -> Guide | None:
    """What holds a reply to a form; None where there is none. Blocks for the time it takes to read the form."""
    if form is None:
        return None
    if context.guides is None:
        raise ApiError(400, "response_format needs llguidance, which this server lacks", param="response_format")
    if sampling.ignore_eos:
        raise ApiError(400, "ignore_eos cannot be used with a form of the reply", param="ignore_eos")
    return context.guides.guide(form, after_reasoning=after_reasoning)


def job_of(
    context: Context, owner: str, prompt: Sequence[Segment] | Prompt, sampling: Sampling, max_tokens: int | None
) -> Job:
    """A job with the settings of sampling; what is not given is the model's own."""
    params = context.model.sampling_params(
        max_tokens=max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=None if sampling.top_k is None else max(sampling.top_k, 0),
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=None if sampling.seed is None else sampling.seed & MAX_SEED,
        stop=tuple(sampling.stop) if isinstance(sampling.stop, list) else sampling.stop,
    )
    if sampling.attention == "sparse" and context.model.config.text.sparse is None:
        raise ApiError(400, "attention: this model attends densely; leave it out", param="attention")
    return Job(
        prompt,
        params,
        ignore_eos=sampling.ignore_eos,
        skip_special=sampling.skip_special_tokens,
        attention=sampling.attention,
        salt=context.salt(owner),
        seconds=context.settings.request_seconds,
    )


def opens_reasoning(segments: Sequence[Segment]) -> bool:
    """Whether a prompt ends inside a block of reasoning."""
    last = segments[-1]
    return last.kind == "template" and isinstance(last.value, str) and last.value.rstrip().endswith("<think>")


def chat_wanted(body: ChatRequest) -> Wanted:
    """What a body of /v1/chat/completions asks for."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return Wanted(
        messages=body.messages,
        sampling=body,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        n=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        tools=body.tools or (),
        tool_choice=body.tool_choice,
        several_calls=body.parallel_tool_calls is not False,
        form=form_of(body.response_format, body.structured_outputs),
        thinking=thinking_of(body.chat_template_kwargs, body.reasoning_effort),
        media_defaults=body.preprocess_kwargs,
        evidence=body.keye.evidence,
    )


def thinking_of(template: TemplateFields | None, effort: str | None) -> bool | None:
    """Whether reasoning is asked for; the template's own switch goes before the effort."""
    switch = template.enable_thinking if template is not None else None
    if switch is not None or effort is None:
        return switch
    return effort not in ("none", "minimal")


def form_of(response_format: Mapping[str, Any] | None, structured: StructuredOutputs | None) -> Form | None:
    """The form that the reply must have, from OpenAI's field or from ours."""
    if structured is not None:
        if response_format is not None and response_format.get("type") != "text":
            raise ApiError(400, "structured_outputs and response_format exclude each other", param="structured_outputs")
        given = structured
        if given.json_schema is not None:
            return Form("json_schema", given.json_schema)
        if given.regex is not None:
            return Form("regex", given.regex)
        return Form("choice", given.choice) if given.choice is not None else Form("grammar", given.grammar)
    if response_format is None:
        return None
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Form("json_schema", ANY_OBJECT)
    if kind != "json_schema":
        raise ApiError(
            400, "response_format.type must be text, json_object or json_schema", param="response_format.type"
        )
    # The official client wraps the schema for chat and not for responses.
    inner = response_format.get("json_schema", response_format)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("schema"), Mapping):
        raise ApiError(
            400, "response_format.json_schema needs a schema, an object", param="response_format.json_schema"
        )
    return Form("json_schema", inner["schema"])


def _tools(wanted: Wanted) -> tuple[Sequence[Mapping[str, Any]], Form | None]:
    """The functions that the prompt offers, and the form that follows from the choice among them."""
    offered, choice, form = normalize_tools(wanted.tools), wanted.tool_choice, wanted.form
    names = [tool["function"]["name"] for tool in offered]
    if len(set(names)) < len(names):
        raise ApiError(400, "tools: two functions have one name", param="tools")
    if not offered:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice asks for a call, but no tools are given", param="tool_choice")
        return (), form
    if choice == "none":
        return (), form
    if choice in (None, "auto"):
        if form is not None and form.kind == "json_schema":
            return offered, Form("calls", offered, wanted.several_calls, otherwise=form.value)
        if form is not None:
            raise ApiError(400, "a form of the reply other than JSON cannot be used with tools", param="tools")
        return offered, None
    if choice == "required":
        return offered, Form("calls", offered, wanted.several_calls)
    name = _chosen_name(choice)
    if name not in names:
        raise ApiError(400, "tool_choice names a function that is not among the tools", param="tool_choice")
    return offered, Form("calls", [tool for tool in offered if tool["function"]["name"] == name])


def _chosen_name(choice: object) -> object:
    """The name in `{"type": "function", "function": {"name": ...}}`, or as /v1/responses has it."""
    if not isinstance(choice, Mapping) or choice.get("type") != "function":
        raise ApiError(400, "tool_choice must be none, auto, required or a function", param="tool_choice")
    inner = choice.get("function", choice)
    return inner.get("name") if isinstance(inner, Mapping) else None


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


def collect_warnings() -> None:
    """From now on, warnings of settings that are not honoured are kept for the request they belong to. For the whole
    process: Python has one place for warnings."""
    warnings.simplefilter("always", KeyeWarning)
    usual = warnings.showwarning

    def keep(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        notes = notes_of_request.get()
        if isinstance(message, KeyeWarning) and notes is not None:
            notes.append(message.worded(spelled))
        elif not isinstance(message, KeyeWarning):
            usual(message, category, *place, **more)

    warnings.showwarning = keep
