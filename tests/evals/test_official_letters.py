"""Official scorers of multiple choice: faults that users should see reproduced, each in one line."""

import pytest

from keye.errors import KeyeError
from keye.scoring.official.matching import remove_reasoning
from keye.scoring.official.registry import find_scorer, list_implementations

VIDEO = {
    "options": ["A. red", "B. blue", "C. green", "D. grey"],
    "answer": "A",
    "task_type": "OCR",
    "duration": "short",
}
PLAIN = {"options": ["red", "blue", "green", "grey"], "answer": "A", "question_type": "multiple-choice", "split": "dev"}


@pytest.mark.parametrize(
    ("task", "implementation", "prediction", "extracted"),
    [
        ("videomme", "lmms-eval-0.7.3", "Based on the video, the answer is A.", "A"),
        ("videomme", "lmms-eval-0.7.1", "Based on the video, the answer is A.", "B"),
        ("videomme", "lmms-eval-0.7.3", "Not B but red", "B"),
        ("videomme", "lmms-eval-0.7.3", "<think>B.</think>A", "A"),
        ("videomme", "lmms-eval-0.7.3", "<think>B. I see</think> a", "B"),
        ("videomme", "lmms-eval-0.7.3-cli", "<think>B. I see</think> a", ""),
        ("videomme", "vlmevalkit-e8e78f0", "it is grey", "D"),
        ("videomme", "vlmevalkit-e8e78f0", "it is black", "Z"),
        ("mmstar", "vlmevalkit-e8e78f0", "my answer is b", "B"),
        ("mmstar", "vlmevalkit-e8e78f0", "B as the lamp is on all day", "Z"),
        ("mlvu", "lmms-eval-0.7.1", ") or A", ""),
        ("mmmu", "lmms-eval-0.7.3", "\nA\n", "<RANDOM>"),
        ("mmmu", "lmms-eval-0.7.3", "One of (A) and (C), I think", "C"),
        ("videommmu", "lmms-eval-0.7.3", "red", "No Answer Found."),
    ],
)
def test_a_letter_is_what_the_original_takes(task: str, implementation: str, prediction: str, extracted: str) -> None:
    document = VIDEO if task == "videomme" else PLAIN
    assert find_scorer(task, "item", implementation)(document, prediction)["extracted"] == extracted


def test_an_open_answer_counts_when_any_number_or_phrase_of_the_reply_is_gold() -> None:
    document = {"question_type": "open", "options": [], "answer": ["1,200", "x"], "subject": "Physics"}
    score = find_scorer("mmmu", "item", "lmms-eval-0.7.3")
    answers = [1200.0, 3.0, "3 or 1200.001"]
    assert score(document, "It is 3 or 1200.001") == {"extracted": answers, "score": 1, "score_full_list": 1}
    assert find_scorer("mmmu", "item", "lmms-eval-75571cf")(document, "1200")["score"] == 0


def test_long_runs_of_digits_are_read_in_linear_time() -> None:
    document = {"question_type": "open", "options": [], "answer": "7", "subject": "Physics"}
    assert find_scorer("mmmu", "item", "lmms-eval-0.7.3")(document, "1" * 200_000 + "x")["score"] == 0


def test_only_a_closing_tag_keeps_what_follows_and_an_open_block_stays() -> None:
    assert remove_reasoning("I think B</think> A ") == "A"
    assert remove_reasoning("<think>B") == "<think>B"
    assert remove_reasoning("</think>A<think>B") == "</think>A<think>B"


def test_a_set_without_reasoning_strips_every_reply() -> None:
    items = [(VIDEO, "<think>B. no</think>A"), (VIDEO, "</think>A")]
    assert find_scorer("videomme", "aggregate", "lmms-eval-0.7.3-cli")({}, items) == {"metrics": {"overall": 100.0}}


def test_an_unknown_name_lists_the_known_ones() -> None:
    lmms = ["lmms-eval-0.7.3", "lmms-eval-0.7.3-cli", "lmms-eval-75571cf"]
    assert list_implementations("mmmu") == [*lmms, "vlmevalkit-e8e78f0"]
    with pytest.raises(KeyeError, match=r"'mine' does not score mmmu \(item\).*lmms-eval-0.7.3"):
        find_scorer("mmmu", "item", "mine")
