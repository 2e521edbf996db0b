"""IFEval's rules as lmms-eval checks them, and the words and sentences that they count."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from keye.scoring.official.instructions import check_instructions
from keye.scoring.official.language import detect_language, split_sentences, split_words
from keye.scoring.official.registry import find_scorer


def score(reply: str, *instructions: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    document = {
        "instruction_id_list": [name for name, _ in instructions],
        "kwargs": [arguments for _, arguments in instructions],
        "prompt": "Say it.",
    }
    return find_scorer("ifeval", "item", "lmms-eval-0.7.3")(document, reply)


@pytest.mark.parametrize(
    ("name", "arguments", "reply", "strict", "loose"),
    [
        ("keywords:existence", {"keywords": ["a.c"]}, "ABC", True, True),  # a regular expression, any case
        ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", True, True),
        ("keywords:frequency", {"keyword": "is", "frequency": 2, "relation": "at least"}, "this is", True, True),
        (
            "keywords:letter_frequency",
            {"letter": "L", "let_frequency": 3, "let_relation": "less than"},
            "lL",
            True,
            True,
        ),
        ("language:response_language", {"language": "fr"}, "Le bateau part demain matin du port.", True, True),
        ("language:response_language", {"language": "fr"}, "1 2 3", True, True),  # nothing to detect counts as followed
        ("change_case:english_capital", {}, "The boat leaves at nine", False, False),
        ("change_case:english_lowercase", {}, "le bateau part demain matin du port", False, False),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***", True, True),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\n***\nb", False, False),
        ("length_constraints:number_words", {"num_words": 4, "relation": "less than"}, "a-b c_d 1.5", False, False),
        (
            "length_constraints:number_sentences",
            {"num_sentences": 3, "relation": "less than"},
            "One. Two! Three?",
            False,
            False,
        ),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Two"},
            'One\n\n"Two, three',
            True,
            True,
        ),
        ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[[a] [b]", True, True),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, "clip. s. far", True, True),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n** b\n  - c", True, True),
        ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "*\n* b", True, True),  # takes the next line
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "**a**", False, False),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* *b*", True, True),
        (
            "detectable_format:multiple_sections",
            {"section_spliter": "Part", "num_sections": 2},
            "Part1 Part 2",
            True,
            True,
        ),
        ("detectable_format:json_format", {}, "Here:\n```json\n[1]\n```", False, True),
        ("detectable_format:title", {}, "<<>> <<a>>", True, True),
        ("detectable_format:title", {}, "<<\n>>", False, False),
        ("detectable_format:constrained_response", {}, "So: My answer is no.", True, True),
        ("combination:two_responses", {}, "a******b******", True, True),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "Sure!\nSAY IT. Yes", False, True),
        ("startend:end_checker", {"end_phrase": "The end."}, 'That is "the end."', True, True),
        ("startend:quotation", {}, '"', False, False),
        ("punctuation:no_comma", {}, "a, b\nc", False, True),
        (
            "change_case:capital_word_frequency",
            {"capital_frequency": 4, "capital_relation": "at least"},
            "I CANNOT (U.S.) a1",
            True,
            True,
        ),
        ("startend:quotation", {}, "  \n ", False, False),
    ],
)
def test_rule(name: str, arguments: dict[str, Any], reply: str, strict: bool, loose: bool) -> None:
    assert score(reply, (name, arguments)) == {"strict": [strict], "loose": [loose]}


def test_a_prompt_of_several_instructions_has_results_of_its_own() -> None:
    result = score("a, b\nc", ("punctuation:no_comma", {}), ("startend:end_checker", {"end_phrase": "c", "x": None}))
    assert result == {"strict": [False, True], "loose": [True, True], "prompt_strict": False, "prompt_loose": True}


def test_arguments_that_the_original_draws_are_marked() -> None:
    rule = ("keywords:letter_frequency", {"letter": "#", "let_frequency": 4, "let_relation": "at least"})
    assert score("####", rule) == {"strict": [False], "loose": [False], "random": True}
    document = {"instruction_id_list": [rule[0]], "kwargs": [rule[1]]}
    assert check_instructions(document, "####") == {"strict": [True], "loose": [True]}
    assert check_instructions(document, "###") == {"strict": [False], "loose": [False]}


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("keywords:unheard_of", {}, "KeyError"),
        ("keywords:existence", {"keywords": ["("]}, "error"),
        ("punctuation:no_comma", {"mark": ","}, "TypeError"),
        ("length_constraints:number_words", {"num_words": 4, "relation": "at most"}, "ValueError"),
    ],
)
def test_an_exception_of_the_original_is_the_result(name: str, arguments: dict[str, Any], error: str) -> None:
    assert score("some text", (name, arguments)) == {"error": error}


def test_words_are_divided_as_nltk_divides_them() -> None:
    words = split_words("\"I can't,\" said O'Neil: 'cannot' (1,000 -- or more...) wanna go.")
    expected = "\" I ca n't , \" said O'Neil : ' can not ' ( 1,000 -- or more ... ) wan na go ."
    assert words == expected.split()


def test_sentences_end_at_marks_but_not_at_abbreviations_and_initials() -> None:
    text = 'Mr. Li met J. Doe at 3.5 p.m. today. He said "Go!" It went on... and on. Well...'
    assert len(split_sentences(text)) == 4
    assert split_sentences("  ") == []


def test_the_language_of_a_text_does_not_change_from_call_to_call() -> None:
    assert len({detect_language("un bon vin blanc sec") for _ in range(5)}) == 1
    assert detect_language("...") is None


def test_without_langdetect_the_language_rules_name_the_extra() -> None:
    """In a process of its own: the package is loaded once and kept."""
    lines = (
        "import sys; sys.modules['langdetect'] = None",
        "from keye.scoring.official.registry import find_scorer",
        "document = {'instruction_id_list': [NAME], 'kwargs': [{}]}",
        "print(find_scorer('ifeval', 'item', 'lmms-eval-0.7.3')(document, 'A'))",
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", "\n".join(lines).replace("NAME", repr(name))], capture_output=True, text=True
        )
        for name in ("punctuation:no_comma", "change_case:english_capital")
    ]
    assert "'strict': [True]" in runs[0].stdout
    assert "keye.errors.KeyeError: langdetect is not installed" in runs[1].stderr
    assert "keye[eval]" in runs[1].stderr
