"""Windows and their backgrounds: seeded, mostly without what is asked about, and true in every answer."""

import random
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from keye.data.frameforge import HELD_OUT_PAIRS, HELD_OUT_WORDS, SPLITS, make_window, render, window_questions
from keye.data.frameforge.backdrop import BRIGHTEST, DARKEST, KINDS, Texture, paint_texture, photographs, pick_texture
from keye.data.frameforge.words import COLORS, SHAPES, vocabulary
from keye.errors import KeyeError

SIZE = (60, 40)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "photograph"])
def test_textures_are_dark_seeded_and_vary(kind):
    texture = Texture(kind, 5, ((90, 20, 20), (20, 100, 110)))
    (still,) = paint_texture(texture, (0.0, 1.0), SIZE)
    assert still.shape == (40, 60, 3)
    assert still.min() >= DARKEST
    assert still.max() <= BRIGHTEST
    assert still.std(axis=(0, 1)).max() > 5
    other = paint_texture(Texture(kind, 6, texture.colors), (0.0,), SIZE)[0]
    assert np.array_equal(still, paint_texture(texture, (3.0,), SIZE)[0])
    assert not np.array_equal(still, other)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "photograph"])
def test_a_drifting_texture_moves_by_its_speed(kind):
    texture = Texture(kind, 7, ((90, 20, 20), (20, 100, 110)), drift=(4.0, -2.0))
    frames = paint_texture(texture, (0.0, 1.0, 2.5), SIZE, units=2.0)
    assert np.array_equal(frames[1][:-4, 8:], frames[0][4:, :-8])
    assert np.array_equal(frames[2][:-10, 20:], frames[0][10:, :-20])


def test_a_texture_repeats_without_a_seam():
    """Far from where it began a drifting texture is as smooth as there."""
    texture = Texture("blobs", 1, ((10, 10, 10), (110, 110, 110)), drift=(10.0, 0.0))
    frames = paint_texture(texture, [float(second) for second in range(13)], SIZE).astype(int)
    steps = np.abs(np.diff(frames, axis=2)).max(axis=(1, 2, 3))
    assert steps.max() <= 1.5 * steps.min() + 12


def test_photographs_are_those_of_the_split_or_replaced():
    train, test = photographs("train"), photographs("test")
    assert not set(train) & set(test)
    assert photographs("unseen") == test
    picked = [pick_texture(random.Random(seed), split) for seed in range(60) for split in ("train", "test")]
    for texture in picked:
        assert (texture.kind == "photograph") == (texture.photograph is not None)
        assert texture.photograph is None or texture.photograph in train + test
        assert paint_texture(texture, (0.0,), SIZE).max() <= BRIGHTEST
    assert {texture.kind for texture in picked} >= set(KINDS) - {"photograph"}
    assert {texture.moves for texture in picked} == {True, False}


def test_a_photograph_is_cut_darkened_and_drifts(monkeypatch, tmp_path):
    from PIL import Image

    from keye.data.frameforge import backdrop

    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.setattr(backdrop, "_photograph_path", lambda package, path: tmp_path / path)
    texture = Texture("photograph", 3, ((0, 0, 0), (0, 0, 0)), (5.0, 0.0), ("here", "a.png"))
    frames = paint_texture(texture, (0.0, 2.0), SIZE)
    assert frames.min() >= DARKEST
    assert frames.max() <= BRIGHTEST
    assert np.array_equal(frames[1][:, 10:], frames[0][:, :-10])


def test_same_seed_same_window():
    first, second = make_window(11, frames=12, size=(149, 84)), make_window(11, frames=12, size=(149, 84))
    assert first == second
    assert np.array_equal(render(first), render(second))
    scenes = [{repr(make_window(seed, frames=8, split=split)) for seed in range(100)} for split in SPLITS]
    assert len(set.union(*scenes)) == 300


def test_windows_hold_what_a_search_meets():
    windows = [make_window(seed, frames=32) for seed in range(400)]
    objects = Counter(len(window.scene.objects) for window in windows)
    assert objects[0] > 30
    assert objects[4] > 20
    cuts = Counter(len(window.scene.backgrounds) - 1 for window in windows)
    assert min(cuts[number] for number in (0, 1, 2, 3, 4, 6, 8)) > 10
    lengths = Counter(last - first + 1 for w in windows for thing in w.scene.objects for first, last in thing.intervals)
    assert min(lengths[number] for number in (1, 2, 3, 5, 8)) > 10
    assert any(thing.first == 0 for w in windows for thing in w.scene.objects)
    assert any(thing.last == 31 for w in windows for thing in w.scene.objects)
    assert sum(window.timestamps[0] == 0 for window in windows) > 340
    textured = [start.texture is not None for window in windows for start in window.scene.backgrounds]
    assert 0.6 < np.mean(textured) < 0.8


