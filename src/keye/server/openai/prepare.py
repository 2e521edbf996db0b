"""From the body of a chat to a request for the engine: messages, media, tools, thinking, the form of the reply.

Everything here that blocks runs in a thread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from fastapi import Request

from keye.api import Keye
from keye.chat.json_schema import ANY_OBJECT
from keye.chat.messages import Message, normalize_tools
from keye.chat.template import ChatTemplate, Segment, count_marks, opens_reasoning
from keye.config.model import Scope
from keye.engine.guide import Form, Guide, Tag
from keye.engine.prompt import Prompt
from keye.engine.request import Finished, GenerationRequest
from keye.engine.sampling import MAX_SEED
from keye.errors import ContextError, KeyeError
from keye.moments import FindNote
from keye.server.context import Context, context_of, owner_of
from keye.server.edge.errors import ApiError
from keye.server.errors import add_note, current_notes, error_of_mistake
from keye.server.openai.http import cancel_on_disconnect
from keye.server.openai.media_parts import media_of, open_sources, to_messages
from keye.server.openai.schemas import Forms, Sampling, StreamOptions, StructuredOutputs, TemplateFields
from keye.sessions.scope import length_notes, question_notes

#: Settings of `Sampling` that the engine takes as they are, and those of which it takes tuples.
_SETTINGS: Final = (
    "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "min_tokens",
    "thinking_token_budget",
)  # fmt: skip
_LISTS: Final = ("allowed_token_ids", "stop_token_ids", "bad_words")
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


@dataclass(frozen=True)
class PreparedChat:
    """A request with its rendered prompt, and what its reply needs to be parsed: whether `tools` were offered, where
    reasoning is placed, whether the reply `continues` a text of the prompt, and that text where it is to be repeated
    (`echo`). `notes` are sentences on settings that are not honoured, `scope` is what the model knows."""

    request: GenerationRequest
    prompt: Sequence[Segment]
    tools: bool = False
    notes: Sequence[str] = ()
    reasoning_place: ReasoningPlace = "apart"
    continues: bool = False
    echo: str = ""
    scope: Scope | None = None

    def scope_notes(self, finished: Finished) -> list[FindNote]:
        """Notes on media or words that the model was not measured on; none without media."""
        if not finished.media:
            return []
        return [*question_notes(self.scope, self.prompt), *length_notes(self.scope, finished.media)]


async def prepare_chat(request: Request, query: ChatQuery) -> PreparedChat:
    """The engine's request of a chat; `KeyeError` and `ApiError` for mistakes in it. Cancelled when the client
    disconnects."""
    context, owner = context_of(request), owner_of(request)
    context.check_model(query.sampling.model)
    if len(query.messages) > context.settings.messages:
        raise ApiError(400, f"messages: more than {context.settings.messages:,} cannot be read", param="messages")
    roles = [message.get("role") for message in query.messages[-2:]]
    if roles == ["assistant"] * 2 and not query.continues_reply:
        sentence = "messages end with two replies of the assistant; end with a message of the user"
        raise ApiError(400, sentence, param="messages")
    # A few words, without media, tools or a form, take less time than handing them to a thread.
    is_short = not query.tools and query.form is None and len(query.messages) <= _SHORT_MESSAGES
    contents = [message.get("content") for message in query.messages] if is_short else []
    is_short = is_short and all(isinstance(text, str) and len(text) <= _SHORT_TEXT for text in contents)
    if is_short and isinstance(context.model.runtime.template, ChatTemplate):  # others run in a process
        return _prepare(context, owner, query)
    return await cancel_on_disconnect(request, context.in_thread(_prepare, context, owner, query))


def _prepare(context: Context, owner: str, query: ChatQuery) -> PreparedChat:
    tools, form = choose_tools(query.tools, query.tool_choice, query.form, parallel=query.parallel_calls)
    segments = _render(context, owner, query, tools)
    reasoning = opens_reasoning(segments)
    guide = make_guide(context, form, query.sampling, after_reasoning=reasoning) if form else None
    request = replace(
        make_request(context, owner, segments, query.sampling, query.max_tokens, has_form=guide is not None),
        n=query.n, logprobs=query.logprobs, prompt_logprobs=query.prompt_logprobs, guide=guide,
        evidence=query.evidence, reasoning=reasoning,
    )  # fmt: skip
    continues, echo = query.continues_reply, ""
    if query.echo and continues:
        content = query.messages[-1].get("content") or ""
        parts = [{"text": content}] if isinstance(content, str) else content
        echo = "".join(str(part.get("text") or "") for part in parts if isinstance(part, Mapping))
    return PreparedChat(request, segments, bool(tools), current_notes(), query.reasoning_place, continues, echo,
                        context.model.runtime.generation_config.scope)  # fmt: skip


async def count_prompt_tokens(request: Request, query: ChatQuery) -> int:
    """How many tokens the prompt of a chat takes. Media are probed, and not decoded."""
    context, owner = context_of(request), owner_of(request)
    context.check_model(query.sampling.model)

    def count() -> int:
        tools, _ = choose_tools(query.tools, query.tool_choice, query.form, parallel=query.parallel_calls)
        return context.model.measure(_render(context, owner, query, tools), context.salt(owner)).prompt_tokens

    return await cancel_on_disconnect(request, context.decode(count))


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


def make_guide(context: Context, form: Form, sampling: Sampling, *, after_reasoning: bool = False) -> Guide:
    """The guide that keeps a reply to a form. Blocks for the time it takes to compile the form."""
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
    settings: dict[str, Any] = {name: getattr(sampling, name) for name in _SETTINGS}
    settings |= {name: value and tuple(value) for name in _LISTS if (value := getattr(sampling, name)) is not None}
    params = context.model.runtime.sampling_params(
        **settings,
        max_tokens=max_tokens,
        top_k=None if sampling.top_k is None else max(sampling.top_k, 0),
        seed=None if sampling.seed is None else sampling.seed & MAX_SEED,
        stop=tuple(sampling.stop) if isinstance(sampling.stop, list) else sampling.stop,
        logit_bias=sampling.logit_bias and {int(token): value for token, value in sampling.logit_bias.items()},
        include_stop_str_in_output=sampling.include_stop_str_in_output or sampling.no_stop_trim,
    )
    if sampling.attention == "sparse" and context.model.config.text.sparse is None:
        raise ApiError(400, "attention: this model attends densely; leave it out", param="attention")
    return GenerationRequest(
        prompt, params, context.model.runtime.resolve_attention(sampling.attention),
        ignore_eos=bool(sampling.ignore_eos) and not has_form, skip_special=sampling.skip_special_tokens is not False,
        deterministic=bool(sampling.deterministic), clamp=not context.settings.strict_limits, salt=context.salt(owner),
        seconds=context.settings.request_seconds, adapter=context.adapter_of(sampling.model),
    )  # fmt: skip


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


def form_of(forms: Forms) -> Form | None:
    """The form that a body asks for, None where the reply is free; `ApiError` for two of them."""
    requested = [name for name in _PARSERS if getattr(forms, name) is not None]
    parsed = {name: _PARSERS[name](getattr(forms, name), name) for name in requested}
    parsed_forms = {name: form for name, form in parsed.items() if form is not None}
    if len(parsed_forms) > 1:
        raise ApiError(
            400, f"{' and '.join(parsed_forms)} exclude each other; give one form", param=list(parsed_forms)[-1]
        )
    return next((replace(form, field=name) for name, form in parsed_forms.items()), None)


def response_form(value: object, where: str) -> Form | None:
    """The form in OpenAI's field, which stands at `where`."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ApiError(400, f"{where} must be an object with a type", param=where)
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        # llama.cpp's server, and those that follow it, take a schema here, too.
        return Form("json_schema", ANY_OBJECT) if value.get("schema") is None else _schema_of(value, where)
    if kind == "structural_tag":
        return _tags(value, where)
    if kind != "json_schema":
        raise ApiError(400, f"{where}.type must be text, json_object or json_schema", param=f"{where}.type")
    # The official client wraps the schema for chat and not for responses.
    inner = value.get("json_schema", value)
    place = f"{where}.json_schema" if "json_schema" in value else where
    return _schema_of(inner if isinstance(inner, Mapping) else {}, place)


