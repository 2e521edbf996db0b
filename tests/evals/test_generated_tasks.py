"""Needles and groups of questions in generated videos: where the needle is, what counts, and how groups score."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import av
import pytest

from keye.data.frameforge.probes import NEEDLE_FRAMES, STEP, STRUCTURES, make_group, make_needle
from keye.errors import KeyeError
from keye.evals.task import EvalItem, ScoredItem, TaskSettings, find_task
from keye.evals.tasks.generated import FrameGroups, NeedleVideo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generated")


NEEDLE = NeedleVideo(lengths=(16, 24), depths=(0.0, 0.5, 1.0))
GROUPS = FrameGroups(clips=1, frames=128)


def items_of(task: NeedleVideo | FrameGroups, folder: Path) -> list[EvalItem]:
    return list(task.read(folder, TaskSettings()))


def scored(task: FrameGroups, items: list[EvalItem], right: object) -> list[ScoredItem]:
    return [
        ScoredItem(item, "x", float(right(item.document["place"])))  # type: ignore[operator]
        for item in items
    ]


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("frames", [8, 33, 300])
def test_the_needle_lies_at_its_depth_and_nothing_else_has_its_name(frames: int, depth: float) -> None:
    probe = make_needle(3, frames=frames, depth=depth)
    scene = probe.clip.scene
    needle = scene.objects[-1]
    begin = round(depth * (frames - NEEDLE_FRAMES))
    assert needle.intervals == ((begin, begin + NEEDLE_FRAMES - 1),) == scene.text.intervals
    assert needle.name not in [thing.name for thing in scene.objects[:-1]]
    when, word = probe.questions
    assert when.intervals == ((begin * STEP, (begin + NEEDLE_FRAMES - 1) * STEP),) and needle.name in when.text
    assert word.answer == scene.text.content
    assert make_needle(3, frames=frames, depth=depth) == probe != make_needle(4, frames=frames, depth=depth)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_group_has_four_questions_whose_answers_hold(structure: str) -> None:
    for seed in range(4):
        probe = make_group(seed, structure, frames=128)
        things = {thing.name: thing for thing in probe.clip.scene.objects}
        assert len(probe.questions) == 4 and len({question.text for question in probe.questions}) == 4
        for question in probe.questions:
            named = [thing for name, thing in things.items() if name in question.text]
            if question.task == "presence":
                assert question.answer == ("yes" if named else "no")
            elif question.task == "start":
                assert question.answer == f"{named[0].first * STEP:.1f} seconds"
            elif question.task == "order":
                assert question.answer == min(named, key=lambda thing: thing.first).name


def test_arguments_out_of_range_are_named() -> None:
    with pytest.raises(KeyeError, match="frames is 7"):
        make_needle(0, frames=7, depth=0.5)
    with pytest.raises(KeyeError, match="depth is 2"):
        make_needle(0, frames=16, depth=2)
    with pytest.raises(KeyeError, match="structure is"):
        make_group(0, "[4]", frames=128)


def test_videos_are_written_when_the_task_is_read_and_kept(tmp_path: Path) -> None:
    first = items_of(NEEDLE, tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
    assert len(first) == 12 and len(files) == 6 and len({item.id for item in first}) == 12
    with av.open(str(next(iter(files)))) as container:
        assert sum(1 for _ in container.decode(video=0)) in (16, 24)
    assert items_of(NEEDLE, tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert json.loads(json.dumps(first[0].document)) == first[0].document  # survives the journal


@pytest.mark.parametrize(("reply", "score"), [
    ("[[{0:.1f}, {1:.1f}]]", 1), ("It is seen from {0:.1f} to {1:.1f} seconds.", 1), ("[[100.0, 101.0]]", 0), ("", 0),
    ("<think>from {0:.1f} to {1:.1f} s? no</think>[]", 0), ("[[0.0, 200.0]]", 0),
])  # fmt: skip
def test_a_needle_is_found_by_enough_overlap(folder: Path, reply: str, score: int) -> None:
    item = next(item for item in items_of(NEEDLE, folder) if item.document["spans"])
    assert NEEDLE.score(item.document, reply.format(*item.document["spans"][0])).score == score


def test_words_times_and_yes_or_no_are_read(folder: Path) -> None:
    word = items_of(NEEDLE, folder)[1]
    assert NEEDLE.score(word.document, word.document["answer"].lower()).score == 1
    assert NEEDLE.score(word.document, "nothing").score == 0
    time = {"kind": "start", "answer": "12.5 seconds", "spans": None}
    assert [GROUPS.score(time, text).score for text in ("14.5 seconds", "At 11 s.", "15 seconds", "never")] == [
        1,
        1,
        0,
        0,
    ]
    there = {"kind": "presence", "answer": "no", "spans": None}
    assert [GROUPS.score(there, text).score for text in ("no", "No, it is not.", "yes", "")] == [1, 1, 0, 0]


def test_groups_score_by_the_rule_of_video_mme_v2(folder: Path) -> None:
    items = items_of(GROUPS, folder)
    assert [item.labels["group"] for item in items[::4]] == list(STRUCTURES)
    assert GROUPS.summarise(scored(GROUPS, items, lambda place: 1)).value == 100
    first_two = GROUPS.summarise(scored(GROUPS, items, lambda place: place <= 2))
    assert first_two.value == pytest.approx((25 + 25 + 400 / 12 + 20) / 4)
    assert first_two.parts["measure"] == {"accuracy": 50.0, "Non-Lin": pytest.approx(first_two.value)}
    last_two = GROUPS.summarise(scored(GROUPS, items, lambda place: place > 2))
    assert last_two.value == pytest.approx(25 / 4)  # of chains that begin with a mistake nothing counts


def test_a_missing_question_counts_as_wrong_and_moves_no_group(folder: Path) -> None:
    items = items_of(GROUPS, folder)
    rows = scored(GROUPS, items, lambda place: 1)
    without = GROUPS.summarise([row for row in rows if row.item is not items[3]])
    wrong = GROUPS.summarise([replace(row, score=0.0) if row.item is items[3] else row for row in rows])
    shuffled = GROUPS.summarise(list(itertools.chain(reversed(rows[:7]), rows[7:])))
    assert without.value == wrong.value == pytest.approx((56.25 + 300) / 4) and shuffled.value == 100
    assert GROUPS.summarise([]).value is None


def test_the_tasks_are_known_by_name() -> None:
    assert find_task("needle_video").dimension == "Video" == find_task("frame-groups").dimension
