"""Function calls in a reply, and whether they are the expected ones.

Calls are read from JSON (`{"name": ..., "arguments": {...}}`, also in `<tool_call>` tags, or `{name: {argument:
value}}`) and from Python syntax (`[f(a=1), g(b="x")]`), which is parsed and never run. Values are compared as they are:
texts but for case and spaces, numbers by value, lists and objects in full.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from keye.scoring.strict.reasoning import strip_reasoning

Calls = list[dict[str, dict[str, Any]]]
"""Each call is {name: {argument: value}}."""
_LONGEST = 100_000


def find_calls(text: str) -> Calls | None:
    """The calls of a reply in their order; None where it holds none that can be read."""
    text = strip_reasoning(text).conclusion[:_LONGEST]
    if tagged := [body.partition("</tool_call>")[0] for body in text.split("<tool_call>")[1:]]:
        parsed = [_parse(body) for body in tagged]
        return None if None in parsed else [call for calls in parsed for call in calls or ()]
    # Every second piece between fences stands inside them; its first line names a language.
    fenced = [body.partition("\n")[2] for body in text.split("```")[1::2]][-8:]
    start, end = text.find("["), text.rfind("]")
    listed = [text[start : end + 1]] if 0 <= start < end else []
    for body in (text, *reversed(fenced), *listed):
        if (calls := _parse(body)) is not None:
            return calls
    return None


def _parse(text: str) -> Calls | None:
    text = text.strip().strip("`").strip()
    if text.count("(") + text.count("[") + text.count("{") > 2000:
        return None
    try:
        return _read_json(json.loads(text))
    except (ValueError, RecursionError):
        pass
    try:
        return _read_python(ast.parse(text, mode="eval").body)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _read_json(value: Any) -> Calls | None:
    calls: Calls = []
    for entry in value if isinstance(value, list) else [value]:
        if not isinstance(entry, Mapping) or not entry:
            return None
        if isinstance(inner := entry.get("function"), Mapping):
            entry = inner
        name = entry.get("name")
        arguments = entry.get("arguments", entry.get("parameters"))
        if isinstance(name, str) and isinstance(arguments, str):
            arguments = json.loads(arguments)
        if isinstance(name, str) and isinstance(arguments, Mapping):
            calls.append({name: dict(arguments)})
        elif all(isinstance(inner, Mapping) for inner in entry.values()):
            calls += [{str(key): dict(inner)} for key, inner in entry.items()]
        else:
            return None
    return calls


def _read_python(node: ast.expr) -> Calls:
    calls: Calls = []
    for call in node.elts if isinstance(node, ast.List | ast.Tuple) else [node]:
        if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
            raise ValueError("not a list of calls with named arguments")
        calls.append({_name(call.func): {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}})
    return calls


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError("not a name")


def match_calls(calls: Sequence[Mapping[str, Mapping[str, Any]]], answers: Sequence[Mapping[str, Any]]) -> bool:
    """Whether calls are the expected ones in any order. An answer is {name: {argument: possible values}}; a possible
    value "" says that the argument may be left out."""
    left = list(calls)
    for answer in answers:
        match = next((call for call in left if _is_call(call, answer)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _is_call(call: Mapping[str, Mapping[str, Any]], answer: Mapping[str, Any]) -> bool:
    (name, arguments), (expected, possible) = next(iter(call.items())), next(iter(answer.items()))
    if _plain_name(name) != _plain_name(expected) or arguments.keys() - possible.keys():
        return False
    return all(
        any(_is_value(arguments[key], value) for value in values if value != "") if key in arguments else "" in values
        for key, values in possible.items()
    )


def _plain_name(name: str) -> str:
    """Providers do not take full stops in names and write underscores."""
    return name.replace(".", "_")


def _is_value(value: Any, expected: Any) -> bool:
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, int | float) and isinstance(expected, int | float):
        return value == expected
    if isinstance(value, str) and isinstance(expected, str):
        return " ".join(value.casefold().split()) == " ".join(expected.casefold().split())
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(map(_is_value, value, expected))
    if isinstance(value, Mapping) and isinstance(expected, Mapping):
        # Inside objects each key has a list of possible values, as arguments have.
        return not value.keys() - expected.keys() and all(
            any(_is_value(value[key], entry) for entry in _listed(entries) if entry != "") if key in value
            else "" in _listed(entries)
            for key, entries in expected.items()
        )  # fmt: skip
    return value is None and expected is None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) and value else [value]
