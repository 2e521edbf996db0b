"""Where the evidence of questions lies: pointers and events against the scene that made them."""

import random

import numpy as np
import pytest

from keye.data.frameforge import dense_labels, make_clip, questions
from keye.data.frameforge.labels import CHARACTER_IDS
from keye.data.frameforge.words import COLORS, SHAPES
from keye.train.recipes.nano.batches import THOUGHT, batch_maker, choose_form
from keye.train.recipes.nano.evidence import events_of
from tests.support.tiny import NANO


def packed(seed, tasks, frames=10, count=12, **options):
    clip = make_clip(seed, frames=frames, objects=4, **options)
    chosen = questions(clip, random.Random(0), count, tasks=tasks)
    return clip, chosen, batch_maker(NANO).pack([clip], [chosen])


#: Clips that support questions about the order of two objects.
ORDERED = [s for s in range(12) if questions(make_clip(s, frames=10, objects=4), random.Random(0), 1, tasks=["order"])]


def shown_frames(batch, pointer):
    """The frames whose visual tokens a pointer names."""
    layout, cells = batch.layout, range(batch.layout.cells)
    return [
        frame
        for frame in range(layout.frames)
        if any(start <= layout.visual(frame) + cell < stop for start, stop in pointer.spans for cell in cells)
    ]


def test_the_layout_finds_the_visual_tokens():
    _, _, batch = packed(3, ["ground"])
    layout, pad = batch.layout, batch_maker(NANO).video_pad
    for frame in range(layout.frames):
        first = layout.visual(frame)
        assert (batch.trunk_ids[0, first : first + layout.cells] == pad).all()
        assert batch.trunk_ids[0, first - 1] != pad
        assert batch.trunk_ids[0, layout.after(frame)] != pad
    assert layout.length == batch.trunk_ids.shape[1]


@pytest.mark.parametrize("seed", range(5))
def test_the_time_of_a_question_points_at_its_frame(seed):
    clip, chosen, batch = packed(seed, ["list_at", "count_at"])
    pointers = [pointer for pointer in batch.pointers if pointer.kind == "time"]
    assert len(pointers) == len(chosen) > 2
    for pointer, question in zip(pointers, chosen, strict=True):
        text = batch_maker(NANO).tokenizer.decode(batch.tail_ids[0, pointer.place - 1 : pointer.place + 1].tolist())
        assert text in question.text
        assert clip.timestamps[pointer.frame] == float(text)
        assert shown_frames(batch, pointer) == [pointer.frame]


@pytest.mark.parametrize("seed", range(5))
def test_names_point_at_the_first_and_the_last_frame_of_their_object(seed):
    clip, chosen, batch = packed(seed, ["ground", "order"])
    assert chosen
    names = {thing.name: thing for thing in clip.scene.objects}
    names_seen = set()
    for pointer in batch.pointers:
        if pointer.kind not in ("first", "last"):
            continue
        name = batch_maker(NANO).tokenizer.decode(batch.tail_ids[0, pointer.place - 1 : pointer.place + 1].tolist())
        thing = names[name.strip()]
        assert pointer.frame == (thing.first if pointer.kind == "first" else thing.last)
        assert pointer.frame in shown_frames(batch, pointer)
        names_seen.add(name.strip())
    assert names_seen == {name for name in names if any(name in question.text for question in chosen)}


@pytest.mark.parametrize("seed", range(5))
def test_times_of_answers_point_at_their_frames(seed):
    clip, chosen, batch = packed(seed, ["ground", "start", "end"])
    tokenizer = batch_maker(NANO).tokenizer
    count = 0
    for pointer in batch.pointers:
        if pointer.kind not in ("start", "end"):
            continue
        target = int(batch.labels[0, pointer.place])
        text = f"{clip.timestamps[pointer.frame]:.1f}"
        assert tokenizer.decode([target]) in (text[:-2], text[-2:])
        answer = next(a for a in batch.answers if a.start <= pointer.place < a.stop)
        assert text in answer.question.answer
        if answer.question.task in ("start", "end"):
            assert pointer.kind == answer.question.task
        count += 1
    assert count == 2 * sum(question.answer.count(".") for question in chosen)


def test_letters_point_at_the_cells_that_show_them():
    checked = 0
    for seed in range(12):
        clip, chosen, batch = packed(seed, ["read"], text_chance=1.0)
        labels = dense_labels(clip, clip.scene.text.intervals[0][0])
        pointers, text = [p for p in batch.pointers if p.kind == "letter"], chosen[0].answer
        assert len(pointers) == (1 if text.isdigit() else len(text))
        for index, pointer in enumerate(pointers):
            cells = [start - batch.layout.visual(pointer.frame) for start, _ in pointer.spans]
            first_frame = {cell for cell in cells if cell < batch.layout.cells}
            letters = {int(letter) for cell in first_frame for letter in labels.letters.reshape(-1, 2)[cell]}
            assert {CHARACTER_IDS[letter] for letter in (text if text.isdigit() else text[index])} <= letters
            assert all(stop == start + 1 for start, stop in pointer.spans)
            checked += 1
    assert checked > 20


