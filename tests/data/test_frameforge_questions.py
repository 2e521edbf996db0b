"""Questions of FrameForge: right answers, checked by looking at the pixels alone, and answers hard to guess."""

import hashlib
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import pytest

from keye.data.frameforge import HELD_OUT_PAIRS, TASKS, format_intervals, make_clip, questions, render, vocabulary
from keye.data.frameforge.words import BACKGROUNDS, COLORS, SHAPES, SIZES
from keye.errors import KeyeError

THING = rf"(?P<color>{'|'.join(COLORS)}) (?P<shape>{'|'.join(SHAPES)})"
TIME = r"(\d+\.\d) s"


@dataclass(frozen=True)
class Seen:
    """One blob of pixels: what it is called, and its bounding box."""

    name: str
    x: float
    y: float
    height: int


def look(image):
    """(background, blobs) of one frame without text, from pixels alone."""
    pixels = image.astype(int)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    left = {(int(y), int(x)) for y, x in np.argwhere(np.abs(pixels - background).max(-1) > 45)}
    blobs = []
    while left:
        edge, blob = [left.pop()], []
        while edge:
            y, x = edge.pop()
            blob.append((y, x))
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in left:
                    left.remove(near)
                    edge.append(near)
        if len(blob) > 12:
            blobs.append(name_blob(pixels, np.array(blob)))
    return nearest(background, BACKGROUNDS), blobs


def name_blob(pixels, blob):
    (top, left), (bottom, right) = blob.min(0), blob.max(0)
    height, width = bottom - top + 1, right - left + 1
    fill = len(blob) / (height * width)
    low = (blob[:, 0].mean() - top) / (height - 1)  # where its weight lies: a triangle's in the lower part
    if fill > 0.9:
        shape = "square"
    elif fill > 0.68:
        shape = "circle"
    elif low > 0.58:
        shape = "triangle"
    else:
        shape = "cross" if fill > 0.47 else "star"
    color = nearest(np.median(pixels[blob[:, 0], blob[:, 1]], axis=0), COLORS)
    return Seen(f"{color} {shape}", (left + right) / 2, (top + bottom) / 2, height)


def nearest(pixel, palette):
    return min(palette, key=lambda name: float(np.square(pixel - np.array(palette[name])).sum()))


class Witness:
    """Answers questions about a clip by watching it."""

    def __init__(self, clip):
        self.clock = clip.timestamps
        self.side = clip.size[0]
        views = [look(image) for image in render(clip)]
        self.backgrounds = [background for background, _ in views]
        self.blobs = [blobs for _, blobs in views]

    def frames(self, name):
        return [index for index, blobs in enumerate(self.blobs) if name in [blob.name for blob in blobs]]

    def intervals(self, name):
        runs = []
        for index in self.frames(name):
            if runs and runs[-1][1] == index - 1:
                runs[-1][1] = index
            else:
                runs.append([index, index])
        return [(self.clock[first], self.clock[last]) for first, last in runs]

    def track(self, name):
        return [blob for blobs in self.blobs for blob in blobs if blob.name == name]

    def answer(self, question):
        names = [" ".join(match.groups()) for match in re.finditer(THING, question.text)]
        time = re.search(TIME, question.text)
        at = self.clock.index(float(time[1])) if time else None
        return getattr(self, question.task)(question.text, names, at)

    def ground(self, text, names, at):
        return format_intervals(self.intervals(names[0]))

    ground_none = ground

    def start(self, text, names, at):
        return f"{self.clock[self.frames(names[0])[0]]:.1f} seconds"

    def end(self, text, names, at):
        return f"{self.clock[self.frames(names[0])[-1]]:.1f} seconds"

    def count(self, text, names, at):
        return str(len({blob.name for blobs in self.blobs for blob in blobs}))

    def count_at(self, text, names, at):
        return str(len(self.blobs[at]))

    def attribute_at(self, text, names, at):
        word = next(word for word in re.findall("[a-z]+", text) if word in COLORS or word in SHAPES)
        (name,) = [blob.name for blob in self.blobs[at] if word in blob.name.split()]
        return next(part for part in name.split() if part != word)

    def list_at(self, text, names, at):
        order = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
        return "; ".join(sorted([blob.name for blob in self.blobs[at]], key=order.index)) or "none"

    def visible_at(self, text, names, at):
        return "yes" if at in self.frames(names[0]) else "no"

    def order(self, text, names, at):
        earlier = min(names, key=lambda name: self.frames(name)[0])
        return earlier if "first" in text else "yes" if earlier == names[0] else "no"

    def direction(self, text, names, at):
        begin, *_, end = self.track(names[0])
        dx, dy = end.x - begin.x, end.y - begin.y
        if abs(dx) > abs(dy):
            return "right" if dx > 0 else "left"
        return "down" if dy > 0 else "up"

    def place(self, text, names, at):
        (blob,) = [blob for blob in self.blobs[at] if blob.name == names[0]]
        if "left" in text:
            return "right" if blob.x > self.side / 2 else "left"
        return "bottom" if blob.y > self.side / 2 else "top"

    def presence(self, text, names, at):
        return "yes" if self.frames(names[0]) else "no"

    def times(self, text, names, at):
        return str(len(self.intervals(names[0])))

    def size(self, text, names, at):
        return "big" if self.track(names[0])[0].height > 25 else "small"

    def background(self, text, names, at):
        return self.backgrounds[at]

    def cut_time(self, text, names, at):
        cut = next(i for i in range(1, len(self.clock)) if self.backgrounds[i] != self.backgrounds[i - 1])
        return f"{self.clock[cut]:.1f} seconds"


