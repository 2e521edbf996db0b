"""The form that a reply must have, from whichever of the fields that clients know: OpenAI's, vLLM's, SGLang's; and the
functions that a reply may or must call."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from keye.chat.json_schema import ANY_OBJECT
from keye.chat.messages import normalize_tools
from keye.engine.guide import Form, Tag
from keye.server.edge.errors import ApiError
from keye.server.notes import add_note
from keye.server.openai.schemas import Forms, StructuredOutputs


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