def test_a_cut_changes_every_object():
    for seed in range(200):
        scene = make_window(seed, frames=24).scene
        things: list[Any] = [*scene.objects, *([scene.text] if scene.text else [])]
        for start in scene.backgrounds[1:]:
            assert not any(thing.visible(start.frame - 1) and thing.visible(start.frame) for thing in things)


def test_times_rise_and_have_one_decimal():
    for seed in range(200):
        for close in (False, True):
            times = make_window(seed, frames=48, close=close).timestamps
            assert all(a < b for a, b in pairwise(times))
            assert all(time == round(time, 1) for time in times)


def test_unseen_pairs_and_words_stay_out_of_other_splits():
    for seed in range(200):
        for split in ("train", "test"):
            clip = make_window(seed, frames=8, split=split, text_chance=1.0)
            assert not clip.scene.pairs() & HELD_OUT_PAIRS
            for question in window_questions(clip, random.Random(seed), 20):
                assert not any(word in question.text.split() for word in HELD_OUT_WORDS)
                assert not any(f"{color} {shape}" in question.text for color, shape in HELD_OUT_PAIRS)


def test_an_argument_out_of_range_is_named():
    with pytest.raises(KeyeError, match="frames is 0"):
        make_window(0, frames=0)
    with pytest.raises(KeyeError, match="step is 0"):
        make_window(0, frames=4, step=0.0)


def named_object(text):
    """The colour and shape that a question names last."""
    words = text.rstrip("?").split()
    return next((a, b) for a, b in pairwise(words) if a in COLORS and b in SHAPES)


def test_answers_about_presence_are_true_and_balanced():
    answers, near = Counter(), 0
    for seed in range(200):
        clip = make_window(seed, frames=16)
        seen = clip.scene.pairs()
        for question in window_questions(clip, random.Random(seed), 18):
            if question.task == "presence":
                pair = named_object(question.text)
                assert question.answer == ("yes" if pair in seen else "no")
                near += question.answer == "no" and any(pair[0] == c or pair[1] == s for c, s in seen)
            elif question.task == "presence_text":
                content = clip.scene.text.content if clip.scene.text else None
                assert question.answer == ("yes" if content in question.text.replace("?", "").split() else "no")
            elif question.task == "ground_none":
                assert question.intervals == ()
                assert named_object(question.text) not in seen
            else:
                continue
            answers[question.task, question.answer] += 1
    assert 0.7 < answers["presence", "yes"] / answers["presence", "no"] < 1.1
    assert 0.4 < answers["presence_text", "yes"] / answers["presence_text", "no"] < 1.5
    assert near > 0.6 * answers["presence", "no"]
    assert answers["ground_none", "[]"] > 150


def test_questions_are_deterministic_different_and_in_the_vocabulary():
    known = set(vocabulary())
    for seed in range(60):
        clip = make_window(seed, frames=16)
        chosen = window_questions(clip, random.Random(seed), 18)
        assert chosen == window_questions(clip, random.Random(seed), 18)
        assert len({question.text for question in chosen}) == len(chosen) >= 6
        for question in chosen:
            words = question.text.translate(str.maketrans("", "", "?.,0123456789")).split()
            assert all(word in known or word.isupper() for word in words)


def test_a_shape_over_a_texture_keeps_its_colour_and_leaves_the_rest():
    for seed in range(30):
        clip = make_window(seed, frames=8, textured=1.0, text_chance=0.0)
        frames = render(clip).astype(int)
        for thing in clip.scene.objects:
            if thing.change is None:
                x, y = thing.position(thing.first)
                pixel = frames[thing.first, int(y), int(x)]
                assert np.abs(pixel - thing.rgb).max() <= clip.scene.noise
        empty = [frame for frame in range(8) if not clip.scene.visible_objects(frame)]
        assert all(frames[frame].max() <= BRIGHTEST + clip.scene.noise for frame in empty)