def test_answers_are_what_the_pixels_show():
    checked = Counter()
    for seed in range(40):
        clip = make_clip(seed, frames=12, text_chance=0.0, split=("train", "unseen")[seed % 2])
        witness = Witness(clip)
        skip = {"caption": 0, "color_change": 0, "change_time": 0}
        if any(thing.change for thing in clip.scene.objects):
            skip["count"] = 0  # the witness takes an object of another colour for another object
        for question in questions(clip, random.Random(seed), 40, weights=skip):
            assert witness.answer(question) == question.answer, question
            checked[question.task] += 1
    assert set(checked) == set(TASKS) - {"ground_text", "read", "color_change", "change_time", "caption"}


def test_a_change_of_color_is_what_the_pixels_show():
    checked = 0
    for seed in range(150):
        clip = make_clip(seed, frames=10, text_chance=0.0, objects=1)
        (thing,) = clip.scene.objects
        if not thing.change:
            continue
        names = [blob.name for image in render(clip) for blob in look(image)[1]]
        change = next(i for i in range(1, len(names)) if names[i] != names[i - 1])
        chosen = questions(clip, random.Random(0), 4, tasks=["color_change", "change_time"])
        answers = {question.task: question.answer for question in chosen}
        assert f"{answers['color_change']} {thing.shape}" == names[change]
        assert answers["change_time"] == f"{clip.timestamps[thing.first + change]:.1f} seconds"
        assert all(names[0] in question.text for question in chosen)
        checked += 1
    assert checked > 5


def test_text_questions_use_the_rendered_text():
    clip = make_clip(6, frames=6, text_chance=1.0)
    read, ground = (questions(clip, random.Random(0), 1, tasks=[task])[0] for task in ("read", "ground_text"))
    text = clip.scene.text
    assert read.answer == text.content
    assert text.content in ground.text
    assert ground.intervals == tuple((clip.timestamps[a], clip.timestamps[b]) for a, b in text.intervals)


def test_a_caption_tells_every_event_in_order_of_start():
    clip = make_clip(21, frames=12, text_chance=1.0)
    (caption,) = questions(clip, random.Random(0), 1, tasks=["caption"])
    events = caption.answer.split("; ")
    starts = [float(re.match(r"\[\[(\d+\.\d)", event)[1]) for event in events]
    assert starts == sorted(starts)
    assert len(events) == len(clip.scene.objects) + 1


def test_gold_intervals_belong_to_interval_tasks_and_match_the_answer():
    for seed in range(50):
        for question in questions(make_clip(seed, frames=16), random.Random(seed), 30):
            if question.task in ("ground", "ground_text", "ground_none"):
                assert question.answer == format_intervals(question.intervals)
                assert bool(question.intervals) == (question.task != "ground_none")
            else:
                assert question.intervals is None


def test_questions_are_deterministic_and_never_repeat():
    for seed in range(50):
        clip = make_clip(seed, frames=8)
        chosen = questions(clip, random.Random(1), 60)
        assert chosen == questions(clip, random.Random(1), 60)
        assert len({question.text for question in chosen}) == len(chosen)


