"""JSON schemas as forms of a reply: closed, compact and bounded, so that a weak model comes to an end.

An object has the properties that its schema names and no others, unless the schema says otherwise; between values there
is not any white space; numbers have a bounded number of digits. Knows schemas, no grammars and no tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from keye.chat.grammar_size import check_regex
from keye.errors import KeyeError

#: Any JSON object.
ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}
#: An object of nothing: the arguments of a function that has no parameters.
EMPTY_OBJECT: Final[Mapping[str, Any]] = {"type": "object", "properties": {}, "additionalProperties": False}
MAX_BYTES: Final = 64 * 1024
MAX_DEPTH: Final = 32
MAX_NODES: Final = 5_000
MAX_PATTERN: Final = 2_000
#: Entries of all schemas of a form together.
MAX_TOGETHER: Final = 20_000
#: Numbers without bounds of their own lie between these, with so many decimals.
_LARGEST: Final = 10**15
_CLAMP: Final = 10**18
_STEP: Final = 1e-9
#: Characters of a text that a limit of its length may name.
_LONGEST: Final = 10**8
_COMPACT: Final = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
#: The dialects of JSON schemas that are known.
_DRAFT: Final = re.compile(r"https?://json-schema\.org/draft(?:-0[467]|/2019-09|/2020-12)/schema#?")
_ANY: Final = "keye_any_value"
_TO_ANY: Final = {"$ref": f"#/$defs/{_ANY}"}
_COMBINE: Final = ("allOf", "anyOf", "oneOf")
#: Keywords that leave every value possible.
_NOTES: Final = frozenset(
    "title description default examples example $comment deprecated readOnly writeOnly $schema $id".split()
)
_SINGLE_SCHEMAS: Final = ("items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else",
               "unevaluatedItems", "unevaluatedProperties", "additionalItems")  # fmt: skip
_NAMED: Final = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")


def compact_schema(schema: Mapping[str, Any], *, lenient: bool = False) -> dict[str, Any]:
    """The schema whose JSON is closed, compact and bounded; `schema` must have passed `check_schema`. With `lenient`,
    keywords that cannot be held to are left out of account."""
    open_targets = set(_find_merged_targets(schema))
    node_found = _compact_node(schema, merged=False, open_targets=open_targets)
    if node_found == _TO_ANY:
        node_found = {"anyOf": [_TO_ANY]}
    if not isinstance(definitions := node_found.get("$defs", {}), Mapping):
        raise KeyeError("the JSON schema has $defs that are no object; give one schema for each name")
    kinds = [{"type": "object", "additionalProperties": _TO_ANY}, {"type": "array", "items": _TO_ANY}]
    any_value = {"anyOf": [{"type": "string"}, _bound_node({"type": "number"}, {"number"}), *kinds,
                           {"type": "boolean"}, {"type": "null"}]}  # fmt: skip
    node_found["$defs"] = {**definitions, _ANY: any_value}
    return {**node_found, "x-guidance": {**_COMPACT, "lenient": lenient}}


def build_call_schema(name: str, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The schema of one call of a function. References of its parameters count from their own root, so what they refer
    to is moved."""
    arguments = dict(parameters or EMPTY_OBJECT)
    check_schema(arguments)
    if not arguments.keys() - _NOTES - {"type"} and arguments.get("type", "object") == "object":
        arguments |= EMPTY_OBJECT
    definitions: dict[str, Any] = {key: arguments.pop(key) for key in ("$defs", "definitions") if key in arguments}
    properties = {"name": {"const": name}, "arguments": arguments}
    return {
        "type": "object", "properties": properties, "required": ["name", "arguments"], "additionalProperties": False,
        **definitions,
    }  # fmt: skip


def _compact_node(value: Any, *, merged: bool, open_targets: set[str]) -> Any:
    """A schema inside another. `merged` says that others hold for the same value, which may name other properties."""
    if value is True or (isinstance(value, Mapping) and not value.keys() - _NOTES):
        return _TO_ANY
    if not isinstance(value, Mapping):
        return value
    node = dict(value)
    if "$schema" in node and not _DRAFT.fullmatch(str(node["$schema"])):
        del node["$schema"]  # it could only be fetched
    has_properties = "properties" in node or "$ref" in node
    for key in _SINGLE_SCHEMAS:
        if key in node and isinstance(node[key], bool | Mapping) and not (key == "additionalProperties" and merged):
            node[key] = _compact_node(node[key], merged=merged or key in ("not", "if", "then", "else"),
                              open_targets=open_targets)  # fmt: skip
    for key in (*_COMBINE, "prefixItems", "items"):
        if isinstance(node.get(key), list):
            shared = key in _COMBINE and (merged or has_properties or (key == "allOf" and len(node[key]) > 1))
            node[key] = [_compact_node(part, merged=shared, open_targets=open_targets) for part in node[key]]
    for key in _NAMED:
        if isinstance(node.get(key), Mapping):
            node[key] = {
                name: _compact_node(part, merged=f"#/{key}/{name}" in open_targets, open_targets=open_targets)
                for name, part in node[key].items()
            }
    return _close_node(node, merged)


