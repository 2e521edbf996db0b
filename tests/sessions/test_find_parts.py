"""Parts of the search by themselves: fusion, spans, clocks, ranking, calibration, notes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from keye.chat.replies import is_malformed
from keye.config import ConfigError, GenerationConfig
from keye.config.model import Scope
from keye.engine.request import TokenProb
from keye.moments import Moment
from keye.sessions.scope import length_notes, scope_notes
from keye.sessions.search.calibration import Calibration, Logistic, load_calibration
from keye.sessions.search.coarse import FrameScores, find_spans, fuse, merge_named, pick_peaks, to_grid
from keye.sessions.search.looks import LABEL_STEP, Look
from keye.sessions.search.questions import ground_question, presence_question, to_probability, yes_log_odds
from keye.sessions.search.ranking import MomentNames, Ranking, join_candidates
from keye.sessions.search.zoom import Candidate

NANO = GenerationConfig(
    ground_prompt="when is {article} {event} visible?", presence_prompt="is there {article} {event} in the video?"
)


def scores(values: list[float], step: float = 1.0) -> FrameScores:
    starts = np.arange(len(values)) * step
    return FrameScores(starts, starts + step, np.array(values, dtype=float))


def candidate(start: float, end: float, close: float = 3.0, alone: float | None = 3.0) -> Candidate:
    return Candidate(start, end, (0.25, 0.25), 2.0, close, alone)


def test_questions_have_the_article_of_the_prompt() -> None:
    assert ground_question(NANO, "A red circle") == "when is the red circle visible?"
    assert presence_question(NANO, "the red circle") == "is there a red circle in the video?"
    assert presence_question(NANO, "orange star") == "is there an orange star in the video?"
    assert "the man leaves" in presence_question(GenerationConfig(), "the man leaves")


def test_ranks_are_fused_whatever_the_scales() -> None:
    best = fuse([np.array([0.1, 0.2, 0.3]), np.array([-900.0, 4.0, 5.0]), np.array([7.0, 7.0, 7.0])])
    assert best.argmax() == 2 and best.argmin() == 0
    assert fuse([np.array([1.0, -math.inf])])[1] == 0


def test_a_frame_in_two_windows_has_its_better_score() -> None:
    twice = FrameScores(np.array([0.0, 0.0, 1.0]), np.array([1.0, 1.0, 2.0]), np.array([1.0, 3.0, 2.0]))
    assert to_grid(twice, 6).tolist() == [3, 3, 2, 2, -math.inf, -math.inf]


def test_peaks_keep_their_distance() -> None:
    values = np.zeros(100)
    values[[20, 22, 60]] = [3.0, 2.9, 2.0]
    assert pick_peaks(values, 5) == [20, 60]


def test_named_times_come_before_peaks() -> None:
    yes = scores([-5.0] * 30 + [4.0] * 30 + [2.0] * 40)
    spans = find_spans(100.0, [yes, scores([0.0] * 80 + [1.0] + [0.0] * 19)], yes, 9, [(40.0, 43.0, 4.0)])
    assert (spans[0].start, spans[0].end, spans[0].is_named) == (40.0, 43.0, True)
    assert all(not span.is_named and abs(span.middle - 41.5) > 5 for span in spans[1:])
    assert any(79 <= span.middle <= 82 and span.yes == 2.0 for span in spans)


def test_named_times_go_on_over_windows() -> None:
    assert merge_named([(10, 32, 1.0), (30, 45, 2.0), (80, 81, 3.0)]) == [(80, 81, 3.0), (10, 45, 2.0)]


def make_look(frames: int) -> Look:
    times = tuple(100 + 0.25 * i for i in range(frames))
    labels = tuple(LABEL_STEP * i for i in range(frames))
    return Look(tuple(range(frames)), times, (*times[1:], times[-1] + 0.25), labels)


def test_replies_name_frames_and_not_seconds() -> None:
    look = make_look(48)
    assert look.frames_of((8.5, 12.0)) == (17, 24)
    assert look.seconds_of((17, 24)) == (104.25, 106.25)
    assert look.frames_of((0.0, 1e6)) == (0, 47)


@pytest.mark.parametrize("interval", [(104.25, 106.25), (3000.0, 3010.0), (12.0, 8.0)])
def test_times_that_no_frame_has_are_no_moment(interval: tuple[float, float]) -> None:
    assert make_look(48).frames_of(interval) is None


def test_moments_keep_their_names() -> None:
    names = MomentNames()
    assert names.assign([10.0, 50.0]) == ["m1", "m2"]
    assert names.assign([50.5, 11.0, 300.0]) == ["m2", "m1", "m3"]
    assert names.assign([10.9, 11.1]) == ["m1", "m4"]


def test_overlapping_candidates_are_one_event() -> None:
    joined = join_candidates([candidate(5, 8), candidate(7, 11), candidate(20, 22)])
    assert [(item.start, item.end) for item in joined] == [(5, 11), (20, 22)]


def test_without_a_calibration_a_second_question_decides() -> None:
    ranked = Ranking(None, 0.5, 5).rank(
        [(candidate(5, 8), None), (candidate(20, 22, 6.0, -4.0), "start")], MomentNames()
    )
    assert [(moment.start, moment.checked, moment.probability) for moment in ranked.moments] == [(5, "twice", None)]
    assert [(moment.start, moment.checked, moment.on_cut) for moment in ranked.weaker] == [(20, "failed", "start")]
    assert [moment.rank for moment in (*ranked.moments, *ranked.weaker)] == [1, 2]


def test_a_calibration_gives_probabilities_and_a_threshold(tmp_path: Path) -> None:
    values = {
        "moment": {"bias": -1.0, "weights": {"close": 1.0}},
        "presence": {"bias": 0.0, "weights": {"best": 0.5}}, "threshold": 0.9,
    }  # fmt: skip
    (tmp_path / "search.json").write_text(json.dumps(values))
    calibration = load_calibration(tmp_path)
    assert calibration == Calibration(Logistic(-1.0, {"close": 1.0}), Logistic(0.0, {"best": 0.5}), 0.9)
    ranked = Ranking(calibration, calibration.threshold, 5).rank(
        [(candidate(5, 8, 1.0), None), (candidate(20, 22, 5.0), None)], MomentNames()
    )
    (moment,), (weaker,) = ranked.moments, ranked.weaker
    assert isinstance(moment, Moment) and moment.probability == pytest.approx(to_probability(4.0))
    assert weaker.probability == 0.5
    assert calibration.presence_probability([4.0], None) == pytest.approx(to_probability(2.0))
    assert load_calibration(None) is None


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": 2}, {"moment": {"bias": "x", "weights": {}}}, {"moment": {"bias": 0}}, {"presence": None},
        {"moment": {"bias": 0, "weights": {"color": 1}}}, {"moment": {"bias": 0, "weights": {"close": None}}},
    ],
)  # fmt: skip
def test_calibrations_that_cannot_be(tmp_path: Path, change: dict[str, object]) -> None:
    part = {"bias": 0.0, "weights": {}}
    (tmp_path / "search.json").write_text(json.dumps({"moment": part, "presence": part, **change}))
    with pytest.raises(ConfigError, match="search.json has "):
        load_calibration(tmp_path)


def prob(*tokens: tuple[str, float]) -> list[TokenProb]:
    top = tuple(TokenProb(i, text, text.encode(), math.log(p)) for i, (text, p) in enumerate(tokens))
    return [TokenProb(0, tokens[0][0], b"", math.log(tokens[0][1]), top)]


def test_yes_is_read_from_the_first_token() -> None:
    assert yes_log_odds(prob(("Yes", 0.5), (" no", 0.25), (" yes", 0.25))) == pytest.approx(math.log(3))
    assert yes_log_odds(prob(("no", 0.999))) == -12 + 0.0 or yes_log_odds(prob(("no", 0.999))) < -11
    assert yes_log_odds(prob(("red", 0.99), ("yes", 0.01))) is None
    assert yes_log_odds([]) is None


SCOPE = Scope("shapes", "It knows shapes.", 64, words=("the", "red", "circle", "is", "word", "shown"))


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        ("the red circle", None), ("is the word STOP shown?", None), ("the red dog", "does not know 'dog'"),
        ("der rote Kreis", "a language"), ("красный круг", "a language"), ("红色圆形", "a language"),
    ],
)  # fmt: skip
def test_what_is_outside_the_scope_is_said(question: str, sentence: str | None) -> None:
    notes = scope_notes(SCOPE, question)
    assert [sentence in note.text and note.code == "scope" for note in notes if sentence] == [True] * len(notes)
    assert bool(notes) == (sentence is not None)
    assert scope_notes(None, question) == []


def test_videos_beyond_what_was_measured_name_find() -> None:
    short = {"timestamps": [0.5 * i for i in range(32)]}
    long, wide = {"timestamps": [0.5 * i for i in range(100)]}, {"timestamps": [4.0 * i for i in range(30)]}
    assert length_notes(SCOPE, [short]) == [] and length_notes(None, [long, {}]) == []
    assert "100 frames are more than the 64" in length_notes(SCOPE, [long])[0].text
    (note,) = length_notes(None, [wide])
    assert "4.0 s apart" in note.text and "keye find" in note.text


@pytest.mark.parametrize(
    ("text", "is_list", "expected"),
    [
        ("[[3.0, 8.5]]", True, False), ("[]", True, False), ("yes", True, True), ("yes", False, False),
        ("[[3.0, 8.5], [1", False, True), ("[[3.0, 8.5], [1.0, [2.0, 3.0]]", False, True), ("red \ufffd", False, True),
        ("", True, True), ("", False, False), ("see [1] and [2, 3]", False, False),
    ],
)  # fmt: skip
def test_malformed_replies(text: str, is_list: bool, expected: bool) -> None:
    assert is_malformed(text, is_list=is_list) is expected