def test_published_figures_stay_comparable():
    """Scores of a model on seeded questions mean something only while those questions stay the same."""
    digest = hashlib.sha256()
    for seed in range(20):
        clip = make_clip(seed, frames=16, split="test", text_chance=0.0)
        digest.update(repr((clip, questions(clip, random.Random(seed), 8))).encode())
    assert digest.hexdigest()[:16] == "dcc5cda8da2307dc"


def test_guessing_the_majority_answer_pays_little():
    answers = defaultdict(Counter)
    for seed in range(1000):
        clip = make_clip(seed, frames=16, split="test")
        for question in questions(clip, random.Random(seed), 12, weights=dict.fromkeys(TASKS, 1.0)):
            answers[question.task][question.answer] += 1
    majority = {task: max(counts.values()) / sum(counts.values()) for task, counts in answers.items()}
    assert set(majority) == set(TASKS)
    assert majority.pop("ground_none") == 1
    for task in ("visible_at", "presence", "times", "size"):
        assert majority.pop(task) < 0.56
    for task in ("count", "count_at", "order", "direction", "place", "background", "color_change"):
        assert majority.pop(task) < 0.37
    assert max(majority.values()) < 0.2


def test_the_whole_video_is_a_poor_answer_to_grounding():
    shares = []
    for seed in range(800):
        clip = make_clip(seed, frames=16 + seed % 17, split="test")
        length = clip.timestamps[-1] - clip.timestamps[0]
        for question in questions(clip, random.Random(seed), 5, tasks=["ground", "ground_text"]):
            shares.append(sum(end - start for start, end in question.intervals) / length)
    assert 0.48 < np.mean(shares) < 0.56


def test_held_out_pairs_are_no_negatives_of_train_clips():
    held_out = {" ".join(pair) for pair in HELD_OUT_PAIRS}
    for seed in range(200):
        for question in questions(make_clip(seed, frames=8), random.Random(seed), 6, tasks=["presence", "ground_none"]):
            assert not any(name in question.text for name in held_out)


def test_negatives_share_a_color_or_a_shape_with_something_shown():
    near = total = 0
    for seed in range(200):
        clip = make_clip(seed, frames=8)
        for question in questions(clip, random.Random(seed), 2, tasks=["ground_none"]):
            color, shape = re.search(THING, question.text).groups()
            near += any(color == c or shape == s for c, s in clip.scene.pairs())
            total += 1
    assert near / total > 0.7


def test_vocabulary_holds_every_word_and_mark():
    vocab = set(vocabulary())
    assert len(vocab) <= 200
    assert {*COLORS, *SHAPES, *SIZES, *BACKGROUNDS} <= vocab
    for seed in range(200):
        for question in questions(make_clip(seed, frames=12), random.Random(seed), 30):
            for text in (question.text, question.answer):
                rest = re.sub(r"\[\[.*?\]\]|\d+\.\d|\b[A-Z0-9]+\b", " ", text)
                assert set(re.findall(r"[a-z]+|[^\sa-z]+", rest)) <= vocab


def test_questions_are_short():
    lengths = [
        len(question.text.split())
        for seed in range(100)
        for question in questions(make_clip(seed, frames=8), random.Random(seed), 10)
    ]
    assert np.mean(lengths) < 10
    assert max(lengths) <= 15


def test_a_single_image_gets_no_question_about_the_course_of_time():
    temporal = {
        "ground",
        "ground_text",
        "ground_none",
        "start",
        "end",
        "order",
        "direction",
        "times",
        "cut_time",
        "caption",
    }
    for seed in range(50):
        chosen = questions(make_clip(seed, frames=1), random.Random(seed), 50)
        assert chosen
        assert not temporal & {question.task for question in chosen}


def test_tasks_and_weights_choose_the_kinds():
    clip = make_clip(3, frames=12)
    assert {question.task for question in questions(clip, random.Random(0), 9, tasks=["count", "list_at"])} == {
        "count",
        "list_at",
    }
    without = questions(clip, random.Random(0), 99, weights={"ground": 0})
    assert "ground" not in {question.task for question in without}
    with pytest.raises(KeyeError, match="'counting'"):
        questions(clip, random.Random(0), 1, tasks=["counting"])
    with pytest.raises(KeyeError, match="negative"):
        questions(clip, random.Random(0), 1, weights={"count": -1})
