"""Reasoning is removed, numbers, yes or no, short texts and formulas are read out of replies by stated rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from keye.scoring.strict.expressions import match_expressions
from keye.scoring.strict.letters import find_letter
from keye.scoring.strict.numbers import find_number
from keye.scoring.strict.reasoning import Stripped, find_boxed, strip_reasoning
from keye.scoring.strict.spans import find_span, find_spans
from keye.scoring.strict.text import contains_text, match_formula, match_relaxed, match_text
from keye.scoring.strict.yes_no import find_yes_no


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("B", Stripped("B", "", True)),
        ("<think>A?</think>\n B ", Stripped("B", "A?", True)),
        ("<think>A?", Stripped("", "A?", False)),
        ("A?</think>B", Stripped("B", "A?", True)),
        ("<think>A? <answer>B</answer>", Stripped("B", "A? <answer>B</answer>", False)),
        ("<analysis>easy</analysis><think>A?</think><answer>B</answer>", Stripped("B", "easy\nA?", True)),
        ("<answer>A</answer> no <answer>B</answer>", Stripped("B", "", True)),
        ("<answer>B", Stripped("B", "", True)),
        ("<answer></answer>", Stripped("", "", True)),
        ("<think>a <think> b</think>C", Stripped("C", "a <think> b", True)),
        ("◁think▷A◁/think▷B", Stripped("B", "A", True)),
        ("x <|begin_of_box|>B<|end_of_box|>", Stripped("B", "", True)),
        ("<|channel|>analysis<|message|>A?<|end|><|channel|>final<|message|>B", Stripped("B", "A?<|end|>", True)),
        ("", Stripped("", "", True)),
    ],
)
def test_reasoning_is_removed(text: str, stripped: Stripped) -> None:
    assert strip_reasoning(text) == stripped


@pytest.mark.parametrize(
    ("text", "content"),
    [(r"\boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{open", "open"), ("none", None)],
)
def test_last_box_is_found(text: str, content: str | None) -> None:
    assert find_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", True), ("No, it is not.", False), ("是。", True), ("否，因为没有", False), ("**是**", True),
        ("不是", False),
        ("是的", True), ("Yes/No", None), ("yes or no", None), ("The eyes are visible", None), ("", None),
        ("The answer is no.", False), ("<think>no</think>yes", True), (r"\boxed{\text{是}}", True), ("[否]", False),
        ('{"answer": "no"}', False), ("I cannot tell.", None), ("正确", True), ("False", False),
        ("It is unknown.", None), ("無法判斷", None), ("不确定", None), ("是, 否", None), ("Not sure", None),
        ("Yes, no doubt", True),
        ("Right hand is raised", None), ("<think>没有结束 是", True), ("答案是否", False), ("没有", False),
        ("Absolutely.", True), ("Of course not.", False), ("Definitely not", False), ("Negative", False),
        ("No. Wait, yes.", True),
    ],
)  # fmt: skip
def test_yes_and_no_are_found(text: str, answer: bool | None) -> None:
    assert find_yes_no(text) is answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5", 5), ("There are 5 cats.", 5), ("five", 5), ("twenty-one", 21), ("3 red and 2 blue, 5 in total", 5),
        ("The answer is 12.", 12), (r"\boxed{7}", 7), ("1,234", 1234), ("-3.5", -3.5), ("3 or 4", None), ("none", None),
        (r"\frac{3}{4}", 0.75), ("五个", 5), ("$1.5 million", 1.5e6), ("x = 4", 4), ("2 + 3 = 5", 5), ("", None),
        ("<think>4?</think>6", 6), ("答案是3", 3), ("共3个苹果", 3), ("I count 4 dogs and 3 cats. Total: 7", 7),
        ("5 m", 5), ("5M", 5e6), ("3k views", 3000), ("12 b", 12),
    ],
)  # fmt: skip
def test_numbers_are_found(text: str, number: float | None) -> None:
    assert find_number(text) == number


@pytest.mark.parametrize(
    ("match", "text", "gold", "expected"),
    [
        (match_text, "The answer is Paris.", "paris", True), (match_text, "The Eiffel Tower", "eiffel tower", True),
        (match_text, "banana", "a", False), (match_text, "", "", False), (match_text, "7.0", "7", True),
        (match_text, "seven", "7", True), (match_text, "17", "7", False), (match_text, "not Paris", "Paris", False),
        (contains_text, "a banana", "banana", True), (contains_text, "banana", "ana", False),
        (contains_text, "路牌上写着北京路", "北京", True), (contains_text, "anything", "", False),
        (match_formula, "So x = 3", "3", True), (match_formula, r"Thus \boxed{\frac{1}{2}}.", "0.5", True),
    ],
)  # fmt: skip
def test_texts_are_compared(match: Callable[[str, list[str]], bool], text: str, gold: str, expected: bool) -> None:
    assert match(text, [gold]) is expected


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("10.4", "10", True), ("10.6", "10", False), ("The answer is 1,040.", "1000", True), ("14%", "0.14", True),
        ("14", "14%", True), ("2010", "2011", False), ("Blue", "blue", True), ("", "3", False), ("0", "0", True),
        ("0.01", "0", False), ("-5", "5", False), ("$3.1 million", "3100000", True), ("12 or so", "12", True),
        ("about 0.52", "0.5", True),
        ("between 2 and 3", "2", False),
    ],
)  # fmt: skip
def test_numbers_of_charts_are_compared_within_five_percent(text: str, gold: str, expected: bool) -> None:
    assert match_relaxed(text, gold) is expected


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (r"\frac{1}{2}", "0.5"), ("1/2", r"\dfrac12"), ("x^2+2x+1", "(x+1)^2"), (r"$2\sqrt{3}$", r"\sqrt{12}"),
        ("(1,2)", "(1, 2)"), (r"\{1,2\}", r"\{2,1\}"), ("x=3", "3"), (r"12\pi", "12π"), (r"30^\circ", "30"),
        ("50%", "0.5"), ("1,000", "1000"), ("3, -1", "-1 or 3"), ("5 cm", "5"), (r"\text{yes}", "yes"),
        (r"\sin^2 x+\cos^2 x", "1"), (r"e^{i\pi}", "-1"), ("2^{10}", "1024"), ("x²", "x^2"), (r"2 \times 3", "6"),
        ("x + y = 1", "1 = y + x"), (r"\sqrt[3]{8}", "2"), ("|-3|", "3"), ("5!", "120"), (r"\frac{a}{b}", "a/b"),
        (r"\pm 2", "2, -2"), (r"2\frac{1}{2}", "2.5"), ("3 > x", "x < 3"), (r"\left(1,2\right)", "(1,2)"), ("½", "0.5"),
        (r"\log_2 8", "3"), (r"\binom{5}{2}", "10"), (r"12 \text{ cm}^2", "12"), ("six", "6"),
        (r"x \geq 2", r"2 \le x"),
    ],
)  # fmt: skip
def test_equal_expressions_match(ours: str, theirs: str) -> None:
    assert match_expressions(ours, theirs)
    assert match_expressions(theirs, ours)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("1/2", "1/3"), ("(1,2)", "[1,2]"), ("(1,2)", "(2,1)"), ("x", "y"), ("A", "B"), ("", ""), ("3", ""),
        ("x^2", "x^3"), ("x>3", "x<3"), ("1/0", "2/0"), ("9" * 5000, "1"), ("(" * 3000, "1"), ("9^9^9^9", "1"),
        ("7 apples", "7"),
    ],
)  # fmt: skip
def test_different_expressions_do_not_match(ours: str, theirs: str) -> None:
    assert not match_expressions(ours, theirs)


def test_options_with_letters_and_without_mean_the_same() -> None:
    assert find_letter("blue", ["A. red", "B. blue"]) == find_letter("blue", ["red", "blue"]) == "B"
    assert find_letter("C", ["red", "blue"]) is None
    assert find_letter("A", []) is None
    assert find_letter("A", ["same", "same"]) == "A"
    assert find_letter("same", ["same", "same"]) is None


def test_several_spans_are_listed_in_order() -> None:
    assert find_spans("1 - 2.5 and 4.0 - 5.0 seconds") == [(1, 2.5), (4, 5)]
    assert find_spans("[[1.0, 2.0], [4.0, 5.0]]") == [(1, 2), (4, 5)]
    assert find_spans("nothing") == []
    assert find_span("3.0 - 9.0</think>1.0 - 2.0") == (1, 2)
    assert find_span("from 10% to 50% of the video", duration=60) == (6, 30)
    assert find_span("from 42 s to the end") is None
    assert find_span("at 7.5 seconds") == (7.5, 7.5)


PIECES = [
    "A ", "<think>", "</answer>", "(", "\\boxed{", "\\text{", "\\frac{", "answer is ", "1,", "1:", "12 - ", "twenty ",
    "一", "A, B ", "option ", "A. x\n", "<b ", "1e5", "not ", "'",
]  # fmt: skip


@pytest.mark.parametrize(
    "read",
    [
        lambda text: find_letter(text, ["red", "blue"]), lambda text: find_span(text, duration=60), find_yes_no,
        find_number, lambda text: match_text(text, ["x"]), lambda text: match_formula(text, ["x"]),
    ],
    ids=["letter", "span", "yes_no", "number", "text", "formula"],
)  # fmt: skip
def test_long_replies_are_read(read: Callable[[str], Any]) -> None:
    """Work that grows with more than the length would not end in the time of a test run."""
    read("x" * 500_000 + "".join(PIECES) * 500)
    for piece in PIECES:
        read((piece * 2_000)[:2_000])


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("Yes/No: No", False), ("No. Actually, yes.", True), ("Yes... wait, no.", False), ("是/否：否", False)],
)
def test_headings_and_corrections_of_yes_and_no(reply, expected):
    assert find_yes_no(reply) is expected