def _schema_of(value: Mapping[str, Any], where: str) -> Form:
    if not isinstance(value.get("schema"), Mapping):
        raise ApiError(400, f"{where} needs a schema, an object", param=where)
    return Form("json_schema", value["schema"], field=where)


def _structured(outputs: StructuredOutputs, where: str) -> Form:
    forms = [
        None if outputs.json_schema is None else _schema(outputs.json_schema, f"{where}.json"),
        None if outputs.regex is None else Form("regex", outputs.regex),
        None if outputs.choice is None else Form("choice", outputs.choice),
        None if outputs.grammar is None else Form("grammar", outputs.grammar),
        Form("json_schema", ANY_OBJECT) if outputs.json_object else None,
        None if outputs.structural_tag is None else _tagged(outputs.structural_tag, f"{where}.structural_tag"),
    ]
    parsed_forms = [form for form in forms if form is not None]
    if len(parsed_forms) != 1:
        raise ApiError(400, f"{where}: give one of json, regex, choice and grammar", param=where)
    return parsed_forms[0]


def _plain(kind: Any) -> Callable[[Any, str], Form]:
    return lambda value, where: Form(kind, value)


def _schema(value: Mapping[str, Any] | str, where: str) -> Form:
    return Form("json_schema", _object(value, where))


def _tagged(value: Mapping[str, Any] | str, where: str) -> Form:
    return _tags(_object(value, where), where)


