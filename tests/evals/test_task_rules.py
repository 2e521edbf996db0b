"""Stated rules for rows that are not as published: incomplete groups, repeated rows, empty answers, spans of no length;
and tasks of users."""

import base64
import json

import pytest

from keye.errors import KeyeError
from keye.evals.choices import split_options
from keye.evals.data.files import parse_list
from keye.evals.settings import RunSettings, build_lines
from keye.evals.task import EvalItem, ItemScore, ScoredItem, Task, TaskSettings, find_task, list_tasks
from keye.evals.tasks.videomme_v2 import score_group
from keye.scoring.strict.calls import find_calls, match_calls
from tests.evals.layouts import EIGHT, PNG, write_parquet, write_table, write_video


def scored(document, score, *, name="001-1", cluster="001", labels=None, has_gold=True):
    item = EvalItem(name, cluster, (), document, labels or {}, has_gold=has_gold)
    return ScoredItem(item, "x", score)


def group(video, scores, kind="relevance", structure="None", numbers=(1, 2, 3, 4)):
    document = {"group_type": kind, "group_structure": structure}
    return [
        scored(document, score, name=f"{video}-{number}", cluster=video, labels={"level": str(number)})
        for number, score in zip(numbers, scores, strict=True)
    ]


@pytest.mark.parametrize(
    ("kind", "structure", "right", "points"),
    [
        ("relevance", "None", [0, 1, 0, 1], 25), ("logic", "[1, 2, 3, 4]", [1, 1, 0, 1], 25),
        ("logic", "[1, [2, 3], 4]", [1, 0, 1, 1], 400 / 12), ("logic", "[[1, 2], 3, 4]", [0, 1, 0, 0], 10),
        ("logic", "[[1,2],3,4]", [1, 1, 1, 0], 50),
    ],
)  # fmt: skip
def test_group_points(kind, structure, right, points):
    document = {"group_type": kind, "group_structure": structure}
    assert score_group(document, [bool(value) for value in right]) == pytest.approx(points)


def test_incomplete_groups_have_no_points_and_are_named():
    task = find_task("videomme_v2")
    complete = group("001", (1, 1, 0, 0))
    for other in (group("002", (1, 1, 1), numbers=(2, 3, 4)), group("002", (1, 1, 1, 1), numbers=(1, 2, 2, 4))):
        summary = task.summarise([*other, *complete])
        assert summary.value == pytest.approx(25)
        assert "1 groups do not have each of four questions once" in summary.notes[0]


def test_order_of_rows_does_not_change_groups():
    rows = [*group("001", (1, 1, 0, 0)), *group("002", (1, 0, 0, 0), "logic", "[1, 2, 3, 4]")]
    task = find_task("videomme_v2")
    assert task.summarise(rows).value == task.summarise(rows[::-1]).value == pytest.approx((25 + 6.25) / 2)


def test_videomme_v2_reads_its_parquet(tmp_path):
    rows = [
        {"video_id": "001", "question_id": f"001-{number}", "group_type": "logic", "group_structure": "[1, 2, 3, 4]",
         "question": "What?", "options": EIGHT, "answer": "G", "level": 1, "second_head": "a", "third_head": "b"}
        for number in (1, 2, 3, 4)
    ]  # fmt: skip
    write_parquet(tmp_path / "test.parquet", rows)
    (tmp_path / "subtitle").mkdir()
    (tmp_path / "subtitle" / "001.jsonl").write_text('{"text": "good"}\n{"text": "morning"}\n')
    task = find_task("videomme_v2")
    items = list(task.read(tmp_path, TaskSettings(subtitles=True)))
    assert "good morning" in items[0].content[-1]["text"]
    assert task.score(items[0].document, "Based on the video, the answer is G.").score == 1
    assert task.score_with("video-mme-v2-b24176a", items[0].document, "Based on the video, the answer is G.").score == 0


def test_wemath_problem_that_lacks_a_question_is_left_out():
    rows = [
        scored({"ID": problem, "key": f"2steps_{key}"}, 1.0, name=f"{problem}{key}")
        for problem, keys in (("a", ("1", "2", "multi")), ("b", ("1", "2")))
        for key in keys
    ]
    summary = find_task("wemath").summarise(rows)
    assert summary.value == 100
    assert "1 problems lack questions" in summary.notes[0]


def test_span_of_no_length():
    task = find_task("timelens_charades")
    document = {"span": [5.0, 5.0], "duration": 60.0}
    assert task.score(document, "5.0 - 5.0 seconds").score == 1
    assert task.score(document, "4.0 - 6.0 seconds").score == 0
    assert task.score({"span": [4.0, 6.0]}, "5.0 - 5.0 seconds").score == 0


