"""Packed batches: deterministic, and every label is where its answer is predicted."""

import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from keye.chat.messages import Message
from keye.chat.template import CHATML
from keye.data.frameforge import make_clip, questions, render, stream
from keye.train.batches import derived_seed
from keye.train.modes import is_well_formed
from keye.train.recipes.nano.batches import (
    IGNORE,
    NO_THOUGHT,
    THOUGHT,
    VISION_TARGETS,
    PackedBatch,
    batch_maker,
    choose_form,
    make_batch,
)
from keye.train.recipes.nano.config import AutoRule, Mix
from tests.support.tiny import NANO
from tests.support.training import assert_same, nano_stage, question_spans

MIX = (Mix(frames=3, clips=3, questions=8), Mix(frames=5, clips=2, questions=6))
LANGUAGE = nano_stage("language", steps=1, mix=MIX)
VISION = nano_stage("vision", kind="vision", trains="vision", steps=1, batch=4, text_chance=1.0)


@pytest.mark.parametrize("config", [LANGUAGE, VISION])
def test_a_seed_gives_one_batch(config):
    assert_same(make_batch(config, NANO, 5), make_batch(config, NANO, 5))
    other = make_batch(config, NANO, 6)
    assert not np.array_equal(make_batch(config, NANO, 5).frames, other.frames)


def test_derived_seeds_depend_on_every_part():
    seeds = {derived_seed(run, stage, step) for run in range(5) for stage in ("a", "b") for step in range(50)}
    assert len(seeds) == 500
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(0, "a", 1) == 7965780462979794708


@pytest.mark.parametrize("seed", range(4))
def test_every_answer_is_labelled_where_it_is_predicted(seed):
    batch = make_batch(LANGUAGE, NANO, seed)
    assert isinstance(batch, PackedBatch)
    tokenizer = batch_maker(NANO).tokenizer
    learnt = np.zeros(batch.labels.shape, dtype=bool)
    for answer in batch.answers:
        span = slice(answer.start, answer.stop)
        labels, inputs = batch.labels[answer.row, span], batch.tail_ids[answer.row, span]
        assert tokenizer.decode(labels.tolist(), skip_special=False) == answer.question.answer + "<|im_end|>"
        assert (inputs[1:] == labels[:-1]).all()
        learnt[answer.row, span] = True
        ((begin, _),) = [place for place in question_spans(batch, answer.row) if place[1] == answer.stop]
        head = tokenizer.decode(batch.tail_ids[answer.row, begin : answer.start + 1].tolist(), skip_special=False)
        assert head == answer.question.text + "<|im_end|>\n<|im_start|>assistant\n"
    assert (batch.labels[~learnt] == IGNORE).all()


@pytest.mark.parametrize("seed", range(3))
def test_branches_continue_the_positions_of_the_video(seed):
    batch = make_batch(LANGUAGE, NANO, seed)
    trunk = batch.trunk_ids.shape[1]
    following = batch.positions[0, 0, trunk - 1] + 1  # the trunk ends with a token of text
    for row in range(len(batch.frames)):
        for start, stop in question_spans(batch, row):
            expected = following + np.arange(stop - start)
            assert (batch.positions[row][:, trunk + start : trunk + stop] == expected).all()


def test_the_trunk_shows_the_clip():
    maker = batch_maker(NANO)
    batch = make_batch(LANGUAGE, NANO, 1)
    frames = batch.frames.shape[1]
    text = maker.tokenizer.decode(batch.trunk_ids[0].tolist(), skip_special=False)
    times = [part.split("<|video_pad|>")[0] for part in text.split("<|frame|>")[1:]]
    assert len(times) == frames
    assert text.startswith("<|im_start|>user\n<|vision_start|><|frame|>")
    assert text.endswith("<|video_pad|><|vision_end|>")
    assert (batch.trunk_ids == maker.video_pad).sum() == batch.frames.shape[0] * frames * 16
    for row in range(batch.time_ids.shape[0]):
        for ids in batch.time_ids[row]:
            place = np.flatnonzero((batch.trunk_ids[row][:-1] == ids[0]) & (batch.trunk_ids[row][1:] == ids[1]))
            assert len(place) >= 1


def test_vision_batches_have_a_target_for_each_token():
    batch = make_batch(VISION, NANO, 2)
    assert batch.frames.shape == (4, 112, 112, 3)
    assert batch.ids.shape == (4, 16, len(VISION_TARGETS))
    assert batch.offset.shape == (4, 16, 2)
    for column, (_, count) in enumerate(VISION_TARGETS):
        assert 0 <= batch.ids[..., column].min()
        assert batch.ids[..., column].max() < count
    assert (np.isnan(batch.offset[..., 0]) == (batch.ids[..., 0] == 0)).all()


