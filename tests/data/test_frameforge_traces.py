"""The reasoning that leads to an answer: it can be read off the trace, and everything in it is true."""

import random
import re

from keye.data.frameforge import TRACED_TASKS, make_clip, make_window, questions, trace
from keye.data.frameforge.words import COLORS
from keye.train.recipes.nano.batches import batch_maker
from tests.support.tiny import NANO

CLIPS = [make_clip(seed, frames=64, objects=8, split="test") for seed in range(12)]
CLIPS += [make_clip(seed, frames=10, objects=3) for seed in range(12)]
CLIPS += [make_window(seed, frames=32) for seed in range(12)]
QUESTIONS = [
    (clip, question) for clip in CLIPS for question in questions(clip, random.Random(clip.seed), 60, tasks=TRACED_TASKS)
]


def answer_of(task, reasoning, text):
    """What follows from the reasoning alone, and the wording of the question."""
    if task != "order":
        return "0" if reasoning == "none" else re.findall(r"(?:^|; )(\d+) ", reasoning)[-1]
    named = [(float(item.rsplit(" ", 1)[1]), item.rsplit(" ", 1)[0]) for item in reasoning.split("; ")]
    if "first" in text:
        return min(named)[1]
    return "yes" if named[0][0] < named[1][0] else "no"


def test_the_answer_follows_from_the_trace():
    assert {question.task for _, question in QUESTIONS} == set(TRACED_TASKS)
    for clip, question in QUESTIONS:
        assert answer_of(question.task, trace(clip, question), question.text) == question.answer


def test_times_and_names_in_a_trace_are_those_of_the_clip():
    for clip, question in QUESTIONS:
        reasoning = trace(clip, question)
        times = [float(text) for text in re.findall(r"\d+\.\d", reasoning)]
        assert set(times) <= set(clip.timestamps)
        names = set(re.findall(rf"((?:{'|'.join(COLORS)}) [a-z]+)", reasoning))
        assert names <= {" ".join(pair) for pair in clip.scene.pairs()}
        if question.task == "count":
            assert len(names) == len(clip.scene.objects)
            assert times == sorted(times)


def test_a_trace_takes_at_most_96_tokens():
    encode = batch_maker(NANO).tokenizer.encode
    assert max(len(encode(trace(clip, question))) for clip, question in QUESTIONS) <= 96


def test_other_tasks_have_no_trace():
    clip = CLIPS[0]
    for question in questions(clip, random.Random(0), 80):
        assert bool(trace(clip, question)) == (question.task in TRACED_TASKS)
