"""Clips of FrameForge: the same seed gives the same clip, splits share nothing, pixels show what the scene says."""

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keye.data.frameforge import HELD_OUT_PAIRS, HELD_OUT_WORDS, TRAIN_WORDS, dense_labels, make_clip, render
from keye.data.frameforge.labels import BACKGROUND_IDS, CHARACTER_IDS, COLOR_IDS, SHAPE_IDS, SIZE_IDS
from keye.data.frameforge.words import COLORS
from keye.errors import KeyeError


def color_name(pixel):
    """The object colour that is nearest to `pixel`."""
    return min(COLORS, key=lambda name: sum((int(a) - b) ** 2 for a, b in zip(pixel, COLORS[name], strict=True)))


def test_same_seed_same_clip():
    first, second = make_clip(11, frames=12), make_clip(11, frames=12)
    assert first == second
    assert np.array_equal(render(first), render(second))
    assert make_clip(12, frames=12).scene != first.scene


def test_same_clip_in_another_process():
    code = "from keye.data.frameforge import *; print(make_clip(3, frames=9, split='unseen'))"
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert runs == {f"{make_clip(3, frames=9, split='unseen')}\n".encode()}


def test_import_needs_no_torch():
    code = "import sys, keye.data.frameforge; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_splits_share_no_clip():
    scenes = [
        {repr(make_clip(seed, frames=6, split=split).scene) for seed in range(200)} for split in ("train", "test")
    ]
    assert len(scenes[0]) == len(scenes[1]) == 200
    assert not scenes[0] & scenes[1]


@pytest.mark.parametrize("split", ["train", "test"])
def test_held_out_pairs_and_words_never_appear(split):
    for seed in range(400):
        scene = make_clip(seed, frames=16, split=split, text_chance=0.8).scene
        assert not scene.pairs() & HELD_OUT_PAIRS
        assert scene.text is None or not any(word in scene.text.content for word in HELD_OUT_WORDS)


def test_train_words_hold_no_held_out_word():
    assert not any(withheld in word for withheld in HELD_OUT_WORDS for word in TRAIN_WORDS)


def test_every_unseen_clip_shows_something_unseen():
    for seed in range(200):
        scene = make_clip(seed, frames=8, split="unseen", text_chance=1.0).scene
        assert any((thing.color, thing.shape) in HELD_OUT_PAIRS for thing in scene.objects)
        assert scene.text.content in HELD_OUT_WORDS


def test_timestamps_have_one_decimal_and_follow_start_and_step():
    assert make_clip(1, frames=4, start=12.5, step=0.2).timestamps == (12.5, 12.7, 12.9, 13.1)
    assert make_clip(1, frames=4, start=0.0, step=2.0).scene == make_clip(1, frames=4).scene
    starts = [make_clip(seed, frames=2).timestamps[0] for seed in range(500)]
    assert 0.2 < sum(start == 0 for start in starts) / 500 < 0.4
    assert max(starts) < 600
    assert all(start == round(start, 1) for start in starts)


def test_intervals_last_two_frames_and_stay_apart():
    for seed in range(300):
        clip = make_clip(seed, frames=12)
        things: list[Any] = [*clip.scene.objects, *([clip.scene.text] if clip.scene.text else [])]
        for intervals in (thing.intervals for thing in things):
            assert all(0 <= first < last < 12 for first, last in intervals)
            assert len(intervals) == 1 or intervals[0][1] + 2 < intervals[1][0] + 1


@pytest.mark.parametrize("frames", [1, 16])
def test_number_of_objects_is_evenly_spread(frames):
    numbers = np.bincount([len(make_clip(seed, frames=frames, split="test").scene.objects) for seed in range(800)])
    assert numbers[0] == 0
    assert numbers.max() / 800 < 0.32


@pytest.mark.parametrize("size", [(112, 112), (140, 84), (84, 140), (448, 448)])
def test_pixels_show_each_object_when_it_is_visible(size):
    for seed in range(25):
        clip = make_clip(seed, frames=10, size=size, text_chance=0.0)
        frames = render(clip)
        assert frames.shape == (10, size[1], size[0], 3)
        assert frames.dtype == np.uint8
        scale = size[0] / clip.scene.canvas[0]
        for thing in clip.scene.objects:
            for first, last in thing.intervals:
                for frame in range(first, last + 1):
                    x, y = (int(value * scale) for value in thing.position(frame))
                    assert color_name(frames[frame, y, x]) == thing.color_at(frame)


def test_frames_without_objects_show_the_bare_background():
    checked = 0
    for seed in range(80):
        clip = make_clip(seed, frames=10, text_chance=0.0)
        frames = render(clip).astype(int)
        for index in range(10):
            if not clip.scene.visible_objects(index):
                away = np.abs(frames[index] - clip.scene.background_at(index).rgb)
                assert away.max() <= clip.scene.noise
                checked += 1
    assert checked > 20