def test_frames_are_those_of_the_clips():
    maker = batch_maker(NANO)
    clips = [make_clip(seed, frames=3) for seed in (1, 2)]
    batch = maker.pack(clips, [questions(clip, stream("train", clip.seed, "q"), 4) for clip in clips])
    np.testing.assert_array_equal(batch.frames, np.stack([render(clip) for clip in clips]))


def test_making_batches_imports_no_torch():
    code = "import sys, keye.train.recipes.nano.batches; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_mix_may_show_more_text_than_its_stage():
    always = nano_stage("text", steps=1, mix=(Mix(frames=2, clips=6, questions=40, text_chance=1.0),), text_chance=0.0)
    never = nano_stage("plain", steps=1, mix=(Mix(frames=2, clips=6, questions=40),), text_chance=0.0)
    assert make_batch(always, NANO, 1).events.text.any(axis=(1, 2)).all()
    assert not make_batch(never, NANO, 1).events.text.any()


def test_pictures_are_asked_about_as_images():
    config = nano_stage("pictures", steps=1, mix=(Mix(frames=1, clips=3, questions=6, pictures=True),))
    batch, maker = make_batch(config, NANO, 2), batch_maker(NANO)
    text = maker.tokenizer.decode(batch.trunk_ids[0].tolist(), skip_special=False)
    assert text == "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"
    assert batch.time_ids.shape == (3, 0, 2)
    tasks = {answer.question.task for answer in batch.answers}
    assert {"count", "presence"} <= tasks
    assert not any("video" in a.question.text or "seconds" in a.question.text for a in batch.answers)


def test_thinking_prompts_are_those_of_inference():
    """What opens a reply in training is what the chat template adds to a prompt in that mode."""
    for thinking, opening in ((True, THOUGHT), (False, NO_THOUGHT), (None, "")):
        segment = CHATML.render([Message("user", ("q",))], thinking=thinking)[-1]
        assert str(segment.value).endswith(f"<|im_start|>assistant\n{opening}")
        assert NO_THOUGHT.startswith(THOUGHT)


def test_a_thinking_stage_asks_in_all_forms():
    mix = (Mix(frames=8, clips=4, questions=16),)
    stage = nano_stage("think", steps=1, mix=mix, thinking=0.8, task_weights={"count": 9.0, "order": 9.0})
    batch, maker = make_batch(stage, NANO, 3), batch_maker(NANO)
    openings, think = set(), maker.tokenizer.encode("</think>", special=True)[0]
    for answer in batch.answers:
        head = batch.tail_ids[answer.row, max(0, answer.start - 24) : answer.start + 1].tolist()
        text = maker.tokenizer.decode(head).rpartition("ssistant\n")[2]
        reply = batch.labels[answer.row, answer.start : answer.stop].tolist()
        openings.add(text)
        assert (think in reply) == (text == THOUGHT)
        assert maker.tokenizer.decode(reply[:-1]).endswith(answer.question.answer)
    assert openings == {"", THOUGHT, NO_THOUGHT}


def test_replies_without_an_opening_think_where_a_rule_says_so():
    rules = (AutoRule(task="count", frames=6, items=2), AutoRule(task="order"))
    for frames in (4, 8):
        for seed in range(8):
            clip = make_clip(seed, frames=frames, objects=4)
            for question in questions(clip, stream("train", seed, "auto"), 12):
                form = choose_form(clip, question, 0.0, stream("train", seed, "form"), rules)
                counted = question.task == "count" and frames == 8 and len(clip.scene.objects) >= 2
                assert form.opening == ""
                assert form.reply.startswith(THOUGHT) == (counted or question.task == "order")
                assert form.reply.endswith(question.answer)


def test_every_question_can_be_thought_about():
    clip, rng, openings = make_clip(1, frames=8), stream("train", 0, "forms"), set()
    for _ in range(40):
        for question in questions(clip, rng, 4, tasks=("ground", "count")):
            form = choose_form(clip, question, 1.0, rng)
            openings.add((question.task, form.opening))
            mode = "think" if form.opening == THOUGHT else "no_think"
            text = form.opening.removeprefix(NO_THOUGHT) + form.reply
            assert is_well_formed(text, mode, "prefill")
    assert len(openings) == 4


def test_rules_name_tasks_that_have_reasoning():
    with pytest.raises(ValidationError, match="'read' has no reasoning"):
        AutoRule(task="read")
