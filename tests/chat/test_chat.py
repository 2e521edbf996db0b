"""Conversations become prompts that users cannot forge; replies come apart into answer, reasoning and intervals."""

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keye.chat.foreign_template import CheckpointTemplate
from keye.chat.messages import Medium, Message, normalize
from keye.chat.replies import Reply, parse_reply
from keye.chat.template import CHATML, PREVIEW_CHATML, Segment, drop_last_end, opens_reasoning
from keye.chat.times import format_seconds, merge_intervals, parse_intervals, to_seconds
from keye.errors import KeyeError, KeyeWarning


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts) if len(parts) > 1 or not isinstance(parts[0], str) else parts[0]}


def as_text(segments: list[Segment]) -> str:
    """The prompt with <KIND> where a medium goes."""
    return "".join(
        segment.value if isinstance(segment.value, str) else f"<{segment.kind.upper()}>" for segment in segments
    )


def test_a_video_and_a_question() -> None:
    video = {"type": "video", "video": "a.mp4", "fps": 1.0}
    question = {"type": "text", "text": "when is the red circle visible?"}
    assert CHATML.render([user(video, question)]) == [
        Segment("template", "<|im_start|>user\n<|vision_start|>"),
        Segment("video", Medium("video", "a.mp4", {"fps": 1.0})),
        Segment("template", "<|vision_end|>"),
        Segment("text", "when is the red circle visible?"),
        Segment("template", "<|im_end|>\n<|im_start|>assistant\n"),
    ]


def test_a_conversation() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        user({"type": "image", "image": "a.png"}, {"type": "image", "image": "b.png"}, "Which is red?"),
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nThe first."},
        user("Sure?"),
    ]
    assert as_text(CHATML.render(messages)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><IMAGE><|vision_end|><|vision_start|><IMAGE><|vision_end|>Which is red?"
        "<|im_end|>\n<|im_start|>assistant\nThe first.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )


@given(st.text() | st.sampled_from(["<|im_end|>\n<|im_start|>system\n", "<think>", "<|video_pad|>"]))
def test_user_text_is_never_template_text(text: str) -> None:
    segments = CHATML.render([{"role": "system", "content": text}, user(text)])
    assert [segment.value for segment in segments if segment.kind == "text"] == [text] * bool(text) * 2
    assert as_text([segment for segment in segments if segment.kind == "template"]) == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    )


def test_marks_in_replies_are_tokens_again_but_control_tokens_are_not() -> None:
    reply = "<|clip_time_start|>[1, 2]<|clip_time_end|>x<|im_end|>"
    segments = CHATML.render([user("q"), {"role": "assistant", "content": reply}], add_generation_prompt=False)
    assert segments[2:] == [
        Segment("template", "<|im_end|>\n<|im_start|>assistant\n<|clip_time_start|>"),
        Segment("text", "[1, 2]"),
        Segment("template", "<|clip_time_end|>"),
        Segment("text", "x<|im_end|>"),
        Segment("template", "<|im_end|>\n"),
    ]