@pytest.mark.parametrize("span", [None, [[9.0, 2.0]], []])
def test_span_that_is_none_is_asked_and_not_counted(tmp_path, span):
    write_table(tmp_path / "charades.jsonl", [{"video_path": "a.mp4", "query": "x", "span": span}])
    (item,) = find_task("timelens_charades").read(tmp_path, TaskSettings())
    assert not item.has_gold
    assert "no gold answer" in find_task("timelens_charades").check(tmp_path).notes[0]


def test_subtitles_are_interleaved_with_frames(tmp_path):
    row = {
        "id": "x_0", "video_path": "x.mp4", "subtitle_path": "x_en.json", "question": "Who?", "candidates": ["a", "b"],
        "correct_choice": 1, "duration_group": 15, "question_category": "S2E", "duration": 40.0,
        "starting_timestamp_for_subtitles": 12.5,
    }  # fmt: skip
    write_table(tmp_path / "lvb_val.json", [row])
    lines = [{"timestamp": [15.33, 18.16], "text": "line0"}, {"timestamp": [19.4, None], "text": "line2"}]
    (tmp_path / "subtitles").mkdir()
    (tmp_path / "subtitles" / "x_en.json").write_text(json.dumps(lines))
    (item,) = find_task("longvideobench_i").read(tmp_path, TaskSettings(frames=8))
    shape = [part.get("text", part.get("nframes")) for part in item.content[:-1]]
    assert shape == [1, "line0", 3, "line2", 4]
    assert item.content[0] | {"video": ""} == {
        "type": "video", "video": "", "video_start": 0.0, "video_end": 5.0, "nframes": 1,
    }  # fmt: skip


def test_pictures_inside_tables(tmp_path):
    cell = base64.b64encode(PNG + bytes(200_000)).decode()
    row = {
        "index": 1,
        "question": "What?",
        "hint": "",
        "A": "red",
        "B": "blue",
        "answer": "A",
        "category": "x",
        "image": cell,
    }
    write_table(tmp_path / "MMBench_DEV_EN.tsv", [row])
    task = find_task("mmbench")
    assert task.check(tmp_path).counts["items"] == 1
    assert not (tmp_path / "keye-media").exists()
    (item,) = task.read(tmp_path, TaskSettings(scratch=tmp_path / "scratch"))
    path = item.content[0]["image"]
    assert path.startswith(str(tmp_path / "scratch"))
    with open(path, "rb") as file:
        assert file.read(4) == b"\x89PNG"


def test_stretches_between_subtitles_share_the_frames_of_the_run(tmp_path):
    path = tmp_path / "x.mp4"
    write_video(path)
    part = {"type": "video", "video": str(path), "video_start": 0.0, "video_end": 5.0, "nframes": 3}
    item = EvalItem("1", "1", (part, {"type": "video", "video": str(path)}), {"answer": "A"})
    (line,) = build_lines([item], RunSettings(media={"nframes": 64}), None)
    assert [part["nframes"] for part in line.body["messages"][0]["content"]] == [3, 64]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd"])
def test_media_outside_the_folder_are_not_named(tmp_path, name):
    write_table(tmp_path / "charades.jsonl", [{"video_path": name, "query": "x", "span": [[1.0, 2.0]]}])
    (item,) = find_task("timelens_charades").read(tmp_path, TaskSettings())
    assert item.content[0]["video"].startswith(str(tmp_path))


@pytest.mark.parametrize("text", ["__import__('os')", "[" * 40 + "]" * 40, "(1", "", "[1" + ", 1" * 100_000 + "]"])
def test_lists_in_cells_are_bounded_and_never_run(text):
    with pytest.raises(KeyeError, match="options"):
        parse_list(text, "options")


@pytest.mark.parametrize(
    ("text", "stem", "options"),
    [
        ("What?\n(A) red\n(B) blue", "What?", ["red", "blue"]),
        ("What? Options: A: red, B: blue, C: green", "What?", ["red", "blue", "green"]),
        ("What?\nA. 1. first\nB. 2. second\nAnswer with a letter.", "What?", ["1. first", "2. second"]),
        ("Is plan A. better than plan B?", "Is plan A. better than plan B?", []),
        ("A. 3; B. 4; C. 5", "", ["3", "4", "5"]),
    ],
)
def test_options_inside_questions(text, stem, options):
    assert split_options(text) == (stem, options)


def test_data_in_two_formats_are_read_once(tmp_path):
    row = {"video_path": "a.mp4", "query": "x", "span": [[1.0, 2.0]]}
    write_table(tmp_path / "charades.jsonl", [row])
    write_table(tmp_path / "charades.json", [row])
    assert len(list(find_task("timelens_charades").read(tmp_path, TaskSettings()))) == 1