def test_events_are_the_changes_from_frame_to_frame():
    clips = [make_clip(seed, frames=9, objects=4) for seed in range(6)]
    events = events_of(clips)
    seen, appeared, vanished = np.moveaxis(events.pairs, 2, 0)
    for row, clip in enumerate(clips):
        for frame in range(clip.frames):
            pairs = {(thing.color_at(frame), thing.shape) for thing in clip.scene.visible_objects(frame)}
            assert {(list(COLORS)[c], SHAPES[s]) for c, s in np.argwhere(seen[row, frame])} == pairs
    assert (appeared[:, 0] == seen[:, 0]).all()
    assert not vanished[:, 0].any()
    assert (seen[:, 1:] == ((seen[:, :-1] & ~vanished[:, 1:]) | appeared[:, 1:])).all()
    assert events.text.any()
    assert len({int(color) for color in events.background.flatten()}) > 2


@pytest.mark.parametrize("seed", ORDERED)
def test_the_order_of_two_objects_points_at_the_first_frame_of_the_earlier(seed):
    clip, chosen, batch = packed(seed, ["order"])
    pointers = [pointer for pointer in batch.pointers if pointer.kind == "start"]
    for answer in batch.answers:
        frames = [pointer.frame for pointer in pointers if answer.start <= pointer.place < answer.stop]
        named = [thing.first for thing in clip.scene.objects if thing.name in answer.question.text]
        assert len(named) == 2
        assert frames == [min(named)] * (answer.stop - answer.start - 1)
    assert len(batch.comparisons) == len(batch.answers)
    for compared, question in zip(batch.comparisons, chosen, strict=True):
        first, second = sorted(
            (thing for thing in clip.scene.objects if thing.name in question.text),
            key=lambda thing: question.text.index(thing.name),
        )
        head = batch.tail_ids[0, compared.place - 1 : compared.place + 1].tolist()
        assert batch_maker(NANO).tokenizer.decode(head).strip() == second.name
        assert compared.later == (second.first > first.first)


def batches_about(task, seeds=range(40)):
    """Clips, questions and batches of clips that support questions of `task`."""
    for seed in seeds:
        if questions(make_clip(seed, frames=10, objects=4), random.Random(0), 1, tasks=[task]):
            yield packed(seed, [task])


def name_at(batch, place):
    """The name that ends at a place of the tail of the first sequence."""
    return batch_maker(NANO).tokenizer.decode(batch.tail_ids[0, place - 1 : place + 1].tolist()).strip()


def shown_name(clip, batch, frame, span):
    """The object whose centre lies in the cell of a visual token."""
    labels = dense_labels(clip, frame)
    row, column = divmod(span[0] - batch.layout.visual(frame), batch.layout.columns)
    return f"{list(COLORS)[labels.color[row, column] - 1]} {SHAPES[labels.shape[row, column] - 1]}"


def test_places_point_at_the_cell_of_their_object():
    checked = 0
    for clip, chosen, batch in batches_about("place"):
        pointers = [pointer for pointer in batch.pointers if pointer.kind == "place"]
        findings = [finding for finding in batch.findings if finding.kind == "place" and not finding.answers]
        assert [f.place for f in batch.findings if f.answers] == [answer.start for answer in batch.answers]
        for pointer, finding, answer, question in zip(pointers, findings, batch.answers, chosen, strict=True):
            assert shown_name(clip, batch, pointer.frame, pointer.spans[0]) in question.text
            assert f"{clip.timestamps[pointer.frame]:.1f} s" in question.text
            assert pointer.place == finding.place < answer.start
            horizontal = question.answer in ("left", "right")
            assert (finding.values[not horizontal] > 0) == (question.answer in ("right", "bottom"))
            checked += 1
    assert checked > 50


def test_names_point_at_the_cells_of_their_object_and_know_its_size():
    checked = 0
    for clip, chosen, batch in batches_about("size"):
        pointers = [pointer for pointer in batch.pointers if pointer.kind == "seen"]
        findings = [finding for finding in batch.findings if not finding.answers]
        for pointer, finding, question in zip(pointers, findings, chosen, strict=True):
            assert pointer.place == finding.place
            name = name_at(batch, pointer.place)
            assert name in question.text
            (thing,) = [thing for thing in clip.scene.objects if thing.name == name]
            assert shown_frames(batch, pointer) == [f for f in range(clip.frames) if thing.visible(f)]
            assert shown_name(clip, batch, pointer.frame, pointer.spans[0]) == name
            assert {-1.0: "small", 1.0: "big"}[finding.values[0]] == question.answer
            checked += 1
    assert checked > 10


