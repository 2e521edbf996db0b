r"""Whether two mathematical answers are equal, by rules: "\frac{1}{2}" and "0.5", "x^2+2x+1" and "(x+1)^2".

Both are read by a small parser of LaTeX and plain notation, and compared as values at fixed points of their variables.
What the parser cannot read is compared as text without spaces. Depth, length and powers are bounded.
"""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Callable, Mapping

from keye.scoring.strict.plain import remove_markup, to_ascii_forms
from keye.scoring.strict.times import spell_english_numbers

_LONGEST = 400
_DEEPEST = 40
#: Values of variables at which expressions are compared; each variable has its own.
_POINTS = (0.7310585, 1.4142137, 2.2360681)
_CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j, "infty": math.inf, "inf": math.inf}
_FUNCTIONS: Mapping[str, Callable[[complex], complex]] = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "ln": cmath.log, "log": cmath.log10, "exp": cmath.exp,
    "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "sqrt": cmath.sqrt,
    "abs": lambda value: complex(abs(value)), "cot": lambda value: 1 / cmath.tan(value),
    "sec": lambda value: 1 / cmath.cos(value), "csc": lambda value: 1 / cmath.sin(value),
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
_RAISED = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]{1,8}")
_SIGNS = (
    ("√", "\\sqrt "), ("\u03c0", "\\pi "), ("∞", "\\infty "), ("\u00b7", "*"), ("⋅", "*"), ("\u00d7", "*"),
    ("\u00f7", "/"), ("≤", "<="), ("≥", ">="), ("\\leqslant", "<="), ("\\geqslant", ">="),
    ("\\leq", "<="), ("\\geq", ">="), ("\\le", "<="), ("\\ge", ">="),
    ("\\cdot", "*"), ("\\times", "*"), ("\\div", "/"), ("\\ast", "*"), ("\\circ", "\u00b0"), ("\\degree", "\u00b0"),
    ("\\%", "%"), ("\\$", ""), ("\u2044", "/"), ("\\lvert", "|"), ("\\rvert", "|"), ("\\{", "{"), ("\\}", "}"),
    ("**", "^"),
)  # fmt: skip
_COMMAND = re.compile(r"\\(?:left|right|big|Big|displaystyle|limits)(?![A-Za-z])")
_PREFIX = re.compile(r"^[A-Za-z](?:_\{?\w{1,6}\}?)?(?:\([A-Za-z]\))?\s*(?:=|\\in|∈)(?!=)\s*")
_UNITS = re.compile(
    r"(?<=[\d)}\s])\s*(?:\\[,;! ])*\s*(?:square |cubic )?(?:degrees?|\u00b0[CF]?|units?|cm|mm|km|meters?"
    r"|metres?|inch(?:es)?|feet|ft|kg|grams?|seconds?|sec|minutes?|min|hours?|hrs?|days?|years?|dollars?"
    r"|cents?|points?|people|miles?|mph|m/s)(?:\^\{?[23]\}?|/s|\^2)?[. ]*$"
)
_THOUSANDS = re.compile(r"[^(\[{,]{0,40}\d{1,3}(?:,\d{3})+(?:\.\d+)?\D*")
_MIXED = re.compile(r"(?<![\w.}])(\d{1,9}) ?\\[dtc]?frac\{(\d{1,9})\}\{(\d{1,9})\}")
_RELATION = re.compile(r"([<>]=?)")
_TOKEN = re.compile(
    r"\d+(?:\.\d*)?[eE][+-]?\d{1,3}(?![\w.])|\d+(?:\.\d*)?|\.\d+|\\?[A-Za-z]+|[-+*/^_(){}\[\]|!%\u00b0,=<>]|\S"
)


class _Unreadable(Exception):
    """The text cannot be parsed as an expression."""


def match_expressions(answer: str, gold: str, *, tolerance: float = 1e-6) -> bool:
    """Whether two answers are the same number, expression, equation, tuple, set or interval.

    Numbers agree within `tolerance` (relative). Sets in braces and solutions joined by commas may come in any order.
    Nothing is equal to an empty text.
    """
    answer, gold = _clean(answer), _clean(gold)
    if not answer or not gold:
        return False
    if answer == gold or answer.replace(" ", "").casefold() == gold.replace(" ", "").casefold():
        return True
    if len(answer) > _LONGEST or len(gold) > _LONGEST:
        return False
    ours, theirs = _Parts(answer), _Parts(gold)
    if len(ours.items) != len(theirs.items):
        return False
    if len(ours.items) > 1:
        if ours.brackets != theirs.brackets and (ours.is_ordered or theirs.is_ordered):
            return False
        return _match_items(list(ours.items), list(theirs.items), ours.is_ordered, tolerance)
    return _match_sides(ours.items[0], theirs.items[0], tolerance)


