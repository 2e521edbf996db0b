"""Structured output: which texts a form lets through, token by token, and which forms are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance")

from keye.chat.tokenizer import Tokenizer
from keye.config import load_model_config
from keye.engine.guide import Form, GuideFactory, Tag
from keye.errors import KeyeError, KeyeWarning

NANO = Path(__file__).parents[2] / "configs/nano"
BIG = "1" * 40
A: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def with_a(schema: Any, **more: Any) -> dict[str, Any]:
    """An object with one property of this schema."""
    return {"type": "object", "properties": {"a": schema}, "required": ["a"], **more}


@pytest.fixture(scope="module")
def factory() -> GuideFactory:
    config = load_model_config(NANO)
    return GuideFactory(Tokenizer.from_file(NANO), config.eos_token_ids, config.text.vocab_size)


def ids_of(text: str) -> list[int]:
    """The tokens of a reply, in which the marks of calls and of reasoning are tokens of their own."""
    tokenizer = Tokenizer.from_file(NANO)
    pieces = re.split(r"(</?(?:tool_call|think)>)", text)
    return [token for piece in pieces for token in tokenizer.encode(piece, special=piece in tokenizer.added_tokens)]


def allows(factory: GuideFactory, form: Form, text: str, **options: Any) -> bool:
    """Whether a reply may be `text` and end there."""
    guide, end = factory.guide(form, **options), int((~factory.no_end).nonzero()[0])
    for token in ids_of(text):
        mask = guide.mask()
        if mask is not None and not mask[token]:
            return False
        guide.advance(token)
    mask = guide.mask()
    return guide.settle(end) == end and (mask is None or bool(mask[end]))


@pytest.mark.parametrize(
    ("schema", "text", "allowed"),
    [
        (A, '{"a":1}', True),
        (A, '{"a": 1}', False),
        (A, '{"a":1}\n', False),
        (A, '{"a":1,"b":2}', False),
        ({**A, "additionalProperties": True}, '{"a":1,"b":{"c":[1,2.5,"x",null]}}', True),
        ({**A, "additionalProperties": {"type": "string"}}, '{"a":1,"b":"x"}', True),
        ({**A, "additionalProperties": {"type": "string"}}, '{"a":1,"b":2}', False),
        ({"properties": {"a": {"type": "integer"}}, "required": ["a"]}, '{"a":1}', True),
        # Objects inside, and those that are referred to.
        (with_a(A), '{"a":{"a":1}}', True),
        (with_a(A), '{"a":{"a":1,"b":1}}', False),
        (with_a({"$ref": "#/$defs/P"}, **{"$defs": {"P": A}}), '{"a":{"a":1}}', True),
        (with_a({"$ref": "#/$defs/P"}, **{"$defs": {"P": A}}), '{"a":{"a":1,"b":1}}', False),
        (with_a({"type": "array", "items": A}), '{"a":[{"a":1},{"a":2}]}', True),
        (with_a({"type": "array", "items": A}), '{"a":[{"a":1,"b":1}]}', False),
        ({"anyOf": [A, {"type": "string"}]}, '{"a":1,"b":2}', False),
        ({"anyOf": [A, {"type": "string"}]}, '"x"', True),
        # What others add to the same object stays possible.
        ({"allOf": [{"$ref": "#/$defs/P"}, {"type": "object", "properties": {"b": {"type": "string"}},
          "required": ["b"]}], "$defs": {"P": A}}, '{"a":1,"b":"x"}', True),
        ({**A, "anyOf": [{"required": ["a"]}, {"properties": {"b": {"type": "null"}}}]}, '{"a":1}', True),
        ({"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False},
         '{"x1":1}', True),
        # Values of any kind.
        ({"type": "object"}, '{"a":1,"b":{"c":[1,2.5,"x",null,-0.000012]}}', True),
        ({"type": "object"}, '{"a":1, "b":2}', False),
        (with_a({}), '{"a":[true]}', True),
        (with_a(True), '{"a":{"b":2}}', True),
        (with_a({"type": "array"}), '{"a":[1,"x",{"z":1}]}', True),
        # Numbers end.
        (A, f'{{"a":{BIG}}}', False),
        (A, '{"a":-999999999999999}', True),
        (with_a({"type": "number"}), '{"a":-12.5}', True),
        (with_a({"type": "number"}), f'{{"a":0.{BIG}}}', False),
        (with_a({"type": "number"}), f'{{"a":{BIG}}}', False),
        (with_a({"type": "number"}), '{"a":1e5}', False),
        (with_a({"type": ["number", "null"]}), '{"a":null}', True),
        (with_a({"type": ["number", "null"]}), f'{{"a":{BIG}}}', False),
        ({"type": "object"}, f'{{"a":{BIG}}}', False),
        (with_a({"type": "integer", "minimum": 5}), f'{{"a":{BIG}}}', False),
        (with_a({"type": "integer", "minimum": 5}), '{"a":7}', True),
        (with_a({"type": "integer", "minimum": 5}), '{"a":4}', False),
        (with_a({"type": "number", "exclusiveMinimum": 0, "maximum": 1}), '{"a":0.5}', True),
        (with_a({"type": "integer", "minimum": 0, "maximum": 2**63 - 1}), '{"a":12345}', True),
        (with_a({"type": "integer", "maximum": -(10**16)}), '{"a":-20000000000000000}', True),
        (with_a({"type": "integer", "enum": [1, 10**20]}), '{"a":1}', True),
        # A schema that refers to itself.
        ({"type": "object", "properties": {"c": {"type": "array", "items": {"$ref": "#"}}}, "required": ["c"]},
         '{"c":[{"c":[]}]}', True),
    ],
)  # fmt: skip
def test_json_is_closed_compact_and_bounded(
    factory: GuideFactory, schema: dict[str, Any], text: str, allowed: bool
) -> None:
    assert allows(factory, Form("json_schema", schema), text) == allowed


@pytest.mark.parametrize(
    ("parameters", "arguments", "allowed"),
    [
        (A, '{"a":1}', True),
        (A, '{"a":1,"b":1}', False),
        (A, '{"a": 1}', False),
        (None, "{}", True),
        (None, '{"a":1}', False),
        ({"type": "object"}, '{"a":1}', False),
        ({"type": "object", "additionalProperties": True}, '{"a":1}', True),
        (with_a({"$ref": "#/$defs/P"}, **{"$defs": {"P": A}}), '{"a":{"a":1}}', True),
    ],
)
def test_calls(factory: GuideFactory, parameters: dict[str, Any] | None, arguments: str, allowed: bool) -> None:
    function = {"name": "f"} if parameters is None else {"name": "f", "parameters": parameters}
    form = Form("calls", [{"type": "function", "function": function}])
    call = f'<tool_call>\n{{"name":"f","arguments":{arguments}}}\n</tool_call>'
    assert allows(factory, form, call) == allowed
    assert not allows(factory, form, f"{call}\n{call}")
    assert allows(factory, Form("calls", form.value, several=True), f"{call}\n{call}") == allowed


@pytest.mark.parametrize(
    ("form", "text", "allowed"),
    [
        (Form("grammar", 'root ::= "a" | "b"'), "b", True),
        (Form("grammar", 'root ::= item+\nitem ::= "- " [a-z]+ "\\n"'), "- ab\n- c\n", True),
        (Form("grammar", 'root ::= item+\nitem ::= "- " [a-z]+ "\\n"'), "- AB\n", False),
        (Form("grammar", 'start: "a" | "b"'), "a", True),
        (Form("grammar", 'start: "a" | "b"'), "c", False),
        (Form("regex", "[ab]{3}"), "aba", True),
        (Form("regex", "[ab]{3}"), "ab", False),
        (Form("choice", ["yes", "no", 'a "b"']), 'a "b"', True),
        (Form("tags", [Tag("<f", "<f>", A, "</f>")]), 'see <f>{"a":1}</f> there', True),
        (Form("tags", [Tag("<f", "<f>", A, "</f>")]), 'see <f>{"b":1}</f>', False),
        (Form("tags", [Tag("<f", "<f>", A, "</f>")]), "nothing at all", True),
    ],
)
def test_other_forms(factory: GuideFactory, form: Form, text: str, allowed: bool) -> None:
    assert allows(factory, form, text) == allowed


@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        (Form("json_schema", with_a({"type": "str"})), "the JSON schema cannot be used: Invalid type: str$"),
        (Form("json_schema", {"$ref": "http://x/y"}), "refers to something outside"),
        (Form("json_schema", {"type": "object", "$defs": []}), r"\$defs that are no object"),
        (Form("json_schema", {"type": [{}]}), "the JSON schema cannot be used"),
        (Form("regex", "[.*"), "the regex cannot be used: [^|]*$"),
        (Form("regex", "a" * 3000), "more than 2,000 characters"),
        (Form("regex", "(ab"), "the regex cannot be used: unclosed group$"),
        (Form("json_schema", with_a({"type": "string", "pattern": "["})), "cannot be used: unclosed character class$"),
        (Form("json_schema", with_a({"minimum": "a"})), "expected a number for 'minimum'"),
        (Form("json_schema", {"$defs": [], "type": "object"}), "[$]defs that are no object"),
        (Form("json_schema", with_a({"type": [[1]]})), "the JSON schema cannot be used"),
        (Form("json_schema", with_a({"type": "integer", "minimum": 10**20})), "minimum of 1e[+]20; limits of numbers"),
        (Form("json_schema", with_a({"type": "number", "maximum": -1e300})), "maximum of -1e[+]300; limits of"),
        (Form("json_schema", with_a({"type": "string", "minLength": 10**12})), "it can be up to 100,000,000"),
        (Form("grammar", "root ::= foo bar("), "the grammar cannot be read"),
        (Form("grammar", "root ::= " + "(" * 20_000), "nested too deep"),
        (Form("grammar", "start: foo"), "the grammar cannot be used: [^|]*$"),
        (
            Form(
                "calls",
                [{"function": {"name": f"f{i}", "parameters": with_a({"enum": list(range(999))})}} for i in range(30)],
            ),
            "the functions have more than 20,000 entries together",
        ),
        (
            Form("tags", [Tag("<f", f"<f{i}", with_a({"enum": list(range(999))}), "") for i in range(30)]),
            "the tags have more than 20,000 entries together",
        ),
        (Form("tags", [Tag("<f", "<g>", A, "")]), "the JSON schema of a tag cannot be used"),
        (Form("tags", [Tag("<f", "<f" + "x" * 300, A, "")]), "characters in one text"),
    ],
)
def test_forms_that_are_refused(factory: GuideFactory, form: Form, sentence: str) -> None:
    with pytest.raises(KeyeError, match=sentence):
        factory.guide(form)


@pytest.mark.parametrize(
    "form",
    [
        Form("regex", "(x{9999}){9999}"),
        Form("regex", "(x{9999,}){9999,}"),
        Form("regex", "(x{9999}[a[b](]){9999}"),
        Form("regex", "(x{9999}(?x)#(\n){9999}#)\n"),
        Form("grammar", 'root ::= a{10000}\na ::= b{10000}\nb ::= "x"'),
        Form("grammar", 'start: a{10000}\na: b{10000}\nb: "x"'),
        Form("grammar", 'start: (a){10000}\na: (b)~10000\nb: "x"'),
        Form("grammar", "start: A{9999}\nA: /x{9999}/"),
        Form("grammar", "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(30)) + '\nA30: "x"'),
        Form("grammar", 'start: %json {"type":"string","pattern":"^(x{9999}){9999}$"}'),
        Form("json_schema", with_a({"type": "string", "pattern": "^(x{9999}){9999}$"})),
        Form("json_schema", {"type": "object", "patternProperties": {"^(x{9999}){9999}$": {}}}),
    ],
)
def test_repetitions_that_multiply_are_refused_before_they_are_laid_out(factory: GuideFactory, form: Form) -> None:
    with pytest.raises(KeyeError, match="multiply to more than 50,000 characters"):
        factory.guide(form)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (Form("regex", r"(\w{1,50} ?){1,2000}"), "so many words"),
        (Form("regex", r"([0-9a-f]{2}:){5}[0-9a-f]{2}"), "0a:0b:0c:0d:0e:0f"),
        (Form("grammar", 'root ::= item{1,5000}\nitem ::= "- " [a-z]{1,5000} "\\n"'), "- a\n- b\n"),
        (Form("grammar", 'start: %json {"type": "boolean"} // {9999}{9999}{9999}'), "true"),
        (Form("json_schema", with_a({"type": "string", "maxLength": 10**12})), '{"a":"x"}'),
        (Form("json_schema", {**A, "$schema": "https://x.example/schema"}), '{"a":1}'),
        (Form("json_schema", with_a({"type": "integer", "maximum": 1e300})), '{"a":1}'),
    ],
)
def test_forms_of_many_repetitions_that_stay_small(factory: GuideFactory, form: Form, text: str) -> None:
    assert allows(factory, form, text)


@pytest.mark.parametrize(
    ("schema", "text", "part"),
    [
        (with_a({"type": "string", "format": "path"}), '{"a":"x"}', "format path"),
        (with_a({"type": "array", "items": {"type": "string"}, "uniqueItems": True}), '{"a":["x"]}', "uniqueItems"),
    ],
)
def test_parts_that_cannot_be_held_to_are_noted(
    factory: GuideFactory, schema: dict[str, Any], text: str, part: str
) -> None:
    with pytest.warns(KeyeWarning, match=f"not held to these parts of its JSON schema: {part}"):
        assert allows(factory, Form("json_schema", schema), text)


def test_a_form_after_reasoning_cannot_be_left_out(factory: GuideFactory) -> None:
    form = Form("json_schema", A)
    assert allows(factory, form, 'I think.</think>{"a":1}', after_reasoning=True)
    assert not allows(factory, form, "I think.", after_reasoning=True), "the reply cannot end inside the reasoning"
    assert not allows(factory, form, "I think.</think>", after_reasoning=True)
    assert not allows(factory, form, "I think.</think>no", after_reasoning=True)


def test_the_end_of_reasoning_may_be_written_in_characters(factory: GuideFactory) -> None:
    guide = factory.guide(Form("choice", ["yes"]), after_reasoning=True)
    for token in Tokenizer.from_file(NANO).encode("so </think>"):
        guide.advance(token)
    fork = guide.fork()
    (first, *_) = Tokenizer.from_file(NANO).encode("yes")
    mask, other = fork.mask(), guide.mask()
    assert mask is not None and mask[first]
    assert other is not None and not other[Tokenizer.from_file(NANO).encode("no")[0]]


def test_where_the_reply_would_end_the_reasoning_ends(factory: GuideFactory) -> None:
    guide, end = factory.guide(Form("json_schema", A), after_reasoning=True), int((~factory.no_end).nonzero()[0])
    assert guide.settle(40) == 40 and guide.settle(end) == factory.end_of_reasoning
    assert guide.mask() is None
    guide.advance(guide.settle(end))
    assert guide.mask() is not None and guide.settle(end) == end