def test_directions_are_known_by_names_and_by_cells_that_point_at_where_their_object_came_from():
    signs = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}
    checked = 0
    for clip, chosen, batch in batches_about("direction"):
        findings = [finding for finding in batch.findings if finding.kind == "direction" and not finding.answers]
        for finding, question in zip(findings, chosen, strict=True):
            (thing,) = [thing for thing in clip.scene.objects if thing.name == name_at(batch, finding.place)]
            assert thing.name in question.text
            axis, sign = signs[question.answer]
            assert finding.values[axis] * sign > 0.2
            assert abs(finding.values[1 - axis]) < 1e-6
            cells = {batch.layout.cell(clip, thing, f)[0]: f for f in range(thing.first + 1, thing.last + 1)}
            own = [p for p in batch.pointers if p.kind == "origin" and p.place + batch.layout.length in cells]
            assert len(own) == len(cells)
            assert {shown_name(clip, batch, thing.first, pointer.spans[0]) for pointer in own} == {thing.name}
            checked += 1
    assert checked > 10


def test_the_token_after_a_frame_looks_at_that_after_the_frame_before():
    _, _, batch = packed(5, ["presence"])
    pointers = [pointer for pointer in batch.pointers if pointer.kind == "before"]
    assert [pointer.frame for pointer in pointers] == list(range(9))
    for pointer in pointers:
        assert pointer.place + batch.layout.length == batch.layout.after(pointer.frame + 1)
        assert pointer.spans == ((batch.layout.after(pointer.frame), batch.layout.after(pointer.frame) + 1),)


def test_names_that_are_counted_point_at_the_last_appearance():
    answers = set()
    for clip, chosen, batch in batches_about("times"):
        pointers = [pointer for pointer in batch.pointers if pointer.kind == "again"]
        findings = [finding for finding in batch.findings if finding.kind == "times" and not finding.answers]
        for pointer, finding, question in zip(pointers, findings, chosen, strict=True):
            thing = next(thing for thing in clip.scene.objects if thing.name in question.text)
            assert pointer.frame == thing.intervals[-1][0]
            assert shown_name(clip, batch, pointer.frame, pointer.spans[0]) == thing.name
            assert shown_frames(batch, pointer) == list(range(pointer.frame, thing.last + 1))
            assert finding.values == ((1.0 if question.answer == "2" else -1.0),)
            sighted = batch.sightings.places[:, 1] == pointer.spans[0][0]
            assert (batch.sightings.values[sighted, 3] == finding.values).all()
            answers.add(question.answer)
    assert answers == {"1", "2"}


def test_sightings_are_the_centres_of_the_visible_objects():
    clip, _, batch = packed(5, ["presence"])
    places, values = batch.sightings.places, batch.sightings.values
    assert len(places) == sum(len(clip.scene.visible_objects(frame)) for frame in range(clip.frames))
    labels = [dense_labels(clip, frame) for frame in range(clip.frames)]
    for (row, place), (x, y, big, _, right, down) in zip(places, values, strict=True):
        assert row == 0
        frame = next(f for f in range(clip.frames) if 0 <= place - batch.layout.visual(f) < batch.layout.cells)
        cell_row, cell_column = divmod(int(place) - batch.layout.visual(frame), batch.layout.columns)
        assert labels[frame].size[cell_row, cell_column] in (0, 1 + (big > 0))
        assert (cell_column, cell_row) == (int((x + 1) / 2 * 4), int((y + 1) / 2 * 4))
        (thing,) = [t for t in clip.scene.visible_objects(frame) if batch.layout.cell(clip, t, frame)[0] == place]
        signs = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.get(thing.motion, (0, 0))
        assert np.sign((right, down)).tolist() == list(signs if frame > thing.first else (0, 0))


def test_times_of_a_reasoning_point_at_their_frames():
    maker, checked = batch_maker(NANO), 0
    for seed in range(20):
        clip = make_clip(seed, frames=10, objects=4)
        chosen = questions(clip, random.Random(0), 12, tasks=["count", "order", "times"])
        forms = [choose_form(clip, question, 1.0, random.Random(2)) for question in chosen]
        batch = maker.pack([clip], [chosen], forms=[forms])
        for answer, form in zip(batch.answers, forms, strict=True):
            assert form.opening == THOUGHT
            reply = [*batch.labels[0, answer.start : answer.stop - 1].tolist()]
            assert maker.tokenizer.decode(reply) == form.reply
            assert maker.end == batch.labels[0, answer.stop - 1 : answer.stop].tolist()
        for pointer in batch.pointers:
            if pointer.kind in ("start", "end") and pointer.place >= 0:
                text = f"{clip.timestamps[pointer.frame]:.1f}"
                assert maker.tokenizer.decode([int(batch.labels[0, pointer.place])]) in (text[:-2], text[-2:])
                checked += 1
    assert checked > 50