def test_broken_row_is_named(tmp_path):
    (tmp_path / "charades.jsonl").write_text('{"video_path": "a.mp4", "query": "x", "span": [[1, 2]]}\n{"video_path"\n')
    report = find_task("timelens_charades").check(tmp_path)
    assert "charades.jsonl:2" in report.problems[0]
    assert report.counts["items"] == 1
    with pytest.raises(KeyeError, match=r"charades\.jsonl:2"):
        list(find_task("timelens_charades").read(tmp_path, TaskSettings()))


def test_row_of_a_table_of_predictions():
    item = find_task("mmbench").item_of(
        {"index": "7", "question": "What?", "A": "red", "B": "blue", "answer": "B", "category": "x", "image": "x"}, 0
    )
    assert (item.id, item.document["options"], item.document["answer"]) == ("7", ["red", "blue"], "B")
    item = find_task("mmstar").item_of(
        {"index": 1, "question": "What?", "A": "red", "B": "blue", "answer": "A", "category": "x", "l2_category": "y"},
        0,
    )
    assert item.labels == {"category": "x", "l2 category": "y"}
    with pytest.raises(KeyeError, match="row 4 lacks question"):
        find_task("realworldqa").item_of({"image": "x", "answer": "A"}, 3)


USER_TASK = """
from keye.evals.settings import RunSettings, build_lines
from keye.evals.task import EvalItem, ItemScore, Task

class Echo(Task):
    def read(self, folder, settings):
        yield EvalItem("1", "1", ({"type": "text", "text": "Say yes."},), {"answer": "yes"})

    def score(self, document, prediction):
        return ItemScore(float(prediction == document["answer"]), prediction)

ECHO = Echo(name="echo", title="Echo", measures="repeating", source="", licence="none", media="text")
"""


def test_user_task_is_one_file(tmp_path):
    (tmp_path / "echo.py").write_text(USER_TASK)
    task = find_task(f"{tmp_path / 'echo.py'}:ECHO")
    (item,) = task.read(tmp_path, TaskSettings())
    assert task.score(item.document, "yes") == ItemScore(1.0, "yes")
    assert task.scorers == ("strict",)
    assert task.check(tmp_path).is_complete
    for name, sentence in (
        ("echo.py:NONE", "has no NONE"),
        ("echo.py:Echo", "give an instance"),
        ("x.py:A", "not a file"),
    ):
        with pytest.raises(KeyeError, match=sentence):
            find_task(str(tmp_path / name))


def test_task_of_a_package(monkeypatch):
    class Offer:
        name = "echo"

        def load(self):
            scope: dict[str, object] = {}
            exec(USER_TASK, scope)
            return scope["ECHO"]

    monkeypatch.setattr("keye.evals.task.entry_points", lambda group: [Offer()] if group == "keye.tasks" else [])
    assert isinstance(find_task("echo"), Task)
    assert "echo" in [task.name for task in list_tasks()]


def test_unavailable_task_says_why(tmp_path):
    task = find_task("livecodebench")
    assert "sandbox" in task.available
    with pytest.raises(KeyeError, match="cannot be run yet"):
        list(task.read(tmp_path, TaskSettings()))


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("[f(a=1), g.h(b='x')]", [{"f": {"a": 1}}, {"g.h": {"b": "x"}}]),
        ('<think>f(a=2)</think><tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', [{"f": {"a": 1}}]),
        ("```python\n[f(a=[1, 2])]\n```", [{"f": {"a": [1, 2]}}]),
        ('{"function": {"name": "f", "arguments": "{\\"a\\": 1}"}}', [{"f": {"a": 1}}]),
        ("Here you are: [f(a=1)]", [{"f": {"a": 1}}]), ("[]", []), ("I cannot.", None), ("f(1)", None),
        ("f(a=open('x'))", None), ("(" * 5000, None),
    ],
)  # fmt: skip
def test_calls_in_replies(text, calls):
    assert find_calls(text) == calls


@pytest.mark.parametrize(
    ("calls", "is_right"),
    [
        ([{"f": {"a": 1.0}}], True), ([{"f": {"a": 1, "b": "./A"}}], True), ([{"f": {"a": 1, "b": "A"}}], False),
        ([{"f": {"a": True}}], False), ([{"f": {"b": "./a"}}], False), ([{"f": {"a": 1}}] * 2, False), ([], False),
    ],
)  # fmt: skip
def test_calls_are_compared_as_they_are(calls, is_right):
    assert match_calls(calls, [{"f": {"a": [1], "b": ["./a", ""]}}]) is is_right