def test_text_is_drawn_inside_its_box_and_only_when_visible():
    for seed in range(40):
        clip = make_clip(seed, frames=8, text_chance=1.0)
        text, pixels = clip.scene.text, render(clip).astype(int)
        left, top = (math.floor(value) for value in text.box[:2])
        right, bottom = (math.ceil(value) for value in text.box[2:])
        assert min(left, top) >= 0
        assert max(right, bottom) <= 112
        for frame in range(8):
            ink = np.abs(pixels[frame] - text.rgb).max(-1) < 30
            inside = ink[top:bottom, left:right].sum()
            around = ink[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1].sum()
            if text.visible(frame):
                assert inside > 0.08 * (bottom - top) * (right - left)
                assert around - inside <= 2, "the ink stays within the box, but for rounding"


def test_larger_frames_look_the_same_after_downscaling():
    for seed in range(10):
        clip = make_clip(seed, frames=3, text_chance=1.0)
        for small, large in zip(render(clip), render(clip, (448, 448)), strict=True):
            shrunk = np.asarray(Image.fromarray(large).resize((112, 112), Image.Resampling.BOX)).astype(int)
            assert np.abs(shrunk - small).mean() < 1.5


def test_size_does_not_change_the_scene():
    assert make_clip(5, frames=6, size=(448, 448)).scene == make_clip(5, frames=6).scene


def test_dense_labels_name_what_lies_in_each_cell():
    letters = objects = 0
    for seed in range(60):
        clip = make_clip(seed, frames=3, size=(140, 84), text_chance=0.7)
        scale = 140 / clip.scene.canvas[0]
        labels = dense_labels(clip, 1)
        pixels = render(clip)[1]
        assert labels.color.shape == (3, 5)
        assert labels.background == BACKGROUND_IDS[clip.scene.background_at(1).color]
        for row, column in np.argwhere(labels.color):
            x, y = (np.array((column, row)) + 0.5 + labels.offset[row, column] / 2) * 28
            things = clip.scene.visible_objects(1)
            thing = min(things, key=lambda candidate: np.hypot(*(np.array(candidate.position(1)) * scale - (x, y))))
            assert np.allclose(np.array(thing.position(1)) * scale, (x, y), atol=1e-3)
            assert labels.color[row, column] == COLOR_IDS[thing.color_at(1)]
            assert labels.shape[row, column] == SHAPE_IDS[thing.shape]
            assert labels.size[row, column] == SIZE_IDS[thing.size]
            objects += 1
        for row, column in np.argwhere(labels.cover_color):
            middle = pixels[row * 28 + 13 : row * 28 + 15, column * 28 + 13 : column * 28 + 15].reshape(-1, 3)
            assert labels.cover_color[row, column] in [COLOR_IDS[color_name(pixel)] for pixel in middle]
        labelled = labels.letters[labels.letters > 0].tolist()
        text = clip.scene.text
        content = text.content if text and text.visible(1) else ""
        assert sorted(labelled) == sorted(CHARACTER_IDS[character] for character in content)
        letters += len(labelled)
    assert objects > 60
    assert letters > 40


def test_letters_of_a_cell_are_in_reading_order():
    clip = make_clip(4, frames=1, text_chance=1.0)
    row = dense_labels(clip, 0).letters.max(axis=(1, 2)).argmax()
    read = [character for character in dense_labels(clip, 0).letters[row].ravel() if character]
    assert read == [CHARACTER_IDS[character] for character in clip.scene.text.content]
    labels = dense_labels(clip, 0)
    assert [place for place in labels.letter_order[row].ravel() if place] == list(range(1, len(read) + 1))
    assert set(labels.text_length[row][labels.letters[row].any(axis=1)].tolist()) == {len(read)}
    assert labels.text_length[row].any() and not np.delete(labels.text_length, row, axis=0).any()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("split", {"split": "validation"}),
        ("frames", {"frames": 0}),
        ("objects", {"objects": 0}),
        ("size", {"size": (16, 16)}),
        ("start", {"start": -1.0}),
        ("step", {"step": 0.0}),
        ("text_chance", {"text_chance": 1.5}),
    ],
)
def test_bad_arguments_are_named(name, options):
    with pytest.raises(KeyeError, match=f"^{name} is"):
        make_clip(0, **{"frames": 4, **options})


def test_another_aspect_ratio_is_refused():
    with pytest.raises(KeyeError, match="aspect ratio"):
        render(make_clip(0, frames=2), (448, 224))


def test_dense_labels_refuse_sizes_that_are_no_multiple_of_the_cell():
    with pytest.raises(KeyeError, match="multiples"):
        dense_labels(make_clip(0, frames=1, size=(100, 100)), 0)
    with pytest.raises(KeyeError, match="frame is 1"):
        dense_labels(make_clip(0, frames=1), 1)