def _object(value: Mapping[str, Any] | str, where: str) -> Mapping[str, Any]:
    """An object, which may come as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ApiError(400, f"{where} is not JSON; give a JSON schema", param=where) from None
    if not isinstance(value, Mapping):
        raise ApiError(400, f"{where} must be an object", param=where)
    return value


def _tags(value: Mapping[str, Any], where: str) -> Form:
    """JSON between texts, with `structures` and `triggers` as SGLang has them, or in xgrammar's `format`."""
    inner = value.get("format", value)
    if not isinstance(inner, Mapping) or (inner is not value and inner.get("type") != "triggered_tags"):
        raise ApiError(400, f"{where}: of structural tags only triggered_tags are known", param=where)
    listed, triggers = inner.get("structures", inner.get("tags")), inner.get("triggers")
    if not (_listed(listed, Mapping) and _listed(triggers, str)):
        raise ApiError(400, f"{where} needs lists of structures and of triggers", param=where)
    assert isinstance(listed, list) and isinstance(triggers, list)
    return Form("tags", [_tag(structure, triggers, where) for structure in listed])


def _listed(value: object, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) and item for item in value)


def _tag(value: Mapping[str, Any], triggers: Sequence[str], where: str) -> Tag:
    content = value.get("content")
    schema = content.get("json_schema") if isinstance(content, Mapping) else value.get("schema")
    begin, end = value.get("begin"), value.get("end")
    if not (isinstance(begin, str) and isinstance(end, str) and isinstance(schema, Mapping)):
        raise ApiError(400, f"{where}: a structure needs begin, schema and end", param=where)
    trigger = next((start for start in triggers if begin.startswith(start)), None)
    if trigger is None:
        raise ApiError(400, f"{where}: no trigger is the beginning of {begin[:100]!r}", param=where)
    return Tag(trigger, begin, schema, end)


#: How each field of `Forms` is read.
_PARSERS: Final[Mapping[str, Callable[[Any, str], Form | None]]] = {
    "response_format": response_form, "structured_outputs": _structured, "json_schema": _schema,
    "regex": _plain("regex"), "ebnf": _plain("grammar"), "grammar": _plain("grammar"), "structural_tag": _tagged,
    "guided_json": _schema, "guided_regex": _plain("regex"), "guided_choice": _plain("choice"),
    "guided_grammar": _plain("grammar"),
}  # fmt: skip


def choose_tools(
    tools: Sequence[Mapping[str, Any]], choice: object, form: Form | None, *, parallel: bool
) -> tuple[Sequence[Mapping[str, Any]], Form | None]:
    """The functions that a prompt offers, and the form that follows from the choice among them."""
    if not tools and choice in (None, "none", "auto"):
        return (), form
    offered = normalize_tools(_functions(tools))
    names = [tool["function"]["name"] for tool in offered]
    if len(set(names)) < len(names):
        raise ApiError(400, "tools: two functions have one name", param="tools")
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        offered, choice = _allowed(offered, choice)
        names = [tool["function"]["name"] for tool in offered]
    if not offered:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice asks for a call, but no tools are given", param="tool_choice")
        return (), form
    if choice == "none":
        return (), form
    if choice in (None, "auto"):
        if form is not None and form.kind == "json_schema":
            return offered, Form("calls", offered, parallel, otherwise=form.value, field="tools")
        if form is not None:
            raise ApiError(400, "a form of the reply other than JSON cannot be used with tools", param="tools")
        return offered, None
    if choice == "required":
        return offered, Form("calls", offered, parallel, field="tools")
    name = _chosen_name(choice)
    if name not in names:
        raise ApiError(400, "tool_choice names a function that is not among the tools", param="tool_choice")
    return offered, Form("calls", [tool for tool in offered if tool["function"]["name"] == name], field="tools")


def _functions(tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The functions among tools, as chats have them; tools of other types, which servers of others run themselves, are
    left out with a note."""
    functions, foreign = [], set()
    for tool in tools:
        kind = tool.get("type", "function")
        if kind != "function":
            foreign.add(str(kind)[:60])
        elif "function" in tool or "type" not in tool:
            functions.append(tool)
        else:  # the form of /v1/responses, without an inner object
            inner = {key: value for key, value in tool.items() if key != "type" and value is not None}
            functions.append({"type": "function", "function": inner})
    if foreign:
        add_note(f"only functions can be offered; tools of other types were left out: {', '.join(sorted(foreign)[:8])}")
    return functions


def _allowed(
    offered: tuple[Mapping[str, Any], ...], choice: Mapping[str, Any]
) -> tuple[tuple[Mapping[str, Any], ...], object]:
    """The functions that `allowed_tools` names, and its mode."""
    inner = choice.get("allowed_tools", choice)
    listed = inner.get("tools") if isinstance(inner, Mapping) else None
    mode = inner.get("mode") if isinstance(inner, Mapping) else None
    if not _listed(listed, Mapping) or mode not in ("auto", "required"):
        raise ApiError(400, "tool_choice.allowed_tools needs tools, and a mode: auto or required", param="tool_choice")
    names = [_chosen_name(tool) for tool in listed or ()]
    return tuple(tool for tool in offered if tool["function"]["name"] in names), mode


def _chosen_name(choice: object) -> object:
    """The name in `{"type": "function", "function": {"name": ...}}`, or as /v1/responses has it."""
    if not isinstance(choice, Mapping) or choice.get("type") != "function":
        raise ApiError(400, "tool_choice must be none, auto, required or a function", param="tool_choice")
    inner = choice.get("function", choice)
    return inner.get("name") if isinstance(inner, Mapping) else None
