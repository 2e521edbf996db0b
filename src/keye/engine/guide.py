"""Structured output: which tokens may come next, so that a reply is of a form that was asked for.

A form is a JSON schema, a regular expression, a grammar (Lark's syntax), or one of some texts. llguidance (an extra)
does the work; here are its limits, and the tokens that no form may hold.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from keye.errors import KeyeError
from keye.tokenizer import Tokenizer

FormKind = Literal["json_schema", "regex", "grammar", "choice", "calls"]

#: Any JSON object.
ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}
MAX_BYTES: Final = 64 * 1024
MAX_DEPTH: Final = 32
MAX_NODES: Final = 5_000
MAX_PATTERN: Final = 2_000
_WHITE_SPACE: Final = r"[ \n\t]{0,16}"
_OPEN_CALL, _CLOSE_CALL = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Form:
    """What a reply must look like: `value` is a schema, a pattern, a grammar, or texts to choose from; for "calls", the
    functions (`{"function": {"name": ..., "parameters": ...}}`) of which at least one must be called, and only one
    unless `several`. With `otherwise`, a JSON schema, an answer of that form may stand in place of the calls."""

    kind: FormKind
    value: Any
    several: bool = False
    otherwise: Mapping[str, Any] | None = None


class Guide:
    """The state of one reply: `mask` says what may come next, `advance` takes what came.

    With `after`, a token id, nothing is restricted up to that token (the end of reasoning).
    """

    def __init__(self, matcher: Any, vocab_size: int, after: int | None = None) -> None:
        self._matcher, self._vocab_size, self._after = matcher, vocab_size, after

    def mask(self) -> Tensor | None:
        """Which tokens may come next, bool [V]; None where all may. An end-of-sequence token may come when the form is
        complete. `KeyeError` where the form proves too costly to follow."""
        if self._after is not None:
            return None
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) != 0
        self._check()
        assert allowed.shape[0] == self._vocab_size
        return allowed

    def advance(self, token: int) -> None:
        """Takes the token that was drawn."""
        if self._after is not None:
            self._after = None if token == self._after else self._after
            return
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self._check()

    def fork(self) -> Guide:
        """The same state, to go on by itself."""
        return Guide(self._matcher.deep_copy(), self._vocab_size, self._after)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise KeyeError("the form of the reply (response_format) is too complex to follow; make it simpler")


class GuideFactory:
    """Makes guides for one model. `eos` are its end-of-sequence tokens, `vocab_size` the columns of its logits."""

    def __init__(self, tokenizer: Tokenizer, eos: Collection[int], vocab_size: int) -> None:
        try:
            import llguidance
        except ImportError:
            raise KeyeError("structured output needs llguidance; install keye[serve]") from None
        self._library = llguidance
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, eos, vocab_size))
        self._tokens = llguidance.LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=sorted(eos))
        self._limits = llguidance.LLParserLimits(
            initial_lexer_fuel=500_000, step_lexer_fuel=100_000, max_lexer_states=50_000, max_grammar_size=100_000,
            verbose_errors=False,
        )  # fmt: skip

    def guide(self, form: Form, *, after_reasoning: bool = False) -> Guide:
        """A guide for a reply from its first token, or from the end of its reasoning on. `KeyeError` for a form that
        cannot be read, is too large, or too complex; takes up to some 100 ms."""
        try:
            grammar = self._grammar(form)
        except ValueError as error:
            if isinstance(error, KeyeError):
                raise
            raise _refused(form, str(error)) from None
        matcher = self._library.LLMatcher(self._tokens, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise _refused(form, matcher.get_error())
        after = self._tokenizer.added_tokens.get("</think>") if after_reasoning else None
        return Guide(matcher, self._vocab_size, after)

    def _grammar(self, form: Form) -> str:
        matcher, value = self._library.LLMatcher, form.value
        if form.kind == "json_schema":
            check_schema(value)
            return str(matcher.grammar_from_json_schema(_bounded(value)))
        if form.kind == "calls":
            return str(matcher.grammar_from_lark(self._calls(form)))
        if form.kind == "choice":
            value = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
        if len(str(value).encode("utf-8", "replace")) > MAX_BYTES:
            raise KeyeError(f"the {form.kind} has more than {MAX_BYTES:,} bytes; make it shorter")
        if form.kind == "regex":
            if len(value) > MAX_PATTERN:
                raise KeyeError(f"the regex has more than {MAX_PATTERN:,} characters; make it shorter")
            return str(matcher.grammar_from_regex(value))
        return str(matcher.grammar_from_lark(value))

    def _calls(self, form: Form) -> str:
        """A grammar of calls of functions as the chat format writes them."""
        for mark in (_OPEN_CALL, _CLOSE_CALL):
            if mark not in self._tokenizer.added_tokens:
                raise KeyeError(f"the model has no token {mark}, so calls of tools cannot be required of it")
        schemas = [_call_schema(tool["function"]) for tool in form.value]
        rules = [f"call_{i}: {_json_rule(schema)}" for i, schema in enumerate(schemas)]
        either = " | ".join(f"call_{i}" for i in range(len(rules)))
        one = f'{_OPEN_CALL} "\\n" any "\\n" {_CLOSE_CALL}'
        start = f'{one} ("\\n" {one})*' if form.several else one
        if form.otherwise is not None:
            check_schema(form.otherwise)
            start, rules = f"calls | answer\ncalls: {start}", [*rules, f"answer: {_json_rule(form.otherwise)}"]
        return "\n".join([f"start: {start}", f"any: {either}", *rules])


def _json_rule(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps(_bounded(schema), ensure_ascii=False)}"


def _bounded(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with a limit on white space between its values, or a weak model would write nothing else."""
    return {**schema, "x-guidance": {"whitespace_pattern": _WHITE_SPACE}}