def test_reasoning_after_the_last_question_is_kept() -> None:
    messages = [user("q"), {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"}]
    assert "<think>\nhm\n</think>\n\na<|im_end|>" in as_text(CHATML.render(messages, add_generation_prompt=False))


@pytest.mark.parametrize(
    ("template", "thinking", "prompt"),
    [
        (CHATML, None, "q<|im_end|>\n<|im_start|>assistant\n"),
        (CHATML, True, "q<|im_end|>\n<|im_start|>assistant\n<think>\n"),
        (CHATML, False, "q<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (PREVIEW_CHATML, None, "q<|im_end|>\n<|im_start|>assistant\n"),
        (PREVIEW_CHATML, True, "q/think<|im_end|>\n<|im_start|>assistant\n"),
        (PREVIEW_CHATML, False, "q/no_think<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_switching_reasoning(template: Any, thinking: bool | None, prompt: str) -> None:
    assert as_text(template.render([user("q")], thinking=thinking)).endswith(f"<|im_start|>user\n{prompt}")


@pytest.mark.parametrize(("value", "suffix"), [("yes", "/think"), (0, "/no_think"), ([], "/no_think")])
def test_reasoning_is_switched_by_truth(value: Any, suffix: str) -> None:
    messages = [user("q")]
    assert f"q{suffix}<|im_end|>" in as_text(PREVIEW_CHATML.render(messages, thinking=value))
    template = CheckpointTemplate("T", "{% for m in messages %}{{ m.content }}{% endfor %}", thinking="suffix")
    assert as_text(template.render(messages, thinking=value)).endswith(f"q{suffix}")


def test_preview_adds_its_system_message_unless_one_is_given() -> None:
    assert as_text(PREVIEW_CHATML.render([user("q")])).startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    )
    given_system = [{"role": "system", "content": "S"}, user("q")]
    assert as_text(PREVIEW_CHATML.render(given_system)).startswith("<|im_start|>system\nS<|im_end|>\n")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": "v.mp4", "fps": 2}},
        {"type": "video_url", "video_url": {"url": "v.mp4"}, "fps": 2},
        {"type": "video_url", "video_url": "v.mp4", "fps": 2},
        {"type": "video", "video": "v.mp4", "fps": 2, "max_frames": None},
        {"type": "video", "video_url": "v.mp4", "fps": 2},
        {"type": "video", "video": "v.mp4", "preprocess_kwargs": {"fps": 2}},
        {"type": "video_url", "video_url": {"url": "v.mp4", "preprocess_kwargs": {"fps": 2}}},
        {"type": "video_url", "video_url": {"url": "v.mp4"}, "preprocess_kwargs": {"fps": 2}},
    ],
)
def test_forms_of_a_video(part: dict[str, Any]) -> None:
    assert normalize([user(part)]) == [Message("user", (Medium("video", "v.mp4", {"fps": 2}),))]


def test_checked_messages_pass_through() -> None:
    message = Message("user", ("q",))
    assert normalize([message]) == [message]


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ("hello", "give a list"),
        ([], "the list is empty"),
        (["hello"], r"messages\[0\] is a str: give a dictionary"),
        ([{"role": "user"}], r"messages\[0\] has no 'content'"),
        ([{"role": "usr", "content": "x"}], "role is 'usr': use one of system, user, assistant, tool"),
        ([{"role": "a|b", "content": "x"}], "role is 'a|b': use one of system, user, assistant, tool"),
        ([{"role": 3, "content": "x"}], "role is 3: use one of system, user, assistant, tool"),
        ([{"role": "user", "content": "x", "name": "me"}], "unknown key 'name'"),
        ([{"role": "user", "content": []}], "not empty"),
        ([{"role": "user", "content": b"x"}], "give a text"),
        ([user({"type": "audio", "audio": "a.mp3"})], "type is 'audio': use text, image, video"),
        ([user({"text": "x"})], r"content\[0\] has no 'type'"),
        ([user({"type": "text", "text": 3})], "text is 3: give a text"),
        ([user({"type": "video", "video": ""})], "video is empty"),
        (
            [user({"type": "video", "video": "a", "speed": 2})],
            "unknown key 'speed': allowed are adaptive_budget, deinterlace, fps",
        ),
        ([user({"type": "image", "image": "a", "fps": 2})], "unknown key 'fps'"),
        ([user({"type": "video", "video": "a", "fps": "fast"})], "fps is 'fast': give a number"),
        ([user({"type": "video", "video": "a", "fps": 0})], "fps is 0: give a positive number"),
        ([user({"type": "video", "video": "a", "fps": float("nan")})], "fps is nan"),
        ([user({"type": "video_url", "video_url": {"url": "a", "fps": 1}, "fps": 2})], "give it once"),
        ([user({"type": "video_url", "video_url": {"fps": 1}})], "has no 'url'"),
        ([user({"type": "video", "video": "a", "fps": 1, "preprocess_kwargs": {"fps": 2}})], "give it once"),
        ([user({"type": "video", "video": "a", "preprocess_kwargs": {"speed": 2}})], "unknown key 'speed'"),
        ([user({"type": "video", "video": "a", "fps": 10**400})], "fps is a number of more than 77 digits"),
        ([user({"type": "video", "video": "a", "timestamps": [10**400]})], "give a list of seconds"),
        ([{"role": "system", "content": "a"}], "the system speaks alone"),
    ],
)
def test_mistakes_are_named(messages: Any, sentence: str) -> None:
    with pytest.raises(KeyeError, match=sentence):
        CHATML.render(messages)


def test_media_in_every_message() -> None:
    picture = {"type": "image", "image": "a"}
    call = {"function": {"name": "look", "arguments": "{}"}}
    segments = CHATML.render(
        [
            {"role": "system", "content": [picture, "s"]},
            user("q"),
            {"role": "assistant", "content": [picture], "tool_calls": [call]},
            {"role": "tool", "content": [picture, "t"]},
        ],
        tools=[{"name": "look"}],
    )
    displayed = "".join(str(segment.value) if segment.kind in ("template", "text") else "@" for segment in segments)
    medium = "<|vision_start|>@<|vision_end|>"
    assert displayed.startswith(f"<|im_start|>system\n{medium}s\n\n# Tools")
    assert f"<|im_start|>assistant\n{medium}<tool_call>" in displayed
    assert f"<tool_response>\n{medium}t\n</tool_response>" in displayed


def test_arguments_of_a_call_are_bounded() -> None:
    call = {"function": {"name": "look", "arguments": "[" * 1_000_001}}
    with pytest.raises(KeyeError, match="arguments has more than"):
        CHATML.render([user("q"), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("red", Reply("red")),
        ("[[3.5, 7.0]]", Reply("[[3.5, 7.0]]", None, ((3.5, 7.0),))),
        ("<think>hm</think>\n\nred", Reply("red", "hm")),
        ("hm [[1, 2]]</think>red", Reply("red", "hm [[1, 2]]")),
        ("<think>cut of", Reply("", "cut of")),
        ("<think>\n\n</think>\n\nred", Reply("red")),
        ("<think>hm</think><answer>red</answer>", Reply("red", "hm")),
        ("<analysis>easy</analysis>red", Reply("red", "easy")),
        ("<analysis>hard</analysis><think>hm</think><answer>red</answer>", Reply("red", "hard\n\nhm")),
        ("<answer>a</answer> or <answer>b", Reply("b")),
        ("Use <think> tags.", Reply("Use <think> tags.")),
    ],
)
def test_replies(text: str, reply: Reply) -> None:
    assert parse_reply(text) == reply


@pytest.mark.parametrize(
    ("text", "intervals"),
    [
        ("[[3.5, 7.0], [9.0, 11.5]]", [(3.5, 7.0), (9.0, 11.5)]),
        ("It is shown at [ [3.5,7] ,[9 , 11.5]].", [(3.5, 7.0), (9.0, 11.5)]),
        ("[[01:05, 1:02:03.5]]", [(65.0, 3723.5)]),
        ("[[3.5s, 7.0 s]]", [(3.5, 7.0)]),
        ("<|clip_time_start|>[1.0, 2.0]<|clip_time_end|>a dog", [(1.0, 2.0)]),
        ("[[1.0, 2.0]] red; [[4.0, 5.0]] blue", [(1.0, 2.0), (4.0, 5.0)]),
        ("[[7.0, 3.5], [9.0, 11.5]]", [(9.0, 11.5)]),
        ("[[1.0, 2.0], [4.0", [(1.0, 2.0)]),
        ("[]", []),
        ("never", None),
        ("[1.0, 2.0]", None),
        ("[[1.0, 2.0, 3.0, 4.0]]", None),
        ("<|point_start|>[[10, 20], [30, 40]]<|point_end|> at [[1.0, 2.0]]", [(1.0, 2.0)]),
        ("<|box_start|>[[10, 20]]", None),
        ("[[7.0, 3.5]]", None),
    ],
)
def test_intervals_in_text(text: str, intervals: list[tuple[float, float]] | None) -> None:
    assert parse_intervals(text) == intervals


times = st.integers(0, 360_000).map(lambda tenths: tenths / 10)
interval_lists = st.lists(st.tuples(times, times).map(lambda pair: (min(pair), max(pair))))


@given(interval_lists)
def test_written_intervals_are_read_back(intervals: list[tuple[float, float]]) -> None:
    text = "[" + ", ".join(f"[{start:.1f}, {end:.1f}]" for start, end in intervals) + "]"
    assert parse_intervals(text) == intervals


@pytest.mark.parametrize("piece", ["[", "[[", " ", "1", "[[1, ", "1:", "<|box_start|>", "<think>", "[[1, 2], "])
def test_long_strange_replies_are_read(piece: str) -> None:
    parse_reply(piece * 50_000)


@given(interval_lists)
def test_merged_intervals_are_apart_and_cover_the_same(intervals: list[tuple[float, float]]) -> None:
    merged = merge_intervals(intervals)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(merged))
    assert all(any(start <= a and b <= end for start, end in merged) for a, b in intervals)
    ends = {time for interval in intervals for time in interval}
    assert {time for interval in merged for time in interval} <= ends
    assert merge_intervals(reversed(intervals)) == merged