def _clean(text: str) -> str:
    """An answer in one notation, without the name that it is assigned to, its unit and currency."""
    text = _RAISED.sub(lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text.strip(" \t\n$\"'"))
    text = _COMMAND.sub(" ", to_ascii_forms(text))
    for sign, plain in _SIGNS:
        if sign in text:
            text = text.replace(sign, plain + " " if sign[0] == "\\" and sign[-1].isalpha() else plain)
    text = remove_markup(text.replace("*", "\u00d7")).replace("\u00d7", "*")
    if _THOUSANDS.fullmatch(text):
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = _PREFIX.sub("", text.strip().rstrip(".,;").strip(), count=1)
    if text.replace("-", "").replace(" ", "").isalpha():
        text = spell_english_numbers(text)
    text = _MIXED.sub(r"(\1+\2/\3)", text)
    return _UNITS.sub("", text).strip().lstrip("$\u20ac\u00a3").strip()


class _Parts:
    """A text cut at its outer commas: the items, the brackets around them, and whether their order matters."""

    def __init__(self, text: str) -> None:
        self.brackets = ""
        if text[:1] in tuple("([{") and text[-1:] in tuple(")]}") and _is_enclosed(text):
            self.brackets, text = text[0] + text[-1], text[1:-1]
        self.items = [item for part in _cut(text) for item in _split_signs(part.strip())]
        if len(self.items) == 1 and self.brackets:
            self.items = [f"({self.items[0]})"] if self.brackets != "{}" else self.items
        self.is_ordered = self.brackets not in ("", "{}")


def _split_signs(text: str) -> list[str]:
    r"""Both values of an expression with one `\pm`."""
    text = text.replace("\u00b1", "\\pm ")
    return [text.replace("\\pm", sign) for sign in "+-"] if text.count("\\pm") == 1 else [text]


