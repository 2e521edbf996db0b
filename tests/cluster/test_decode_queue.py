"""Which job goes first, and how many bytes are held: plain bookkeeping, held to its promises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from keye.cluster.decode_queue import PATIENCE, ByteBudget, Job, JobQueue, Priority


@dataclass(frozen=True)
class File:
    """Work on a file that may be known to lie on a node."""

    name: str
    node: str | None = None

    @property
    def key(self) -> str:
        return self.name

    def begin(self) -> Any:
        raise AssertionError("nothing is done here")

    def result(self, rest: Any, buffer: Any) -> Any:
        raise AssertionError("nothing is done here")

    def carried(self) -> None:
        return None


def queue_of(*jobs: Job) -> JobQueue:
    queue = JobQueue()
    for job in jobs:
        queue.add(job)
    return queue


def job(number: int, priority: Priority = Priority.BATCH, node: str | None = None) -> Job:
    return Job(number, File(f"{number}.mp4", node), priority, None)


def test_interactive_work_goes_before_a_batch_and_that_before_training() -> None:
    queue = queue_of(job(1, Priority.TRAINING), job(2), job(3, Priority.INTERACTIVE), job(4))
    selected = [queue.take("a", {"a"}, {"a"}) for _ in range(5)]
    assert [item and item.number for item in selected] == [3, 2, 4, 1, None]


def test_a_job_that_has_to_be_done_again_gets_its_old_place() -> None:
    jobs = [job(number) for number in range(1, 5)]
    queue = queue_of(*jobs)
    first = queue.take("a", {"a"}, {"a"})
    assert first is jobs[0]
    queue.add(first)
    assert [item.number for item in queue] == [1, 2, 3, 4]


def test_a_file_is_left_to_an_idle_worker_on_its_node() -> None:
    queue = queue_of(job(1, node="b"), job(2))
    selected = queue.take("a", {"a", "b"}, {"a", "b"})
    assert selected is not None and selected.number == 2
    assert queue.take("a", {"a", "b"}, {"a", "b"}) is None  # the other is for b
    selected = queue.take("a", {"a"}, {"a", "b"})  # b is busy: better here than not at all
    assert selected is not None and selected.number == 1


def test_a_file_goes_where_it_was_before() -> None:
    queue, before = JobQueue(), job(1)
    queue.remember(before, "b")
    again = Job(2, before.work, Priority.BATCH, None)
    queue.add(again)
    assert queue.take("a", {"a", "b"}, {"a", "b"}) is None
    assert queue.take("b", {"b"}, {"a", "b"}) is again


def test_local_files_overtake_others_but_not_for_ever() -> None:
    others = PATIENCE + 5
    queue = queue_of(job(1), *(job(number, node="a") for number in range(2, 2 + others)))
    order = [queue.take("a", {"a"}, {"a"}).number for _ in range(others + 1)]  # type: ignore[union-attr]
    assert order.index(1) == PATIENCE
    assert sorted(order) == list(range(1, others + 2))


def test_a_job_is_done_elsewhere_after_a_death_and_where_its_file_is() -> None:
    item = job(1)
    queue = queue_of(item)
    item.died.append("a")
    assert queue.take("a", {"a"}, {"a", "b"}) is None
    assert queue.may(item, "a", {"a"}), "where there is no other node it is tried here again"
    item.absent.add("b")
    assert queue.take("b", {"b"}, {"a", "b"}) is None
    item.absent.add("a")  # on no node: the file has to be brought along
    assert queue.take("b", {"b"}, {"a", "b"}) is item


@given(st.integers(1, 100), st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=60))
def test_results_in_order_never_take_more_than_the_limit_and_one(limit: int, steps: list[tuple[int, bool]]) -> None:
    """Jobs begin in order and reserve when they can; results are taken in order. Nothing gets stuck."""
    budget = ByteBudget(limit)
    sizes = [size for size, _ in steps]
    started, reserved, selected = 0, set[int](), 0
    for _, take in steps:
        rank = (0, started)
        budget.enter(rank)
        started += 1
        for number in range(selected, started):
            if number not in reserved and budget.reserve((0, number), sizes[number]):
                reserved.add(number)
        blocked = sum(sizes[number] for number in reserved)
        assert budget.used == blocked
        assert blocked <= limit + max(sizes), "the limit, and the one that is waited for"
        assert selected in reserved or selected == started, "the oldest is never kept waiting"
        if take and selected in reserved:
            budget.leave((0, selected))
            reserved.discard(selected)
            selected += 1
    for number in range(selected, started):
        assert budget.reserve((0, number), sizes[number]) or number in reserved
        budget.leave((0, number))
    assert budget.used == 0


@given(st.lists(st.tuples(st.sampled_from(["enter", "reserve", "leave"]), st.integers(0, 5), st.integers(0, 50))))
def test_bytes_are_what_is_held_whatever_happens(steps: list[tuple[str, int, int]]) -> None:
    budget, blocked = ByteBudget(60), dict[int, int]()
    for step, number, size in steps:
        rank = (0, number)
        if step == "enter":
            budget.enter(rank)
            blocked.setdefault(number, 0)
        elif step == "leave":
            budget.leave(rank)
            blocked.pop(number, None)
        elif number in blocked:
            first, others = min(blocked), sum(blocked.values()) - blocked[number]
            selected = budget.reserve(rank, size)
            assert selected == (others + size <= 60 or number == first)
            if selected:
                blocked[number] = size
        assert budget.used == sum(blocked.values())