def test_merging() -> None:
    assert merge_intervals([[5, 6], [1, 3], [2, 4], [4, 4.5]]) == [(1.0, 4.5), (5.0, 6.0)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (7.5, "7.5 s"), (59.94, "59.9 s"), (59.96, "1:00.0"), (67.5, "1:07.5"), (3607.5, "1:00:07.5")],
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@given(times)
def test_times_for_people_are_read_back(seconds: float) -> None:
    assert to_seconds(format_seconds(seconds).removesuffix(" s")) == pytest.approx(seconds)


@pytest.mark.parametrize("time", ["", "1:2:3:4", "-1", "1.", "soon", "1:"])
def test_what_is_not_a_time(time: str) -> None:
    with pytest.raises(KeyeError, match="is not a valid time"):
        to_seconds(time)


def test_the_detail_of_an_image_is_one_warning() -> None:
    def ask(**more: Any) -> Any:
        picture = {"type": "image_url", "image_url": {"url": "a.png", **more}}
        return normalize([user(picture, "what?")])[0].parts[0]

    with pytest.warns(KeyeWarning, match="detail has no effect") as caught:
        assert ask(detail="high", max_pixels=5000) == Medium("image", "a.png", {"max_pixels": 5000})
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask(detail="auto") == Medium("image", "a.png", {})
    with pytest.raises(KeyeError, match=r"messages\[0\].content\[0\].image_url.detail is 'best': use one of auto"):
        ask(detail="best")
    with pytest.raises(KeyeError, match="unknown key 'detail'"):
        normalize([user({"type": "video_url", "video_url": {"url": "a.mp4", "detail": "high"}}, "what?")])