def _is_enclosed(text: str) -> bool:
    """Whether the first bracket closes at the last character."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return index == len(text) - 1
    return False


def _cut(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    text = re.sub(r"\s+(?:and|or)\s+|;", ",", text)
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [part for part in [*parts, text[start:]] if part.strip()] or [""]


def _match_items(ours: list[str], theirs: list[str], is_ordered: bool, tolerance: float) -> bool:
    if len(ours) > 20:
        return False
    ours, theirs = (
        [_PREFIX.sub("", item, count=1) for item in ours],
        [_PREFIX.sub("", item, count=1) for item in theirs],
    )
    if is_ordered:
        return all(match_expressions(a, b, tolerance=tolerance) for a, b in zip(ours, theirs, strict=True))
    for item in ours:
        match = next((other for other in theirs if match_expressions(item, other, tolerance=tolerance)), None)
        if match is None:
            return False
        theirs.remove(match)
    return True


def _match_sides(ours: str, theirs: str, tolerance: float) -> bool:
    """Equations agree if the differences of their sides are the same but for a factor."""
    ours_sides, theirs_sides = ours.split("="), theirs.split("=")
    if _RELATION.search(ours) or _RELATION.search(theirs):
        return _match_inequalities(_RELATION.split(ours), _RELATION.split(theirs), tolerance)
    try:
        if len(ours_sides) == len(theirs_sides) == 1:
            return all(_is_close(_evaluate(ours, k), _evaluate(theirs, k), tolerance) for k in range(len(_POINTS)))
        if len(ours_sides) == len(theirs_sides) == 2:
            ratios = [
                _evaluate(f"({ours_sides[0]})-({ours_sides[1]})", k)
                / _evaluate(f"({theirs_sides[0]})-({theirs_sides[1]})", k)
                for k in range(len(_POINTS))
            ]
            return all(_is_close(ratio, ratios[0], tolerance) for ratio in ratios) and abs(ratios[0]) > 0
        if len(ours_sides) > 1 and len(theirs_sides) == 1:  # "1/2 = 0.5"
            return all(
                _is_close(_evaluate(ours_sides[-1], k), _evaluate(theirs, k), tolerance) for k in range(len(_POINTS))
            )
    except (_Unreadable, ArithmeticError, ValueError):
        pass
    return False


def _match_inequalities(ours: list[str], theirs: list[str], tolerance: float) -> bool:
    """Chains of sides and signs agree if they do side by side, from the smaller to the larger."""
    ours, theirs = ([*reversed(chain)] if ">" in "".join(chain[1::2]) else chain for chain in (ours, theirs))
    signs = [[sign.replace(">", "<") for sign in chain[1::2]] for chain in (ours, theirs)]
    if not signs[0] or signs[0] != signs[1]:
        return False
    return all(_match_sides(a, b, tolerance) for a, b in zip(ours[::2], theirs[::2], strict=True))


def _is_close(a: complex, b: complex, tolerance: float) -> bool:
    if cmath.isinf(a) or cmath.isinf(b):
        return a == b
    return abs(a - b) <= tolerance * max(1e-9, abs(a), abs(b))


def _evaluate(text: str, point: int) -> complex:
    """The value of an expression at one of the points; `_Unreadable` where it is none."""
    parser = _Parser(_TOKEN.findall(text), point)
    value = parser.read_sum(0)
    if parser.peek():
        raise _Unreadable
    return value


class _Parser:
    """Reads tokens by recursive descent: sums of products of powers of atoms, with products that are not written."""

    def __init__(self, tokens: list[str], point: int) -> None:
        self.tokens = tokens
        self.position = 0
        self.point = point

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.position += 1
        return token

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise _Unreadable

    def read_sum(self, depth: int) -> complex:
        if depth > _DEEPEST:
            raise _Unreadable
        value = self.read_product(depth + 1)
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            value += sign * self.read_product(depth + 1)
        return value

    def read_product(self, depth: int) -> complex:
        value = self.read_signed(depth)
        while token := self.peek():
            if token == "*":
                self.take()
                value *= self.read_signed(depth)
            elif token == "/":
                self.take()
                value /= self.read_signed(depth)
            elif token in tuple("+-)}],|=") or token == "":
                break
            else:
                value *= self.read_power(depth)
        return value

    def read_signed(self, depth: int) -> complex:
        sign = 1
        while self.peek() in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        return sign * self.read_power(depth)

    def read_power(self, depth: int) -> complex:
        value = self.read_atom(depth + 1)
        while self.peek() in ("^", "!", "%", "\u00b0"):
            mark = self.take()
            if mark == "^":
                if self.peek() == "\u00b0":
                    continue
                value = _raise(value, self.read_exponent(depth + 1))
            elif mark == "!":
                if value.imag or value.real != int(value.real) or not 0 <= value.real <= 20:
                    raise _Unreadable
                value = complex(math.factorial(int(value.real)))
            elif mark == "%":
                value /= 100
        return value

    def read_exponent(self, depth: int) -> complex:
        if self.peek() == "{":
            return self.read_group(depth)
        sign = -1 if self.peek() == "-" else 1
        if self.peek() in ("+", "-"):
            self.take()
        return sign * self.read_power(depth)

    def read_group(self, depth: int) -> complex:
        close = {"(": ")", "{": "}", "[": "]", "|": "|"}[self.take()]
        value = self.read_sum(depth + 1)
        self.expect(close)
        return complex(abs(value)) if close == "|" else value

    def read_atom(self, depth: int) -> complex:
        if depth > _DEEPEST:
            raise _Unreadable
        token = self.peek()
        if token in ("(", "{", "[", "|"):
            return self.read_group(depth)
        if token[:1].isdigit() or (token[:1] == "." and len(token) > 1):
            return complex(float(self.take()))
        if re.fullmatch(r"\\?[A-Za-z]+", token):
            return self.read_name(self.take().lstrip("\\"), depth)
        raise _Unreadable

    def read_name(self, name: str, depth: int) -> complex:
        if name in ("frac", "dfrac", "tfrac", "cfrac"):
            return self.read_argument(depth) / self.read_argument(depth)
        if name == "binom":
            upper, lower = (self.read_argument(depth) for _ in range(2))
            return _choose(upper, lower)
        if name == "log" and self.peek() == "_":
            self.take()
            base = self.read_argument(depth)
            return cmath.log(self.read_power(depth)) / cmath.log(base)
        if name == "sqrt" and self.peek() == "[":
            root = self.read_group(depth)
            return _raise(self.read_argument(depth), 1 / root)
        if name in _FUNCTIONS:
            power = None
            if self.peek() == "^":
                self.take()
                power = self.read_exponent(depth)
            value = _FUNCTIONS[name](self.read_argument(depth) if name == "sqrt" else self.read_power(depth))
            return value if power is None else _raise(value, power)
        if name in _CONSTANTS:
            return complex(_CONSTANTS[name])
        if len(name) == 1:
            self.skip_subscript(depth)
            return complex(_POINTS[self.point] + 0.173205 * (ord(name) % 32) + (0.31 if name.isupper() else 0))
        if name.isalpha() and len(name) <= 3 and f"\\{name}" not in self.tokens:  # "xy" is a product
            self.tokens[self.position : self.position] = list(name)
            return self.read_atom(depth + 1)
        return complex(_POINTS[self.point] + sum(map(ord, name)) % 97 / 13)

    def read_argument(self, depth: int) -> complex:
        r"""The argument of a command: a group, or one digit or name (`\frac12`)."""
        token = self.peek()
        if token.isdigit() and len(token) > 1:
            self.tokens[self.position : self.position + 1] = [token[0], token[1:]]
        return self.read_atom(depth + 1)

    def skip_subscript(self, depth: int) -> None:
        if self.peek() == "_":
            self.take()
            if self.peek() == "{":
                self.read_group(depth)
            else:
                self.take()


def _choose(upper: complex, lower: complex) -> complex:
    if upper.imag or lower.imag or upper.real % 1 or lower.real % 1 or not 0 <= lower.real <= upper.real <= 60:
        raise _Unreadable
    return complex(math.comb(int(upper.real), int(lower.real)))


def _raise(value: complex, exponent: complex) -> complex:
    if abs(exponent) > 1000 or (abs(value) > 1e3 and abs(exponent) > 100):
        raise _Unreadable
    return value**exponent
