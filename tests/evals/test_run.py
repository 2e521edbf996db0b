"""A run of a task: what is asked, what is kept, what a failed item counts, and what a second run does."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from keye.batch.manifest import Item
from keye.batch.workers import Answer, WorkerLost
from keye.errors import KeyeError
from keye.evals.judge import Judge
from keye.evals.results.compare import compare, read_run
from keye.evals.results.result import read_result
from keye.evals.run import ModelFacts, RunOptions, run_task
from keye.evals.settings import RunSettings
from tests.evals.fake_task import TASK, FakeWorker, number_of, reply, right, write_data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", 20)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def ask(
    data: Path, out: Path, worker: FakeWorker, settings: RunSettings | None = None, *, task=TASK, **changes
) -> dict:
    options = RunOptions(lambda: [worker], changes.pop("model", ModelFacts("m", "w1")), **changes)
    return run_task(task, data, settings or RunSettings(), out, options)


def records(out: Path) -> dict[str, dict]:
    """By id; each must be there once."""
    lines = [json.loads(line) for line in (out / "letters" / "predictions.jsonl").read_text().splitlines()]
    assert max(Counter(line["id"] for line in lines).values()) == 1
    return {line["id"]: line for line in lines}


def failing(which: Callable[[int], bool]) -> Callable[[Item], Answer]:
    bad = Answer(500, {"error": {"message": "the server is out of order"}})
    return lambda item: bad if which(number_of(item)) else right(item)


def test_every_item_is_asked_once_and_scored(data: Path, out: Path) -> None:
    worker = FakeWorker(lambda item: right(item) if number_of(item) % 2 else reply("I cannot tell"))
    result = ask(data, out, worker)
    assert Counter(item.id for item in worker.requests) == Counter(f"q{n}" for n in range(20))
    strict = result["scorers"]["strict"]
    assert strict["value"] == 50.0 and strict["n"] == 20 and strict["unparsed"] == 0.5
    assert strict["interval"][0] < 50 < strict["interval"][1]
    assert strict["parts"]["half"] == {"first": 50.0, "second": 50.0}
    assert result["shares"]["failed"] == result["shares"]["missing"] == 0 and result["complete"]
    assert result["frames"] == {"mean": 8, "p50": 8, "max": 8} and result["tokens"]["prompt"]["mean"] == 100
    assert result["digests"]["weights"] == "w1" and result["digests"]["plans"]
    assert read_result(out / "letters") == json.loads(json.dumps(result))
    assert records(out)["q3"]["prediction"] == "D" and records(out)["q3"]["document"]["answer"] == "D"


def test_questions_about_a_video_follow_one_another(data: Path, out: Path) -> None:
    worker = FakeWorker(slots=1)
    ask(data, out, worker)
    videos = [item.media[0] for item in worker.requests]
    assert sum(a != b for a, b in pairwise(videos)) == 3


def test_a_second_run_asks_nothing_and_says_the_same(data: Path, out: Path) -> None:
    first = ask(data, out, FakeWorker())
    worker = FakeWorker()
    second = ask(data, out, worker)
    assert worker.requests == [] and second["asked"] == 0
    assert {**first, "seconds": 0, "asked": 0, "items_per_second": 0} == {
        **second, "seconds": 0, "asked": 0, "items_per_second": 0
    }  # fmt: skip


def test_failed_items_count_as_wrong_and_are_asked_again(data: Path, out: Path) -> None:
    result = ask(data, out, FakeWorker(failing(lambda number: number == 7)))
    assert result["scorers"]["strict"]["value"] == 95.0 and result["shares"]["failed"] == 0.05
    assert not result["complete"] and result["withheld"] is None
    assert result["errors"] == [{"count": 1, "item": "q7", "message": "the server is out of order"}]
    worker = FakeWorker()
    assert ask(data, out, worker)["scorers"]["strict"]["value"] == 100.0
    assert [item.id for item in worker.requests] == ["q7"] and len(records(out)) == 20


def test_half_of_the_requests_failing_gives_no_score(data: Path, out: Path) -> None:
    result = ask(data, out, FakeWorker(failing(lambda number: number % 2 == 0)))
    strict = result["scorers"]["strict"]
    assert (strict["value"], strict["interval"], strict["lower_bound"]) == (None, None, 50.0)
    assert "10 failed" in result["withheld"] and result["shares"]["failed"] == 0.5
    assert ask(data, out, FakeWorker())["scorers"]["strict"]["value"] == 100.0


def test_a_server_that_goes_away_leaves_what_it_answered(data: Path, out: Path) -> None:
    class Leaving(FakeWorker):
        async def start(self) -> None:
            if self.requests:
                raise WorkerLost("http://x does not answer")

    def act(item: Item) -> Answer:
        if len(worker.requests) > 6:
            raise WorkerLost("http://x does not answer", during=False)
        return right(item)

    worker = Leaving(act, slots=1)
    result = ask(data, out, worker)
    assert "run the same command again" in result["stopped"] and result["shares"]["missing"] == 0.7
    assert result["scorers"]["strict"]["value"] is None and len(records(out)) == 6
    again = FakeWorker()
    assert ask(data, out, again)["scorers"]["strict"]["value"] == 100.0 and len(again.requests) == 14


def test_a_server_that_answers_nothing_is_an_error(data: Path, out: Path) -> None:
    class Absent(FakeWorker):
        async def start(self) -> None:
            raise WorkerLost("http://x cannot be reached")

    with pytest.raises(KeyeError, match="http://x cannot be reached"):
        ask(data, out, Absent())


@pytest.mark.parametrize(
    ("settings", "model", "named"),
    [
        (RunSettings(media={"fps": 1.0}), ModelFacts("m", "w1"), "media"),
        (RunSettings(), ModelFacts("other", "w1"), "model m"),
        (RunSettings(), ModelFacts("m", "w2"), "weights w1"),
        (RunSettings(), ModelFacts("m", "w1", {"quant": "int4"}), "quant"),
        (RunSettings(thinking=True), ModelFacts("m", "w1"), "thinking"),
    ],
)
def test_replies_of_another_model_or_setting_are_never_mixed(data, out, settings, model, named) -> None:
    ask(data, out, FakeWorker())
    with pytest.raises(KeyeError, match=f"{named}.*choose another folder with -o"):
        ask(data, out, FakeWorker(), settings, model=model)
    assert len(records(out)) == 20


def test_a_larger_limit_goes_on(data: Path, out: Path) -> None:
    assert ask(data, out, FakeWorker(), RunSettings(limit=5))["items"] == 5
    worker = FakeWorker()
    assert ask(data, out, worker)["items"] == 20 and len(worker.requests) == 15
    assert ask(data, out, FakeWorker(), RunSettings(limit=5))["items"] == 5 and len(records(out)) == 20


def test_data_may_move(data: Path, out: Path, tmp_path: Path) -> None:
    ask(data, out, FakeWorker())
    moved, worker = data.rename(tmp_path / "elsewhere"), FakeWorker()
    assert ask(moved, out, worker)["scorers"]["strict"]["value"] == 100.0 and worker.requests == []


def test_a_changed_video_is_not_answered_by_old_replies(data: Path, out: Path) -> None:
    ask(data, out, FakeWorker())
    (data / "2.mp4").write_bytes(b"another")
    with pytest.raises(KeyeError, match="restore them, or choose another file with -o"):
        ask(data, out, FakeWorker())


def test_missing_media_are_named_before_anything_is_asked(data: Path, out: Path) -> None:
    (data / "2.mp4").unlink()
    worker = FakeWorker()
    with pytest.raises(KeyeError, match=r"1 media of 5 items of letters are not in .*\(2.mp4\).*allow_missing"):
        ask(data, out, worker)
    assert worker.requests == []
    result = ask(data, out, worker, allow_missing=True)
    assert result["shares"]["failed"] == 0.25 and result["scorers"]["strict"]["lower_bound"] == 75.0
    assert "2.mp4 is missing" in result["errors"][0]["message"] and len(worker.requests) == 15


def test_settings_reach_the_requests(data: Path, out: Path) -> None:
    worker = FakeWorker()
    settings = RunSettings(
        limit=1, media={"nframes": 8}, sampling={"max_tokens": 5, "seed": 3}, thinking=False, attention="dense"
    )
    ask(data, out, worker, settings)
    body = worker.requests[0].body
    part = body["messages"][0]["content"][0]
    assert part == {"type": "video", "video": str(data / "0.mp4"), "nframes": 8}
    assert (body["max_tokens"], body["seed"], body["temperature"], body["attention"]) == (5, 3, 0, "dense")
    assert body["chat_template_kwargs"] == {"enable_thinking": False}


def test_reasoning_is_kept_apart(data: Path, out: Path) -> None:
    result = ask(data, out, FakeWorker(lambda item: reply("A", reasoning_content="B or C? no")))
    assert result["shares"]["reasoning_apart"] == 1.0 and result["scorers"]["strict"]["value"] == 25.0
    assert records(out)["q1"]["reasoning"] == "B or C? no" and records(out)["q1"]["prediction"] == "A"


def test_subtitles_that_change_no_prompt_are_an_error(data: Path, out: Path) -> None:
    with pytest.raises(KeyeError, match="changes no prompt of letters"):
        ask(data, out, FakeWorker(right), RunSettings(prompt={"subtitles": True}))


def test_two_items_of_one_id_are_an_error(data: Path, out: Path) -> None:
    lines = (data / "items.jsonl").read_text().splitlines()
    (data / "items.jsonl").write_text("\n".join([*lines, lines[3]]))
    with pytest.raises(KeyeError, match="1 ids twice, such as 'q3'"):
        ask(data, out, FakeWorker())


def test_a_task_that_cannot_run_says_why(data: Path, out: Path) -> None:
    with pytest.raises(KeyeError, match="letters cannot be run yet: it needs a sandbox"):
        ask(data, out, FakeWorker(), task=replace(TASK, available="it needs a sandbox"))


def judged(data: Path, out: Path, verdict: str) -> tuple[dict, FakeWorker]:
    def act(item: Item) -> Answer:
        return right(item) if number_of(item) % 4 else reply("the first of them")

    judge = FakeWorker(lambda item: reply(verdict))
    return ask(data, out, FakeWorker(act), judge=Judge(lambda: judge, "gpt")), judge


def test_a_judge_is_asked_where_nothing_was_read_and_never_twice(data: Path, out: Path) -> None:
    result, judge = judged(data, out, "Yes.")
    assert len(judge.requests) == 1, "five equal questions with equal replies are one"
    body = judge.requests[0].body
    assert body["temperature"] == 0 and "the first of them" in body["messages"][0]["content"]
    assert result["scorers"]["judged(gpt)"]["value"] == 100.0 and result["scorers"]["strict"]["value"] == 75.0
    assert result["shares"]["judged"] == 0.25
    assert judged(data, out, "no")[1].requests == [], "the verdict was kept"


def test_a_verdict_that_is_neither_is_wrong_and_counted(data: Path, out: Path) -> None:
    result, _ = judged(data, out, "yes and no")
    figures = result["scorers"]["judged(gpt)"]
    assert (figures["value"], figures["judge_needed"], result["shares"]["judged"]) == (75.0, 0.25, 0.0)


def test_a_judge_that_is_away_loses_nothing(data: Path, out: Path) -> None:
    class Absent(FakeWorker):
        async def start(self) -> None:
            raise WorkerLost("http://judge cannot be reached")

    result = ask(data, out, FakeWorker(lambda _: reply("?")), judge=Judge(Absent, "gpt"))
    assert "http://judge" in result["judge_error"] and result["scorers"]["strict"]["value"] == 0.0


def test_compare_pairs_items_and_clusters_them(data: Path, tmp_path: Path) -> None:
    ask(data, tmp_path / "a", FakeWorker(lambda item: right(item) if number_of(item) % 4 else reply("B")))
    ask(data, tmp_path / "b", FakeWorker(failing(lambda number: number == 3)), RunSettings(media={"fps": 1.0}))
    data_ab = compare(read_run(tmp_path / "a" / "letters"), read_run(tmp_path / "b" / "letters"))
    row = data_ab["scorers"]["strict"]
    assert (row["first"], row["second"], row["difference"]) == (75.0, 95.0, 20.0)
    assert (row["first_better_items"], row["second_better"], row["equal"]) == (["q3"], 5, 14)
    assert row["interval"][0] < 20 < row["interval"][1] and data_ab["failed"] == [0, 1]
    assert data_ab["differs"] == ["settings.media"]


def test_compare_counts_items_of_one_side(data: Path, tmp_path: Path) -> None:
    ask(data, tmp_path / "a", FakeWorker())
    ask(data, tmp_path / "b", FakeWorker(), RunSettings(limit=8))
    result = compare(read_run(tmp_path / "a" / "letters"), read_run(tmp_path / "b" / "letters"))
    assert (result["items"], result["only_first"], result["only_second"]) == (8, 12, 0)
    assert result["scorers"]["strict"]["difference"] == 0
