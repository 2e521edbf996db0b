"""Text forms of thinking modes, and which questions are labelled to need thinking."""

import pytest

from keye.chat.messages import Message
from keye.chat.replies import parse_reply
from keye.chat.template import template_of
from keye.errors import KeyeError
from keye.releases import PREVIEW, V2
from keye.train.modes import PassRates, is_well_formed, rewrite, write_reply

STYLES = ("suffix", "prefill")


def conversation(reply):
    return (Message("user", ("How many?",)), Message("assistant", (reply,)))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mode", ["think", "no_think", "auto", "video"])
def test_a_written_reply_is_well_formed_and_read_back(mode, style):
    text = write_reply("42", "6 times 7.", mode, style)
    assert is_well_formed(text, mode, style)
    assert parse_reply(text).text == "42"
    assert ("6 times 7." in text) == (mode != "no_think")


@pytest.mark.parametrize("style", STYLES)
def test_auto_replies_may_answer_directly(style):
    text = write_reply("42", None, "auto", style)
    assert is_well_formed(text, "auto", style)
    assert text.startswith("<analysis>") == (style == "suffix")
    assert "<think>" not in text


@pytest.mark.parametrize(
    ("text", "mode", "style"),
    [
        ("42", "think", "suffix"),
        ("<think>a</think>42", "think", "suffix"),
        ("<think>a</think><answer>42</answer> more", "think", "suffix"),
        ("<think>a<think>b</think><answer>42</answer>", "think", "suffix"),
        ("<think>a</think>\n\n42", "think", "prefill"),
        ("<think>\na\n</think>\n\n", "think", "prefill"),
        ("<think>\na\n</think>\n\n42", "no_think", "prefill"),
        ("42", "auto", "suffix"),
        ("<analysis>a</analysis>", "auto", "suffix"),
        ("<analysis>a</analysis><think>b</think>42", "auto", "suffix"),
        ("42</answer>", "no_think", "suffix"),
        ("", "no_think", "suffix"),
    ],
)
def test_other_forms_are_not(text, mode, style):
    assert not is_well_formed(text, mode, style)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "reply",
    ["<think>\n6 times 7.\n</think>\n\n42", "<think>6 times 7.</think><answer>42</answer>",
     "<analysis>Hard.</analysis><think>6 times 7.</think><answer>42</answer>"],
)  # fmt: skip
def test_replies_of_any_form_are_rewritten(reply, style):
    for mode in ("think", "no_think", "auto"):
        *_, last = rewrite(conversation(reply), mode, style)
        assert is_well_formed("".join(last.parts), mode, style)
        assert parse_reply("".join(last.parts)).text == "42"
    assert rewrite(conversation(reply), None, style) == conversation(reply)


def test_an_analysis_of_the_data_stays():
    reply = "<analysis>Hard.</analysis><think>6 times 7.</think><answer>42</answer>"
    *_, last = rewrite(conversation(reply), "auto", "suffix")
    assert last.parts == (reply,)


@pytest.mark.parametrize(("reply", "sentence"), [("42", "needs reasoning"), ("<think>a</think>", "no answer")])
def test_what_a_mode_lacks_is_named(reply, sentence):
    with pytest.raises(KeyeError, match=sentence):
        rewrite(conversation(reply), "think", "suffix")


def test_rewriting_to_the_form_of_the_release_continues_its_prompt():
    """Prefill prompts open the block that the written reply begins with."""
    messages = rewrite(conversation("<think>x</think>42"), "think", V2.thinking)
    template = template_of(V2)
    prompt = "".join(str(s.value) for s in template.render(messages[:1], thinking=True))
    complete = "".join(str(s.value) for s in template.render(messages, thinking=True, add_generation_prompt=False))
    assert complete.startswith(prompt)
    assert template_of(PREVIEW).thinking == "suffix"


@pytest.mark.parametrize(
    ("direct", "thinking", "needed"),
    [(1.0, 1.0, False), (0.75, 1.0, False), (0.25, 1.0, True), (0.25, 0.25, False), (0.0, 0.0, False)],
)
def test_what_is_right_without_thinking_needs_none(direct, thinking, needed):
    assert PassRates(direct, thinking).needs_thinking() is needed