def _call_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """The object of one call. References of the parameters' schema count from its own root, so they are moved."""
    parameters = dict(function.get("parameters") or ANY_OBJECT)
    check_schema(parameters)
    definitions = {name: parameters.pop(name) for name in ("$defs", "definitions") if name in parameters}
    properties = {"name": {"const": function["name"]}, "arguments": parameters}
    return {
        "type": "object", "properties": properties, "required": ["name", "arguments"], "additionalProperties": False,
        **definitions,
    }  # fmt: skip


def check_schema(schema: object) -> None:
    """`KeyeError` for a JSON schema that is no object, too large, too deep, or refers to anything outside itself."""
    if not isinstance(schema, Mapping):
        raise KeyeError(f"the JSON schema is a {type(schema).__name__}; give an object")
    for nodes, (depth, name, value) in enumerate(_walk(schema), 1):
        if depth > MAX_DEPTH:
            raise KeyeError(f"the JSON schema is nested more than {MAX_DEPTH} deep; make it flatter")
        if nodes > MAX_NODES:
            raise KeyeError(f"the JSON schema has more than {MAX_NODES:,} entries; make it smaller")
        if name == "$ref" and not (isinstance(value, str) and value.startswith("#")):
            raise KeyeError("the JSON schema refers to something outside itself; copy that into $defs")
        if name == "pattern" and isinstance(value, str) and len(value) > MAX_PATTERN:
            raise KeyeError(f"a pattern of the JSON schema has more than {MAX_PATTERN:,} characters; make it shorter")
    try:
        size = len(json.dumps(schema).encode())
    except (TypeError, ValueError):
        raise KeyeError("the JSON schema is no JSON; give plain data") from None
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


def _refused(form: Form, reason: str) -> KeyeError:
    """The sentence for a form that llguidance does not take; its own words are cut to what can be shown."""
    told = " ".join(reason.split())
    return KeyeError("the {} cannot be used: {}", form.kind.replace("_", " "), told[:300] or "it is not valid")


class _Vocabulary:
    """The tokens of a model as llguidance wants them: bytes by id. Every added token is a special one, so that no text
    of a form can stand for it."""

    def __init__(self, tokenizer: Tokenizer, eos: Collection[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        added = set(tokenizer.added_tokens.values())
        self.eos_token_id, self.bos_token_id = min(eos), None
        self.special_token_ids = sorted(added)
        self.tokens = [tokenizer.token_bytes(i) or b"\xff" + f"<unused_{i}>".encode() for i in range(vocab_size)]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)
