"""Tasks read public layouts, say what is missing, and score by their stated rules."""

import json

import pytest

from keye.errors import KeyeError
from keye.evals.task import ScoredItem, TaskSettings, find_task, find_tasks, list_tasks
from keye.scoring.official.registry import list_implementations
from tests.evals.layouts import LAYOUTS, write_parquet, write_table, write_video
from tests.support.task_table import DOCS, with_current_table


def read(task, folder, **settings):
    return list(find_task(task).read(folder, TaskSettings(**settings)))


def score_all(task, items, replies):
    task = find_task(task)
    return [
        ScoredItem(item, reply, task.score(item.document, reply).score, error=None)
        for item, reply in zip(items, replies, strict=True)
    ]


@pytest.fixture
def charades(tmp_path):
    rows = {
        "AAA": {"duration": 30.0, "spans": [[1.0, 5.0], [4, 4]], "queries": ["a man runs.", "a flash"]},
        "BBB": {"duration": 90.0, "spans": [[10.0, 20.0]], "queries": ["the door opens"]},
    }
    (tmp_path / "charades-timelens.json").write_text(json.dumps(rows))
    write_video(tmp_path / "videos" / "charades" / "AAA.mp4")
    return tmp_path


def test_grounding_reads_the_authors_layout(charades):
    items = read("timelens_charades", charades)
    assert [item.cluster for item in items] == ["AAA", "AAA", "BBB"]
    assert items[0].content[0] == {"type": "video", "video": str(charades / "videos" / "charades" / "AAA.mp4")}
    assert "'a man runs'" in items[0].content[1]["text"]
    assert items[0].document == {"video": "AAA", "query": "a man runs", "span": [1.0, 5.0], "duration": 30.0}


def test_grounding_scores_intersection_over_union(charades):
    items = read("timelens_charades", charades)
    replies = ["The event happens in 3.0 - 7.0 seconds.", "4.0 - 4.0 seconds", "no idea"]
    summary = find_task("timelens_charades").summarise(score_all("timelens_charades", items, replies))
    assert summary.value == pytest.approx(100 * (2 / 6 + 1 + 0) / 3)
    assert summary.parts["recall"]["R1@0.5"] == pytest.approx(100 / 3)


def test_check_names_missing_media_and_counts(charades):
    report = find_task("timelens_charades").check(charades)
    assert report.missing_media == (str(charades / "videos" / "BBB.mp4"),)
    assert report.counts["items"] == 3
    assert report.expected["items"] == 3363
    assert not report.is_complete


def test_check_names_missing_columns(tmp_path):
    (tmp_path / "charades.jsonl").write_text(json.dumps({"video_path": "a.mp4", "query": "x"}) + "\n")
    report = find_task("timelens_charades").check(tmp_path)
    assert report.missing_fields == ("span",)
    with pytest.raises(KeyeError, match="charades.jsonl:1 lacks span"):
        read("timelens_charades", tmp_path)


def test_repeated_rows_count_again(tmp_path):
    row = {"video_path": "a.mp4", "query": "x", "span": [[1, 2]]}
    (tmp_path / "charades.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    assert len({item.id for item in read("timelens_charades", tmp_path)}) == 2
    assert "1 rows repeat" in find_task("timelens_charades").check(tmp_path).notes[0]


def test_videomme_reads_parquet(tmp_path):
    row = {
        "videoID": "v1", "question_id": "001-1", "duration": "short", "domain": "Knowledge", "sub_category": "Law",
        "task_type": "OCR", "question": "What?", "options": ["A. red", "B. blue", "C. green", "D. grey"], "answer": "C",
    }  # fmt: skip
    write_parquet(
        tmp_path / "videomme" / "test-00000-of-00001.parquet", [row, {**row, "question_id": "001-2", "answer": ""}]
    )
    items = read("videomme", tmp_path)
    assert [item.has_gold for item in items] == [True, False]
    assert items[0].content[1]["text"].splitlines()[:3] == ["What?", "A. red", "B. blue"]
    summary = find_task("videomme").summarise(score_all("videomme", items, ["It is (C).", "A"]))
    assert (summary.value, summary.n) == (100.0, 1)
    assert "1 items have no gold answer" in summary.notes[0]


def test_unknown_task_names_the_nearest():
    with pytest.raises(KeyeError, match="did you mean videomme"):
        find_task("videome")
    assert len(find_tasks("timelens")) == 3


def test_every_task_states_what_it_is():
    for task in list_tasks():
        assert task.title, task.name
        assert task.measures, task.name
        assert task.source, task.name
        assert task.licence, task.name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.task} {layout.table}")
def test_public_layout(layout, tmp_path):
    write_table(tmp_path / layout.table, layout.rows)
    items = read(layout.task, tmp_path)
    task = find_task(layout.task)
    assert len(items) == len(layout.replies)
    for item, replies in zip(items, layout.replies, strict=True):
        assert item.has_gold
        assert item.content[-1]["text"].strip()
        for reply, score in replies:
            assert task.score(item.document, reply).score == pytest.approx(score), reply
        for scorer in task.scorers:
            task.score_with(scorer, item.document, replies[0][0])
    replies = [replies[0][0] for replies in layout.replies]
    for scorer in task.scorers:
        scores = [task.score_with(scorer, item.document, reply) for item, reply in zip(items, replies, strict=True)]
        rows = [
            ScoredItem(item, reply, score.score, score.extracted)
            for item, reply, score in zip(items, replies, scores, strict=True)
        ]
        metrics = task.official_metrics(scorer, rows)
        has_metrics = scorer in list_implementations(task.scored_as or task.name, "aggregate")
        assert bool(metrics) == has_metrics, scorer
        assert task.official_metrics(scorer, [*rows, ScoredItem(items[0], None, 0.0)]) == {}
    summary = task.summarise(score_all(layout.task, items, replies))
    assert summary.value == pytest.approx(layout.headline)
    report = task.check(tmp_path)
    assert report.counts["items"] == len(items)
    assert not report.missing_fields
    assert all("media files are missing" in problem or "were published" in problem for problem in report.problems)


def test_documented_table_is_current():
    text = DOCS.read_text(encoding="utf-8")
    assert text == with_current_table(text), "run: python -m tests.support.task_table"
