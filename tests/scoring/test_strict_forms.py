"""Letters and spans are found in many forms of replies, and none is invented."""

from __future__ import annotations

import pytest

from benchmarks.strict_extraction import (
    GOLDEN,
    UNCLEAR_TAGS,
    count,
    count_shuffled,
    find_form_letter,
    find_form_span,
    read_forms,
    read_golden_letters,
    read_golden_spans,
)


@pytest.mark.parametrize(("part", "share"), [("tuning", 0.99), ("heldout", 0.96)])
def test_letters_of_our_forms_are_found(part: str, share: float) -> None:
    shares = count(read_forms("letters", part), find_form_letter)
    assert shares["found"] >= share, shares["missed"]
    assert shares["invented"] <= 0.03
    assert shares["none_meant"] > 50


@pytest.mark.parametrize(("part", "share"), [("tuning", 1.0), ("heldout", 0.98)])
def test_spans_of_our_forms_are_found(part: str, share: float) -> None:
    shares = count(read_forms("spans", part), find_form_span)
    assert shares["found"] >= share, shares["missed"]
    assert shares["invented"] == 0


def test_letters_of_golden_forms_are_found() -> None:
    forms = list(read_golden_letters(GOLDEN))
    shares = count(forms, find_form_letter)
    assert len(forms) > 100
    assert shares["found"] >= 0.99, shares["missed"]
    assert shares["invented"] <= 0.05, shares["missed"]
    assert count_shuffled(forms, find_form_letter) < 0.35


def test_spans_of_golden_forms_are_found() -> None:
    forms = [form for form in read_golden_spans(GOLDEN) if form.tag not in UNCLEAR_TAGS]
    assert count(forms, find_form_span)["found"] == 1
