"""A batch asks every item until it has one record, whatever happens to workers; media are met in one place."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye.batch.journal import Journal
from keye.batch.manifest import BadLine, Item
from keye.batch.run import Agenda, Batch, Report
from keye.batch.workers import Answer, WorkerLost
from keye.errors import KeyeError


def item(name: str, video: str = "v") -> Item:
    return Item(name, 1, f"d{name}", {"messages": []}, (video,))


def reply(text: str) -> Answer:
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "media": [{"kind": "video", "duration": 5.0}]}
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    return Answer(200, {"choices": [choice], "usage": usage, "model": "m"})


class Fake:
    """Answers with what `act` gives for an item; counts what it was asked, and its starts."""

    def __init__(
        self, act: Callable[[Item], Answer] = lambda entry: reply(entry.id), slots: int = 2, name: str = "w"
    ) -> None:
        self.name, self.slots, self._act = name, slots, act
        self.questions: list[str] = []
        self.starts = 0

    async def start(self) -> None:
        self.starts += 1

    async def ask(self, item: Item) -> Answer:
        self.questions.append(item.id)
        await asyncio.sleep(0)
        return self._act(item)

    async def close(self) -> None: ...


def run(out: Path, workers: Sequence[Fake], lines: Sequence[Item | BadLine], *, retry_errors: bool = False) -> Report:
    with Journal(out) as journal:
        return asyncio.run(Batch(workers, journal).run(lines, retry_errors=retry_errors))


def records(out: Path) -> dict[str, dict]:
    """By id; each must be there once."""
    read = [json.loads(line) for line in out.read_text().splitlines()]
    named = {record["id"]: record for record in read}
    assert len(named) == len(read)
    return named


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_every_item_is_answered_once_and_never_again(out: Path) -> None:
    items = [item(str(number), f"v{number % 3}") for number in range(20)]
    worker = Fake()
    report = run(out, [worker], items)
    assert Counter(worker.questions) == Counter(entry.id for entry in items)
    assert (report.ok, report.errors, report.prompt_tokens, report.video_seconds) == (20, 0, 200, 100.0)
    assert {name: record["text"] for name, record in records(out).items()} == {entry.id: entry.id for entry in items}
    again = Fake()
    report = run(out, [again], items)
    assert again.questions == [] and (report.skipped, report.ok) == (20, 0)


def test_errors_are_records_and_stop_nothing(out: Path) -> None:
    def act(entry: Item) -> Answer:
        if entry.id == "bad":
            return Answer(400, {"error": {"code": "unknown_field", "message": "no such field"}})
        if entry.id == "missing":
            raise KeyeError("a.mp4 does not exist; check the path")
        return reply("fine")

    lines = [item("bad"), BadLine("line-2", 2, "x", "the line is not JSON"), item("missing"), item("good")]
    report = run(out, [Fake(act, slots=1)], lines)
    result = records(out)
    assert (report.ok, report.errors) == (1, 3) and result["good"]["error"] is None
    assert result["bad"]["error"] == {"code": "unknown_field", "message": "no such field"}
    assert result["line-2"]["error"] == {"code": "bad_line", "message": "line 2: the line is not JSON"}
    assert result["missing"]["error"]["message"] == "line 1: a.mp4 does not exist; check the path"


def test_errors_are_asked_again_only_on_demand(out: Path) -> None:
    run(out, [Fake(lambda entry: Answer(400, {"error": {"message": "no"}}))], [item("a")])
    run(out, [Fake()], [item("a")])
    assert records(out)["a"]["error"] is not None
    report = run(out, [Fake()], [item("a")], retry_errors=True)
    assert records(out)["a"]["error"] is None and (report.skipped, report.ok) == (0, 1)


def test_a_lost_worker_starts_again_and_its_questions_are_asked_again(out: Path) -> None:
    lost: set[str] = set()

    def act(entry: Item) -> Answer:
        if entry.id in ("3", "4") and entry.id not in lost:
            lost.add(entry.id)
            raise WorkerLost("gone")
        return reply("yes")

    workers = [Fake(act, name="one"), Fake(act, name="two")]
    report = run(out, workers, [item(str(number), f"v{number % 4}") for number in range(12)])
    assert report.ok == 12 and lost == {"3", "4"} and len(records(out)) == 12
    assert report.losses == sum(worker.starts for worker in workers) - 2 > 0


def test_a_question_that_ends_workers_gets_an_error_and_the_others_their_answers(out: Path) -> None:
    def act(entry: Item) -> Answer:
        if entry.id == "poison":
            raise WorkerLost("killed")
        return reply("yes")

    report = run(out, [Fake(act, slots=3)], [item("poison"), *(item(str(n), f"v{n}") for n in range(8))])
    assert (report.ok, report.errors) == (8, 1)
    assert records(out)["poison"]["error"]["code"] == "lost"


def test_questions_that_end_workers_are_asked_last(out: Path) -> None:
    """Also where they stand first, and there is one worker for one question at a time."""

    def act(entry: Item) -> Answer:
        if entry.id.startswith("poison"):
            raise WorkerLost("killed")
        return reply("yes")

    bad = [item(f"poison{n}", f"p{n}") for n in range(5)]
    worker = Fake(act, slots=1)
    report = run(out, [worker], [*bad, *(item(str(n), f"v{n}") for n in range(4))])
    assert (report.ok, report.errors) == (4, 5)
    assert worker.questions[5:9] == ["0", "1", "2", "3"], "each is asked once before anything is asked again"
    assert max(Counter(worker.questions).values()) == 3
    assert {name for name, record in records(out).items() if record["error"]} == {entry.id for entry in bad}


@pytest.mark.parametrize(
    ("body", "fine"),
    [
        ({"choices": [{}]}, False),
        ({"choices": [{"message": None}]}, False),
        ({"choices": {"a": 1}}, False),
        ({"choices": ["x"]}, False),
        ({"choices": 7, "error": {"code": {"a": 1}, "message": None}}, False),
        ({"error": "no"}, False),
        ({"choices": [{"message": {}}], "usage": "many"}, True),
        (
            {"choices": [{"message": {}}], "usage": {"prompt_tokens": "5", "media": [1], "completion_tokens": 10**30}},
            True,
        ),
        ({"choices": [{"message": {}}], "usage": {"prompt_tokens_details": [1], "media": 3}}, True),
        ({"choices": [{"message": {"content": ["x"]}}], "keye": [1]}, True),
    ],
)
@pytest.mark.parametrize("openai", [False, True])
def test_an_odd_answer_is_a_record_and_stops_nothing(out: Path, body: dict, fine: bool, openai: bool) -> None:
    odd = replace(item("odd"), openai=openai)
    report = run(
        out, [Fake(lambda entry: Answer(200, body) if entry.id == "odd" else reply("yes"))], [odd, item("good")]
    )
    assert (report.ok, report.errors) == (1 + fine, 1 - fine)
    assert {record.get("custom_id", record["id"]) for record in map(json.loads, out.read_text().splitlines())} == {
        "odd", "good"
    }  # fmt: skip


def test_an_item_that_breaks_what_asks_it_is_a_record(out: Path) -> None:
    def act(entry: Item) -> Answer:
        if entry.id == "bad":
            raise RecursionError("maximum recursion depth exceeded")
        return reply("yes")

    report = run(out, [Fake(act)], [item("bad"), item("good")])
    assert (report.ok, report.errors) == (1, 1) and records(out)["bad"]["error"]["code"] == "failed"


def test_no_worker_left_keeps_what_is_there(out: Path) -> None:
    def act(entry: Item) -> Answer:
        if entry.id != "0":
            raise WorkerLost("the server is gone", during=False)
        return reply("yes")

    with pytest.raises(KeyeError, match=r"no worker is left \(.*\), and 2 of the items wait; .* goes on"):
        run(out, [Fake(act, slots=1)], [item(str(number)) for number in range(3)])
    assert list(records(out)) == ["0"]
    assert run(out, [Fake()], [item(str(number)) for number in range(3)]).ok == 2


def test_a_mistake_in_starting_is_reported_as_it_is(out: Path) -> None:
    class Locked(Fake):
        async def start(self) -> None:
            raise KeyeError("the server wants another key")

    with pytest.raises(KeyeError, match="^the server wants another key$"):
        run(out, [Locked()], [item("a")])


def test_the_first_question_about_a_video_goes_alone() -> None:
    agenda = Agenda([item("a1", "a"), item("a2", "a"), item("a3", "a"), item("b1", "b"), item("b2", "b")])
    first = agenda.take("one")
    assert first is not None and first.id == "a1"
    other = agenda.take("two")
    assert other is not None and other.id == "b1"
    assert agenda.take("one") is None  # both videos are being met
    agenda.mark_answered(first, "one")
    selected = [agenda.take("one"), agenda.take("two"), agenda.take("two")]
    assert [entry and entry.id for entry in selected] == ["a2", "a3", None]
    agenda.mark_answered(other, "two")
    agenda.forget("two")  # lost: its video has to be met again, by anyone
    again = agenda.take("one")
    assert again is not None and again.id == "b2"


@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=12),
    st.lists(
        st.tuples(st.sampled_from(["one", "two"]), st.sampled_from(["answer", "lose", "drop", "hold"])), max_size=40
    ),
)
def test_an_agenda_gives_out_everything_whatever_happens(videos: list[str], steps: list[tuple[str, str]]) -> None:
    items = [item(str(number), video) for number, video in enumerate(videos)]
    agenda, reserved, finished = Agenda(items), list[tuple[Item, str]](), set[str]()

    def end(entry: Item, worker: str, how: str) -> None:
        if how == "lose":
            agenda.put_back(entry) if len(entry.id) % 2 else agenda.put_last(entry)
            agenda.forget(worker)
            return
        agenda.mark_answered(entry, worker) if how == "answer" else agenda.drop(entry)
        assert entry.id not in finished
        finished.add(entry.id)

    for worker, how in steps:
        entry = agenda.take(worker)
        if entry is not None:
            reserved.append((entry, worker))
        if how != "hold" and reserved:
            end(*reserved.pop(0), how)
    while reserved or (entry := agenda.take("one")) is not None:
        end(*(reserved.pop() if reserved else (entry, "one")), "answer")
    assert finished == {entry.id for entry in items}
