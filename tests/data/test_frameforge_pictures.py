"""Questions about single pictures: true of the first frame, without times, in words the tokenizer knows."""

import random
import re
from collections import Counter

from keye.data.frameforge import make_clip, picture_questions, vocabulary


def test_answers_are_true_of_the_first_frame():
    tasks = Counter()
    for seed in range(80):
        clip = make_clip(seed, frames=1, objects=4, text_chance=0.6)
        names = {f"{thing.color_at(0)} {thing.shape}" for thing in clip.scene.visible_objects(0)}
        for question in picture_questions(clip, random.Random(seed), 30):
            tasks[question.task] += 1
            assert question.intervals is None
            if question.task == "count":
                assert question.answer == str(len(names))
            if question.task == "list_at":
                assert set(question.answer.split("; ")) == (names or {"none"})
            if question.task == "presence":
                assert any(name in question.text for name in names) == (question.answer == "yes")
            if question.task == "read":
                assert question.answer == clip.scene.text.content
            if question.task == "attribute_at":
                assert any({question.answer, word} == set(name.split()) for name in names for word in name.split()
                           if f" {word} " in question.text.replace("?", " "))  # fmt: skip
    assert min(tasks[task] for task in ("count", "list_at", "presence", "read", "attribute_at", "size")) > 20


def test_wordings_need_no_new_words():
    known = set(vocabulary())
    for seed in range(20):
        for question in picture_questions(make_clip(seed, frames=1), random.Random(seed), 30):
            assert set(re.findall(r"[a-z]+", question.text)) <= known


def test_no_question_is_asked_twice():
    for seed in range(20):
        texts = [question.text for question in picture_questions(make_clip(seed, frames=1), random.Random(seed), 30)]
        assert len(texts) == len(set(texts))
