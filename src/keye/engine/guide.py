"""Structured output: which tokens may come next, so that a reply is of a form that was asked for.

A form is a JSON schema, a regular expression, a grammar (Lark's syntax, or GBNF), one of some texts, or text with
tagged JSON in it. llguidance (an extra) does the work; here are its limits, and the tokens that no form may hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from keye.chat.grammar_size import check_grammar, check_regex
from keye.chat.json_schema import (
    MAX_BYTES,
    MAX_PATTERN,
    build_call_schema,
    check_schema,
    check_together,
    compact_schema,
)
from keye.chat.tokenizer import Tokenizer
from keye.errors import KeyeError, KeyeWarning, missing_package, warn

FormKind = Literal["json_schema", "regex", "grammar", "choice", "calls", "tags"]

#: What a form of each kind is called in sentences.
_NAMES: Final[Mapping[FormKind, str]] = {
    "json_schema": "JSON schema", "regex": "regex", "grammar": "grammar", "choice": "choice",
    "calls": "JSON schema of a function", "tags": "JSON schema of a tag",
}  # fmt: skip
#: Most tags of a form, and characters of each of their texts.
MAX_TAGS: Final = 64
MAX_TAG_TEXT: Final = 256
_OPEN_CALL, _CLOSE_CALL = "<tool_call>", "</tool_call>"
_END_OF_REASONING: Final = b"</think>"
#: What llguidance says of keywords that it knows and cannot follow.
_NOT_ENFORCED: Final = re.compile(r"(?:Unimplemented keys:|Unknown)([^\n]*)")


#: Beginnings of llguidance's messages that say more about its internals than about the form, and our words for them.
_MESSAGES: Final = (
    ("Failed to generate regex", "its limits of numbers cannot be followed"),
    ("initial lexer configuration", "it is too complex; make it simpler"),
    ("panic", "it is too complex; make it simpler"),
    ("invalid multiple of", "multipleOf must be above 0"),
)
_MAX_MESSAGE: Final = 300


@dataclass(frozen=True)
class Form:
    """What a reply must look like: `value` is a schema, a pattern, a grammar, or texts to choose from; for "calls", the
    functions (`{"function": {"name": ..., "parameters": ...}}`) of which at least one must be called, and only one
    unless `several`; for "tags", the tags that may stand in free text. With `otherwise`, a JSON schema, an answer of
    that form may stand in place of the calls. `field` is the one of a request that the form came in."""

    kind: FormKind
    value: Any
    several: bool = False
    otherwise: Mapping[str, Any] | None = None
    field: str | None = None


@dataclass(frozen=True)
class Tag:
    """JSON of a schema between two texts; once the model has written `trigger`, with which `begin` starts, it must
    come."""

    trigger: str
    begin: str
    schema: Mapping[str, Any]
    end: str


class Guide:
    """The state of one reply: `mask` says what may come next, `settle` what stands in place of a token that was drawn,
    `advance` takes what came.

    With `reasoning`, the form holds from the end of the block of reasoning on. Up to there everything may come; where
    the model would end its reply, it ends its reasoning instead.
    """

    def __init__(
        self, matcher: Any, factory: GuideFactory, *, reasoning: bool = False, name: str = "the form of the reply"
    ) -> None:
        self._matcher, self._factory, self._reasoning, self._name = matcher, factory, reasoning, name
        self._tail = b""

    def mask(self) -> Tensor | None:
        """Which tokens may come next, bool [V], None for all. An end-of-sequence token may come when the form is
        complete. `KeyeError` where the form proves too costly to follow."""
        if self._reasoning:
            return None if self._factory.end_of_reasoning is not None else self._factory.no_end
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) != 0
        self._check()
        assert allowed.shape == self._factory.no_end.shape
        return allowed

    def settle(self, token: int) -> int:
        """The token to write where `token` was drawn."""
        end = self._factory.end_of_reasoning
        return end if self._reasoning and end is not None and not self._factory.no_end[token] else token

    def advance(self, token: int) -> None:
        """Takes the token that was drawn."""
        if self._reasoning:
            # A model may write the mark as characters, too, and a reader of the reply takes both for it.
            self._tail = self._tail[-len(_END_OF_REASONING) :] + self._factory.bytes_of(token)
            self._reasoning = _END_OF_REASONING not in self._tail
        elif not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self._check()

    def fork(self) -> Guide:
        """The same state, to go on by itself."""
        copy = Guide(self._matcher.deep_copy(), self._factory, reasoning=self._reasoning, name=self._name)
        copy._tail = self._tail
        return copy

    def _check(self) -> None:
        if self._matcher.is_error():
            raise KeyeError(f"{self._name} is too complex to follow; make it simpler")


class GuideFactory:
    """Makes guides for one model. `eos` are its end-of-sequence tokens, `vocab_size` the columns of its logits."""

    def __init__(self, tokenizer: Tokenizer, eos: Collection[int], vocab_size: int) -> None:
        try:
            import llguidance
        except ImportError:
            raise missing_package("llguidance", "structured output", "serve") from None
        self._library = llguidance
        self._tokenizer = tokenizer
        self.bytes_of = tokenizer.token_bytes
        self.end_of_reasoning = tokenizer.added_tokens.get(_END_OF_REASONING.decode())
        self.no_end = torch.ones(vocab_size, dtype=torch.bool)
        self.no_end[sorted(eos)] = False
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, eos, vocab_size))
        self._tokens = llguidance.LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=sorted(eos))
        self._limits = llguidance.LLParserLimits(
            initial_lexer_fuel=500_000, step_lexer_fuel=100_000, max_lexer_states=50_000, max_grammar_size=100_000,
            verbose_errors=False,
        )  # fmt: skip

    def guide(self, form: Form, *, after_reasoning: bool = False) -> Guide:
        """A guide for a reply from its first token, or from the end of its reasoning on. `KeyeError` for a form that
        cannot be read, is too large, or too complex; takes up to some 100 ms."""
        matcher = self._matcher(form)
        if matcher.is_error() and (match := _NOT_ENFORCED.search(str(matcher.get_error()))):
            matcher = self._matcher(form, lenient=True)
            if not matcher.is_error():
                parts = re.sub(r"[^\w, ]", "", match[1]).strip()[:200]
                note = f"the reply is not held to these parts of its JSON schema: {parts}"
                warn(KeyeWarning(note), stacklevel=2)
        if matcher.is_error():
            raise _reject(form, matcher.get_error())
        return Guide(matcher, self, reasoning=after_reasoning, name=form.field or "the form of the reply")

    def _matcher(self, form: Form, *, lenient: bool = False) -> Any:
        try:
            grammar = self._grammar(form, lenient)
        except (ValueError, AssertionError) as error:
            if isinstance(error, KeyeError):
                raise
            raise _reject(form, str(error)) from None
        return self._library.LLMatcher(self._tokens, grammar, log_level=0, limits=self._limits)

    def _grammar(self, form: Form, lenient: bool) -> str:
        matcher, value = self._library.LLMatcher, form.value
        if form.kind == "json_schema":
            check_schema(value)
            return str(matcher.grammar_from_json_schema(json.dumps(compact_schema(value, lenient=lenient))))
        if form.kind == "calls":
            return str(matcher.grammar_from_lark(self._calls(form, lenient)))
        if form.kind == "tags":
            return self._tags(value, lenient)
        if form.kind == "choice":
            value = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
        if len(str(value).encode("utf-8", "replace")) > MAX_BYTES:
            raise KeyeError(f"the {form.kind} has more than {MAX_BYTES:,} bytes; make it shorter")
        if form.kind == "regex":
            if len(value) > MAX_PATTERN:
                raise KeyeError(f"the regex has more than {MAX_PATTERN:,} characters; make it shorter")
            check_regex(value, "regex")
            return str(matcher.grammar_from_regex(value))
        if form.kind == "grammar":
            value = _lark(value)
            for schema in check_grammar(value):
                check_schema(schema)
        return str(matcher.grammar_from_lark(value))

    def _tags(self, tags: Sequence[Tag], lenient: bool) -> str:
        """A grammar of free text in which tags may stand."""
        texts = [text for tag in tags for text in (tag.trigger, tag.begin, tag.end)]
        if len(tags) > MAX_TAGS or any(len(text) > MAX_TAG_TEXT for text in texts):
            raise KeyeError(
                f"the structural_tag has more than {MAX_TAGS} tags or {MAX_TAG_TEXT} characters in one text"
            )
        for tag in tags:
            check_schema(tag.schema)
        check_together((tag.schema for tag in tags), "the tags")
        known = self._tokenizer.added_tokens
        listed = [
            self._library.StructTag(
                trigger=tag.trigger, begin=tag.begin, grammar=compact_schema(tag.schema, lenient=lenient), end=tag.end
            )
            for tag in tags
        ]
        special = all(tag.trigger in known for tag in tags)
        return str(self._library.StructTag.to_grammar(listed, assume_special=special))

    def _calls(self, form: Form, lenient: bool) -> str:
        """A grammar of calls of functions as the chat format writes them."""
        for mark in (_OPEN_CALL, _CLOSE_CALL):
            if mark not in self._tokenizer.added_tokens:
                raise KeyeError(f"the model has no token {mark}, so calls of tools cannot be required of it")
        functions = [tool["function"] for tool in form.value]
        schemas = [build_call_schema(function["name"], function.get("parameters")) for function in functions]
        check_together(schemas, "the functions")
        rules = [f"call_{i}: {_json_rule(schema, lenient)}" for i, schema in enumerate(schemas)]
        either = " | ".join(f"call_{i}" for i in range(len(rules)))
        call = f'{_OPEN_CALL} "\\n" any "\\n" {_CLOSE_CALL}'
        start = f'{call} ("\\n" {call})*' if form.several else call
        if form.otherwise is not None:
            check_schema(form.otherwise)
            start, rules = f"calls | answer\ncalls: {start}", [*rules, f"answer: {_json_rule(form.otherwise, lenient)}"]
        return "\n".join([f"start: {start}", f"any: {either}", *rules])


def _json_rule(schema: Mapping[str, Any], lenient: bool) -> str:
    return f"%json {json.dumps(compact_schema(schema, lenient=lenient), ensure_ascii=False)}"


def _reject(form: Form, reason: str) -> KeyeError:
    """The sentence for a form that llguidance does not take; of its own words those on the form itself are shown."""
    message = reason.rpartition("failed to compile JSON schema:")[2].strip()
    if "regex parse error:" in message:
        message = message.rpartition("\nerror: ")[2]
    message = re.sub(r"^(at )?\d+\(\d+\): ", "", " ".join(message.partition("\n")[0][: 2 * _MAX_MESSAGE].split()))[
        :_MAX_MESSAGE
    ]
    numbered = message.replace("Expected f64", "expected a number")
    message = next((ours for theirs, ours in _MESSAGES if message.startswith(theirs)), numbered)
    return KeyeError("the {} cannot be used: {}", _NAMES[form.kind], message or "it is not valid")


def _lark(grammar: str) -> str:
    """A grammar in Lark's syntax; one in GBNF, whose first rule is `root`, is translated."""
    from llguidance import gbnf_to_lark

    if gbnf_to_lark.is_lark_syntax(grammar) or "::=" not in grammar:
        return grammar
    try:
        return str(gbnf_to_lark.gbnf_to_lark(grammar))
    except RecursionError:
        raise KeyeError("the grammar is nested too deep; make it flatter") from None
    except Exception as error:  # noqa: BLE001 - the translator raises bare exceptions, of which none is a fault of ours
        raise KeyeError(f"the grammar cannot be read: {' '.join(str(error).split())[:300]}") from None


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