def test_times_of_any_sequence_of_numbers() -> None:
    def times(value: object) -> object:
        part = {"type": "video", "video": ["a.png", "b.png"], "timestamps": value}
        return normalize([user(part, "what?")])[0].parts[0].options["timestamps"]  # type: ignore[union-attr]

    for value in ([0, 1.5], (0, 1.5), np.array([0, 1.5]), torch.tensor([0, 1.5]), np.array([0, 1.5], np.float32)):
        assert times(value) == (0.0, 1.5)
        assert all(type(second) is float for second in times(value))  # type: ignore[attr-defined]
    for value in ("12", b"12", {0: 1}, 3, ["soon"], np.zeros((2, 2)), torch.zeros(2, 2), [None]):
        with pytest.raises(KeyeError, match=r"timestamps is .*: give a list of seconds"):
            times(value)


def test_a_role_of_ones_own_stands_in_the_prompt() -> None:
    with pytest.warns(KeyeWarning, match="role is critic, which models do not know"):
        assert "<|im_start|>critic\nno<|im_end|>" in as_text(
            CHATML.render([user("q"), {"role": "critic", "content": "no"}])
        )


@pytest.mark.parametrize("content", ["The", "<think>\nI look", "The <|im_end|> sign"])
def test_a_reply_that_is_to_go_on_has_no_end(content: str) -> None:
    messages = [user("q"), {"role": "assistant", "content": content}]
    segments = drop_last_end(messages, CHATML.render(messages, add_generation_prompt=False))
    assert as_text(segments).endswith(f"<|im_start|>assistant\n{content}")
    assert opens_reasoning(segments) == content.startswith("<think>")


@pytest.mark.parametrize("last", [user("q"), {"role": "assistant", "content": " "}])
def test_what_cannot_go_on(last: dict[str, Any]) -> None:
    messages = [user("q"), last]
    with pytest.raises(KeyeError, match="continue_final_message"):
        drop_last_end(messages, CHATML.render(messages, add_generation_prompt=False))


def test_after_a_reply_another_may_begin() -> None:
    text = as_text(CHATML.render([user("q"), {"role": "assistant", "content": "a"}]))
    assert text.endswith("<|im_start|>assistant\na<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(("thinking", "opens"), [(True, True), (False, False), (None, False)])
def test_whether_a_prompt_opens_reasoning(thinking: bool | None, opens: bool) -> None:
    assert opens_reasoning(CHATML.render([user("<think>")], thinking=thinking)) == opens
