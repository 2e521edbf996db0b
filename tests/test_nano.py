"""The packaged keye-nano loads, is small, and answers the demo's question as the README says."""

import pytest

import keye
from keye.hub import asset

WEIGHTS = asset("nano") / "model.safetensors"


@pytest.fixture(scope="module")
def model():
    return keye.load("nano")


def test_the_weights_are_at_most_40_megabytes():
    assert WEIGHTS.stat().st_size <= 40e6


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_the_demo_question_is_answered(model, attention):
    answer = model.ask(asset("demo.mp4"), "when is the cyan triangle visible?", attention=attention)
    assert answer.attention == attention and answer.finish_reason == "stop"
    ((start, end),) = answer.intervals
    truth = (2.0, 14.0)
    overlap = min(end, truth[1]) - max(start, truth[0])
    assert overlap / (max(end, truth[1]) - min(start, truth[0])) > 0.9
    assert answer.usage.media_tokens == 512 and answer.plan[0]["frames"] == 32


def test_what_streams_is_the_answer(model):
    stream = model.stream_ask(asset("demo.mp4"), "what color is the triangle?")
    text = "".join(stream)
    assert text == stream.answer.text == "cyan"


def test_the_examples_of_the_page_are_answered_rightly(model):
    """The sample shows a red circle from 3.0 to 8.5 s, a cyan triangle, and no green square."""
    right = {
        "when is the red circle visible?": "[[3.0, 8.5]]",
        "what color is the triangle?": "cyan",
        "when is the green square visible?": "[]",
    }
    assert set(model.runtime.generation_config.examples) == set(right)
    for question, text in right.items():
        assert model.ask(asset("demo.mp4"), question).text == text


def test_the_examples_of_its_scope_are_answered_rightly(model):
    """What the first screen of the page offers: something that is there, something that is not, and a question."""
    scope = model.runtime.generation_config.scope
    visible, absent, question = scope.examples
    assert (visible, absent) == ("the red circle", "the purple cross")
    assert model.ground(asset("demo.mp4"), visible).intervals == ((3.0, 8.5),)
    assert model.ground(asset("demo.mp4"), absent).intervals == ()
    assert model.ask(asset("demo.mp4"), question).text == "3"
