"""How tokens are drawn and replies are stopped, with every expectation counted by hand."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from keye.engine.sampling import MAX_SEED, Sampler, SamplingParams, StopText, filtered_probabilities
from keye.errors import KeyeError


def logits_of(*probabilities: float) -> Tensor:
    """Logits whose softmax at temperature 1 is `probabilities`."""
    return torch.tensor([math.log(p) for p in probabilities])


#: Tokens 0 to 4, not in the order of their probability.
LOGITS = logits_of(0.1, 0.4, 0.05, 0.25, 0.2)


def probabilities(**params: Any) -> list[float]:
    values = filtered_probabilities(LOGITS, SamplingParams(**{"temperature": 1.0, **params}))
    return [round(float(p), 4) for p in values]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"top_k": 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_k": 9}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        # The likeliest tokens up to the one that crosses top_p: 0.4, 0.65, 0.85, 0.95.
        ({"top_p": 0.3}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.6}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_p": 0.9}, [0.1 / 0.95, 0.4 / 0.95, 0, 0.25 / 0.95, 0.2 / 0.95]),
        # At least 0.6 * 0.4 = 0.24, at least 0.3 * 0.4 = 0.12.
        ({"min_p": 0.6}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"min_p": 0.3}, [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        ({"min_p": 1.0}, [0, 1, 0, 0, 0]),
        # top_p counts what top_k left: 0.4 / 0.85 is below a half, with 0.25 / 0.85 it is above.
        ({"top_k": 3, "top_p": 0.5}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        # Temperature 0.5 squares: 0.01, 0.16, 0.0025, 0.0625, 0.04 of 0.275.
        ({"temperature": 0.5}, [p / 0.275 for p in (0.01, 0.16, 0.0025, 0.0625, 0.04)]),
    ],
)
def test_filters(params: dict[str, Any], expected: list[float]) -> None:
    assert probabilities(**params) == [round(p, 4) for p in expected]


@given(
    logits=st.lists(st.floats(-20, 20), min_size=1, max_size=30),
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_filters_always_leave_the_likeliest_and_sum_to_one(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    left = filtered_probabilities(torch.tensor(logits), params)
    assert float(left.sum()) == pytest.approx(1.0)
    assert float(left[torch.tensor(logits).argmax()]) > 0


def test_temperature_zero_is_greedy_and_takes_the_first_of_equals() -> None:
    sampler = Sampler(SamplingParams(top_k=3, seed=1))
    assert [sampler.draw(LOGITS, [])[0] for _ in range(3)] == [1, 1, 1]
    assert sampler.draw(torch.tensor([0.0, 2.0, 2.0]), [])[0] == 1


def test_a_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    def best(logits: list[float], history: list[int], penalty: float = 2.0) -> int:
        return Sampler(SamplingParams(repetition_penalty=penalty)).draw(torch.tensor(logits), history)[0]

    assert best([3.0, 2.0, 1.0], []) == 0
    assert best([3.0, 2.0, 1.0], [0, 0]) == 1, "3 / 2 once, although token 0 was written twice"
    assert best([3.0, 2.0, 1.0], [0, 1]) == 0, "1.5, 1, 1"
    assert best([-1.0, -1.5, -3.0], [0]) == 1, "-1 * 2 is below -1.5"
    assert best([3.0, 2.0], [1], 0.5) == 1, "below 1 it rewards"


def test_tokens_are_counted_as_the_reply_grows() -> None:
    sampler, reply = Sampler(SamplingParams(frequency_penalty=1.0)), list[int]()
    logits = torch.tensor([3.0, 2.0, 1.0])
    for _ in range(6):
        reply.append(sampler.draw(logits, reply)[0])
    assert reply == [0, 0, 1, 0, 1, 2], "3, 2 2, 1 1 1: the first of equals"


@pytest.mark.parametrize(
    ("params", "history", "expected"),
    [
        # Logits 3, 2, 1: a penalty once for each time, and once for all times.
        ({"frequency_penalty": 0.5}, [], 0),
        ({"frequency_penalty": 0.5}, [0], 0),
        ({"frequency_penalty": 0.5}, [0, 0, 0], 1),
        ({"frequency_penalty": -1.0}, [1, 1], 1),
        ({"presence_penalty": 1.5}, [0], 1),
        ({"presence_penalty": 0.9}, [0, 0, 0], 0),
        ({"presence_penalty": 2.0}, [0, 1], 0),
        # 3 / 1.5 - 0.25 is below 2.
        ({"repetition_penalty": 1.5, "presence_penalty": 0.25}, [0], 1),
        ({"logit_bias": {2: 2.5}}, [], 2),
        ({"logit_bias": {0: -100, 1: -1.5}}, [], 2),
        ({"logit_bias": {0: -100}, "frequency_penalty": 1.5}, [1], 2),
        ({"allowed_token_ids": [1, 2]}, [], 1),
        ({"allowed_token_ids": (2,)}, [], 2),
    ],
)
def test_what_changes_logits(params: dict[str, Any], history: list[int], expected: int) -> None:
    logits = torch.tensor([3.0, 2.0, 1.0])
    sampler = Sampler(SamplingParams(**params))
    assert not sampler.takes_best() and sampler.draw(logits, history)[0] == expected
    assert logits.tolist() == [3.0, 2.0, 1.0], "the logits themselves stay"
    drawn = Sampler(SamplingParams(temperature=1e-3, seed=1, **params))
    assert drawn.draw(logits, history)[0] == expected


def test_a_reply_does_not_end_early() -> None:
    sampler = Sampler(SamplingParams(min_tokens=2, stop_token_ids=(2,)), ends=(0,))
    logits = torch.tensor([3.0, 1.0, 2.0])
    assert [sampler.draw(logits, history)[0] for history in ([], [1], [1, 1])] == [1, 1, 0]
    only_the_end = torch.tensor([True, False, False])
    assert sampler.draw(logits, [], only_the_end)[0] == 0, "a form that is complete ends a reply"


def test_banned_words_end_nowhere() -> None:
    sampler = Sampler(SamplingParams(bad_words=("x",)), banned=[[0], [1, 2, 1]])
    logits = torch.tensor([3.0, 2.0, 1.0])
    assert sampler.draw(logits, [])[0] == 1, "token 0 is a word of its own"
    assert [sampler.draw(logits, history)[0] for history in ([2], [1, 2], [2, 1, 2])] == [1, 2, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_left_is_a_mistake(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature, allowed_token_ids=(1,)))
    with pytest.raises(KeyeError, match="leave no token to go on"):
        sampler.draw(torch.tensor([1.0, 1.0]), [], torch.tensor([True, False]))


def draws(seed: int | None, count: int = 60, **params: Any) -> list[int]:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=seed, **params))
    return [sampler.draw(LOGITS, [])[0] for _ in range(count)]


def test_a_seed_repeats_and_another_does_not() -> None:
    assert draws(3) == draws(3) != draws(4)
    assert draws(MAX_SEED) == draws(MAX_SEED)
    assert draws(None) != draws(None)


def test_draws_follow_the_probabilities() -> None:
    counts = Counter(draws(0, 4000, top_k=3))
    assert set(counts) == {1, 3, 4}
    for token, share in ((1, 0.4 / 0.85), (3, 0.25 / 0.85), (4, 0.2 / 0.85)):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_ends_with_a_sentence(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature))
    with pytest.raises(KeyeError, match="the model computes NaN"):
        sampler.draw(torch.tensor([1.0, math.nan, 0.0]), [])
    assert sampler.draw(torch.tensor([1.0, -math.inf, 0.0]), [])[0] in (0, 2), (
        "minus infinity is a token that cannot be"
    )


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("temperature", "hot", "a number between 0 and 100"),
        ("temperature", math.nan, "a number between 0 and 100"),
        ("temperature", True, "a number between 0 and 100"),
        ("seed", "a", "a whole number from 0 to"),
        ("seed", -1, "a whole number from 0 to"),
        ("seed", 1.0, "a whole number from 0 to"),
        ("stop", 5, "strings that are not empty"),
        ("stop", [""], "strings that are not empty"),
        ("stop", [5], "strings that are not empty"),
        ("top_k", 1.5, "a whole number, 0"),
        ("top_k", -1, "a whole number, 0"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", "0.9", "above 0 and at most 1"),
        ("min_p", [0.1], "between 0 and 1"),
        ("repetition_penalty", 0, "above 0"),
        ("max_tokens", 1.5, "a whole number of at least 1"),
        ("max_tokens", 0, "a whole number of at least 1"),
        ("max_tokens", None, "a whole number of at least 1"),
        ("frequency_penalty", 2.5, "between -2 and 2"),
        ("presence_penalty", math.nan, "between -2 and 2"),
        ("logit_bias", {1: 101}, "numbers between -100 and 100"),
        ("logit_bias", {"1": 1}, "numbers between -100 and 100"),
        ("logit_bias", [1], "numbers between -100 and 100"),
        ("logit_bias", dict.fromkeys(range(5000), 1), "at most 4,096 token ids"),
        ("allowed_token_ids", [], "token ids, and some"),
        ("allowed_token_ids", [True], "token ids"),
        ("stop_token_ids", 5, "token ids"),
        ("stop_token_ids", [-1], "token ids"),
        ("min_tokens", -1, "0 or more"),
        ("bad_words", ["a"] * 300, "at most 256 strings"),
        ("thinking_token_budget", 1.5, "0 or more"),
        ("include_stop_str_in_output", 1, "true or false"),
    ],
)
def test_settings_that_cannot_be(field: str, value: object, rule: str) -> None:
    with pytest.raises(KeyeError, match=f"^{field} is .*; it must be .*{rule}"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_min_tokens_fit_into_max_tokens() -> None:
    with pytest.raises(KeyeError, match="min_tokens is 5, above max_tokens, which is 4"):
        SamplingParams(min_tokens=5, max_tokens=4)


# Stop strings


def run_through(stop: list[str], *pieces: str) -> tuple[list[str], str, bool]:
    """What is shown after each piece, what `finish` returns, and whether the stream was stopped."""
    text = StopText(stop)
    text_value = []
    for piece in pieces:
        text_value.append(text.push(piece))
        if text.met is not None:
            break
    return text_value, text.finish(), text.met is not None


def test_a_stop_string_inside_a_piece() -> None:
    assert run_through(["END"], "go on END never shown") == (["go on "], "", True)


def test_a_stop_string_may_be_shown() -> None:
    text = StopText(["END", "E"], shows=True)
    assert (text.push("go on END never"), text.met, text.met is not None) == ("go on E", "E", True)


def test_text_in_which_no_stop_is_looked_for() -> None:
    text = StopText(["END"])
    assert (text.push("a E"), text.skip("ND b"), text.push("END"), text.met) == ("a ", "END b", "", "END")


def test_a_stop_string_across_pieces_is_never_shown() -> None:
    assert run_through(["END"], "go", " on E", "N", "D more") == (["go", " on ", "", ""], "", True)


def test_a_false_beginning_is_shown_as_soon_as_it_is_known_to_be_one() -> None:
    assert run_through(["END"], "E", "N", "TER") == (["", "", "ENTER"], "", False)
    assert run_through(["aab"], "a", "a", "a", "b") == (["", "", "a", ""], "", True)


def test_what_was_held_back_comes_at_the_end() -> None:
    assert run_through(["END"], "the EN") == (["the "], "EN", False)


def test_the_first_of_several_stop_strings_counts() -> None:
    assert run_through(["two", "one"], "zero one two") == (["zero "], "", True)
    assert run_through(["\n\n", "\n-"], "a\n", "b\n", "-c") == (["a", "\nb", ""], "", True)


def test_without_stop_strings_all_is_shown_at_once() -> None:
    assert run_through([], "a", "b") == (["a", "b"], "", False)


@given(text=st.text("ab", max_size=30), stop=st.text("ab", min_size=1, max_size=4), cuts=st.lists(st.integers(0, 30)))
def test_pieces_make_no_difference(text: str, stop: str, cuts: list[int]) -> None:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    text_value, rest, stopped = run_through([stop], *(text[a:b] for a, b in itertools.pairwise(places)))
    assert "".join(text_value) + rest == text.split(stop)[0]
    assert stopped == (stop in text)