def _close_node(node: dict[str, Any], merged: bool) -> dict[str, Any]:
    """A node whose inner schemas are done, closed and bounded itself."""
    types = node.get("type")
    listed = types if isinstance(types, list) else [types]
    kinds = {part for part in listed if isinstance(part, str)}
    mixed = any(key in node for key in (*_COMBINE, "$ref", "if", "enum", "const"))
    if "properties" in node and not kinds and not mixed and not merged:
        node["type"], kinds = "object", {"object"}
    if "object" in kinds and not mixed and not merged and "unevaluatedProperties" not in node:
        if "properties" in node and "patternProperties" not in node:
            node.setdefault("additionalProperties", False)
        elif "patternProperties" not in node:
            node.setdefault("additionalProperties", _TO_ANY)
    if "array" in kinds and not mixed and not merged and "prefixItems" not in node:
        node.setdefault("items", _TO_ANY)
    if isinstance(node.get("maxLength"), int) and node["maxLength"] > _LONGEST:
        del node["maxLength"]
    if isinstance(node.get("minLength"), int) and node["minLength"] > _LONGEST:
        raise KeyeError(f"the JSON schema has a minLength of {node['minLength']:,}; it can be up to {_LONGEST:,}")
    return _bound_node(node, kinds) if kinds & {"number", "integer"} and not {"enum", "const"} & node.keys() else node


def _bound_node(node: dict[str, Any], kinds: set[str]) -> dict[str, Any]:
    """A schema of numbers with a smallest, a largest and, unless they are whole, a step. Limits beyond 64-bit integers
    become the largest that an automaton of digits can have; `KeyeError` where only numbers beyond these would do."""
    for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        value = node.get(key)
        if isinstance(value, int | float) and abs(value) > _CLAMP:
            if (value > 0) == key.lower().endswith("minimum"):
                raise KeyeError(f"the JSON schema has a {key} of {value:.4g}; limits of numbers can be up to 10^18")
            node[key] = _CLAMP if value > 0 else -_CLAMP
    if "minimum" not in node and "exclusiveMinimum" not in node:
        node["minimum"] = min(-_LARGEST, _limit(node, "maximum", "exclusiveMaximum"))
    if "maximum" not in node and "exclusiveMaximum" not in node:
        node["maximum"] = max(_LARGEST, _limit(node, "minimum", "exclusiveMinimum"))
    if "number" in kinds and "multipleOf" not in node:
        node["multipleOf"] = _STEP
    return node


def _limit(node: Mapping[str, Any], *names: str) -> float:
    """Ten times a limit that the schema itself sets, so that the other one lies beyond it."""
    node_found = [node[name] for name in names if isinstance(node.get(name), int | float)]
    return node_found[0] * 10 if node_found else 0


def _find_merged_targets(schema: object) -> Iterator[str]:
    """References to schemas that hold for a value together with others."""
    for _, _, node in _walk(schema):
        if not isinstance(node, Mapping):
            continue
        has_properties = "properties" in node
        if has_properties and isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for key in _COMBINE:
            branches = node.get(key)
            if isinstance(branches, list) and (has_properties or (key == "allOf" and len(branches) > 1)):
                yield from (
                    part["$ref"] for part in branches if isinstance(part, Mapping) and isinstance(part.get("$ref"), str)
                )


def check_together(schemas: Iterable[object], name: str) -> None:
    """`KeyeError` where several schemas of one form, each within its limits, are too large together."""
    if sum(1 for schema in schemas for _ in _walk(schema)) > MAX_TOGETHER:
        raise KeyeError(f"the JSON schemas of {name} have more than {MAX_TOGETHER:,} entries together; offer fewer")


def check_schema(schema: object) -> None:
    """`KeyeError` for a JSON schema that is not an object, is too large or too deep, or refers to others."""
    if not isinstance(schema, Mapping):
        raise KeyeError(f"the JSON schema is a {type(schema).__name__}; give an object")
    for nodes, (depth, name, value) in enumerate(_walk(schema), 1):
        if depth > MAX_DEPTH:
            raise KeyeError(f"the JSON schema is nested more than {MAX_DEPTH} deep; make it flatter")
        if nodes > MAX_NODES:
            raise KeyeError(f"the JSON schema has more than {MAX_NODES:,} entries; make it smaller")
        if name == "$ref" and not (isinstance(value, str) and value.startswith("#")):
            raise KeyeError("the JSON schema refers to something outside itself; copy that into $defs")
        patterns = [value] if name == "pattern" and isinstance(value, str) else []
        if name == "patternProperties" and isinstance(value, Mapping):
            patterns = [*map(str, value)]
        for pattern in patterns:
            if len(pattern) > MAX_PATTERN:
                sentence = f"a pattern of the JSON schema has more than {MAX_PATTERN:,} characters; make it shorter"
                raise KeyeError(sentence)
            check_regex(pattern, "pattern of the JSON schema")
    try:
        size = len(json.dumps(schema).encode())
    except (TypeError, ValueError):
        raise KeyeError("the JSON schema is not JSON; give plain data") from None
    if size > MAX_BYTES:
        raise KeyeError(f"the JSON schema has more than {MAX_BYTES:,} bytes; make it smaller")


def _walk(value: object) -> Iterator[tuple[int, str, object]]:
    """Depth, name and value of everything inside, without recursion."""
    waiting: list[tuple[int, str, object]] = [(0, "", value)]
    while waiting:
        depth, name, inner = waiting.pop()
        yield depth, name, inner
        if isinstance(inner, Mapping):
            waiting += [(depth + 1, str(key), child) for key, child in inner.items()]
        elif isinstance(inner, list | tuple):
            waiting += [(depth + 1, "", child) for child in inner]
