"""How large the literals of a regular expression or a grammar get when their repetitions are written out, found
without doing so.

A literal is written out in memory as often as it must at least be repeated, so that a form of a hundred characters
could take all of it. Where a notation is read less exactly than by its parser, the result is too large rather than too
small.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from keye.errors import KeyeError

#: Characters and names of a form that must come, with their repetitions written out.
MAX_SIZE: Final = 50_000
_LARGEST: Final = 10**12

#: A token of a regular expression, but for classes, which may lie within each other.
_REGEX_TOKEN: Final = re.compile(r"\\[pPxuU]\{[^}]*\}|\\.|\{\d*(?:,\d*)?\}|\(\?[a-zA-Z-]*:?|.", re.DOTALL)
_CLASS_PART: Final = re.compile(r"\\.|\[\^?\]?|\]|[^\\\[\]]+", re.DOTALL)
#: Classes of more than one character, which are not written out.
_WIDE: Final = re.compile(r"\.|\\[wWdDsSpP].*|\[\^.*|\[.*(?:-|\\[wWdDsSpP]|\[:).*", re.DOTALL)
#: In this mode blanks and comments count for nothing.
_VERBOSE: Final = re.compile(r"\(\?[a-zA-Z]*x|/[a-z]*x[a-z]*$")
_LARK_TOKEN: Final = re.compile(
    r'"(?:\\.|[^"\\\n])*"|/(?:\\.|\[(?:\\.|[^\]\\])*\]|[^/\\])+/[a-z]*|(?://|#)[^\n]*|\{\s*\d*\s*(?:,\s*\d*\s*)?\}'
    r"|~\s*\d+(?:\s*\.\.\s*\d+)?|[A-Za-z_]\w*|[()\[\]:|]",
    re.DOTALL,
)
_COUNTED_GROUP: Final = re.compile(r"[)\]]\s*[{~]")
_LARK_RULE: Final = re.compile(r"^[?!]?([A-Za-z_]\w*)(?:\[[^\]\n]*\])?(?:\.-?\d+)?\s*:", re.MULTILINE)
_LARK_JSON: Final = re.compile(r"%(?:json|regex)\s*(?=[{\"])|%llguidance\s*(?={)")


def check_regex(pattern: str, name: str) -> None:
    """`KeyeError` where the repetitions of a regular expression multiply; `name` is what sentences call it."""
    _check(regex_size(pattern), name)


def check_grammar(grammar: str) -> list[Mapping[str, Any]]:
    """`KeyeError` where the repetitions of a grammar in Lark's syntax multiply; returns the JSON schemas in it."""
    schemas, text = _drop_json(grammar)
    starts = [*_LARK_RULE.finditer(text)]
    ends = [match.start() for match in starts[1:]] + [len(text)]
    bodies = {match[1]: text[match.end() : end] for match, end in zip(starts, ends, strict=True)}
    sizes: dict[str, int] = {}
    for name in bodies:
        _check(_rule_size(name, bodies, sizes, ()), "grammar")
    return schemas


def regex_size(pattern: str) -> int:
    """Characters of a regular expression that must come, with their repetitions written out."""
    if _VERBOSE.search(pattern):
        size = len(pattern)  # as if each repetition were within all others
        for token in re.findall(r"\{[^}]*\}", pattern):
            size = min(size * max(_count(token), 1), _LARGEST)
        return size
    groups = _Groups()
    for token in _regex_tokens(pattern):
        if token.startswith("("):
            groups.open()
        elif token == ")":
            groups.close()
        elif token[0] == "{" and len(token) > 1:
            groups.repeat(_count(token))
        elif token not in ("|", "*", "+", "?"):
            groups.add(0 if _WIDE.fullmatch(token) else 1)
    return groups.size


class _Groups:
    """Sizes of groups within groups; the last item is what a repetition repeats."""

    def __init__(self) -> None:
        self._open, self._last = [0], 0

    @property
    def size(self) -> int:
        return min(sum(self._open), _LARGEST)

    def add(self, size: int) -> None:
        self._open[-1] += size
        self._last = size

    def replace(self, size: int) -> None:
        """The last item has another size."""
        self._open[-1] += size - self._last
        self._last = size

    def open(self) -> None:
        self._open.append(0)

    def close(self) -> None:
        if len(self._open) > 1:
            self.add(self._open.pop())
        else:  # not closed in the same way by its parser: everything so far may be the group
            self._last = self._open[0]

    def repeat(self, count: int) -> None:
        more = min(self._last * (max(count, 1) - 1), _LARGEST)
        self._open[-1] += more
        self._last += more


def _regex_tokens(pattern: str) -> Iterator[str]:
    at = 0
    while at < len(pattern):
        if pattern[at] == "[":
            depth, end = 0, len(pattern)
            for match in _CLASS_PART.finditer(pattern, at):
                depth += 1 if match[0].startswith("[") else -1 if match[0] == "]" else 0
                if depth == 0:
                    end = match.end()
                    break
        else:
            token = _REGEX_TOKEN.match(pattern, at)
            assert token is not None
            end = token.end()
        yield pattern[at:end]
        at = end


def _rule_size(name: str, bodies: Mapping[str, str], sizes: dict[str, int], within: tuple[str, ...]) -> int:
    """The size of a rule. Terminals, in capital letters, are written out wherever they stand; other rules only where
    they may be repeated."""
    if name in sizes or name not in bodies or name in within:
        return sizes.get(name, 1)
    if len(within) > 100:
        raise KeyeError("the grammar is nested too deep; make it flatter")
    groups, waiting, deep = _Groups(), "", _COUNTED_GROUP.search(bodies[name]) is not None
    for match in _LARK_TOKEN.finditer(bodies[name]):
        token = match[0]
        if token[0] in "{~" and waiting and not (deep or _is_terminal(waiting)):
            groups.replace(_rule_size(waiting, bodies, sizes, (*within, name)))
        waiting = token if token.isidentifier() else ""
        if token[0] in "{~":
            groups.repeat(_count(token))
        elif token in ("(", "["):
            groups.open()
        elif token in (")", "]"):
            groups.close()
        elif token[0] == '"':
            groups.add(max(len(token) - 2, 1))
        elif token[0] == "/" and not token.startswith("//"):
            groups.add(regex_size(token[1 : token.rindex("/")]) if not _VERBOSE.search(token) else _LARGEST)
        elif waiting:
            groups.add(_rule_size(token, bodies, sizes, (*within, name)) if deep or _is_terminal(token) else 1)
    sizes[name] = groups.size
    return sizes[name]


def _is_terminal(name: str) -> bool:
    return name.lstrip("_")[:1].isupper()


def _drop_json(grammar: str) -> tuple[list[Mapping[str, Any]], str]:
    """The schemas that stand in a grammar, and the grammar without them."""
    schemas, text, at = [], "", 0
    for match in _LARK_JSON.finditer(grammar):
        if match.start() < at:
            continue
        try:
            value, end = json.JSONDecoder().raw_decode(grammar, match.end())
        except (ValueError, RecursionError):
            raise KeyeError("the grammar has a % directive whose JSON cannot be read; write it as JSON") from None
        if match[0].startswith("%json") and isinstance(value, Mapping):
            schemas.append(value)
        text += grammar[at : match.start()]
        at = end
    return schemas, text + grammar[at:]


def _count(token: str) -> int:
    """How often at least something is repeated: `{2,5}`, `{3}`, `{2,}`, `~3..4`."""
    least = re.search(r"\d+", token.partition(",")[0])
    return 1 if least is None else min(int(least[0][:13]), _LARGEST)


def _check(size: int, name: str) -> None:
    if size > MAX_SIZE:
        raise KeyeError(
            f"the repetitions of the {name} multiply to more than {MAX_SIZE:,} characters; repeat less often"
        )
