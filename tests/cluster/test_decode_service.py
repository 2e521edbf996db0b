"""The decode service on workers that are no processes: order, limits, deaths, files that are elsewhere."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from keye.cluster.decode_queue import Priority
from keye.cluster.pool import WorkerDied
from keye.cluster.service import DEATHS, DecodeService, Poisoned, open_service
from keye.errors import KeyeError, MediaError
from tests.support.fake_pool import FakePool, FakeWorker, Item


def until(service: DecodeService, holds: Callable[[], bool]) -> None:
    """Waits for something that the service's threads bring about."""
    assert service.wait_for(holds, 30)


@contextmanager
def held_at_begin(pool: FakePool) -> Iterator[tuple[threading.Semaphore, threading.Event]]:
    """Every piece of work waits for a permit before it begins; the event tells that one is waiting."""
    permits, waiting = threading.Semaphore(0), threading.Event()

    def wait(worker: FakeWorker, item: Item) -> None:
        waiting.set()
        permits.acquire(timeout=30)

    pool.at_begin = wait
    try:
        yield permits, waiting
    finally:
        permits.release(1000)


def test_every_item_once_whatever_dies() -> None:
    """Half of all attempts end with the worker; each item is delivered once all the same."""
    pool, seen = FakePool(("a", "b", "c")), dict[str, int]()
    lock = threading.Lock()

    def die(worker: FakeWorker, item: Item) -> None:
        with lock:
            seen[item.name] = seen.get(item.name, 0) + 1
            if (int(item.name.partition(".")[0]) + seen[item.name]) % 2 and seen[item.name] < DEATHS:
                raise WorkerDied

    pool.at_begin = die
    items = [f"{number}.mp4" for number in range(200)]
    with DecodeService(pool, queue=10) as service:
        results = [service.submit(Item(name, on=("a", "b", "c")), Priority.BATCH) for name in items]
        assert [result.result(30) for result in results] == items
        gauges = service.gauges()
    assert gauges["done"] == 200 and gauges["bytes"] == 0 and gauges["poisoned"] == 0
    assert gauges["deaths"] == gauges["retried"] > 0
    assert sorted(name for name, _ in pool.done) == sorted(items)


def test_a_file_that_kills_workers_is_quarantined() -> None:
    pool, tried = FakePool(("a", "b")), list[str]()

    def die(worker: FakeWorker, item: Item) -> None:
        if item.name == "bad.mp4":
            tried.append(worker.node)
            raise WorkerDied

    pool.at_finish = die
    with DecodeService(pool) as service:
        bad, good = service.submit(Item("bad.mp4")), service.submit(Item("good.mp4"))
        with pytest.raises(Poisoned, match=r"bad\.mp4 is quarantined: 3 decode workers died"):
            bad.result(30)
        assert good.result(30) == "good.mp4"
        assert len(tried) == DEATHS and set(tried[:2]) == {"a", "b"}, "the second try is on the other node"
        with pytest.raises(Poisoned):
            service.submit(Item("bad.mp4")).result(30)
        assert len(tried) == DEATHS
        assert set(service.poisoned) == {"bad.mp4"} and "is quarantined" in service.poisoned["bad.mp4"]


def test_results_that_are_not_taken_hold_the_workers_back() -> None:
    pool = FakePool(("a",))
    with DecodeService(pool, budget=25) as service:
        results = [service.submit(Item(str(number), size=10), Priority.BATCH) for number in range(5)]
        until(service, lambda: service.gauges()["bytes"] == 20 and service.gauges()["waiting_batch"] == 2)
        assert [name for name, _ in pool.done] == ["0", "1"], "the third has no room"
        assert results[0].result(30) == "0"
        until(service, lambda: len(pool.done) == 3)
        results[1].abandon()  # an abandoned result makes room as well
        until(service, lambda: len(pool.done) == 4)
        assert [result.result(30) for result in results[2:]] == ["2", "3", "4"]
        assert service.gauges()["bytes"] == 0


def test_a_result_larger_than_the_budget_comes_alone() -> None:
    with DecodeService(FakePool(("a", "b")), budget=5) as service:
        results = [service.submit(Item(str(number), size=50)) for number in range(4)]
        assert [result.result(30) for result in results] == ["0", "1", "2", "3"]


def test_a_result_that_is_dropped_makes_room() -> None:
    with DecodeService(FakePool(), budget=5) as service:
        result = service.submit(Item("0", size=5))
        until(service, result.done)
        assert service.gauges()["bytes"] == 5
        del result
        until(service, lambda: service.gauges()["bytes"] == 0)


def test_submitting_waits_while_too_many_wait_but_not_for_a_person() -> None:
    pool = FakePool()
    with held_at_begin(pool) as (permits, waiting), DecodeService(pool, queue=2) as service:
        first = service.submit(Item("first"), Priority.BATCH)
        waiting.wait(30)
        queued = [service.submit(Item(str(number)), Priority.BATCH) for number in range(2)]
        with pytest.raises(TimeoutError):
            service.submit(Item("too many"), Priority.BATCH, timeout=0)
        queued.append(service.submit(Item("2"), Priority.BATCH, limited=False, timeout=0))
        others = [service.submit(Item(f"asked {number}")) for number in range(5)]
        service.submit(Item("a batch to train on"), Priority.TRAINING, timeout=0).abandon()
        permits.release(100)
        assert [result.result(30) for result in [first, *queued, *others]]
    order = [name for name, _ in pool.done]
    assert order == ["first", *(f"asked {number}" for number in range(5)), "0", "1", "2"]


def test_an_event_loop_can_wait_for_results() -> None:
    async def main(service: DecodeService) -> list[str]:
        results = [service.submit(Item(str(number), size=4), Priority.BATCH) for number in range(5)]
        return await asyncio.gather(*map(asyncio.wrap_future, results))

    with DecodeService(FakePool(), budget=5) as service:
        assert asyncio.run(main(service)) == ["0", "1", "2", "3", "4"]
        assert service.gauges()["bytes"] == 0


def test_work_that_is_not_wanted_any_more_is_not_done() -> None:
    pool = FakePool()
    with held_at_begin(pool) as (permits, waiting), DecodeService(pool) as service:
        begun = service.submit(Item("begun"))
        waiting.wait(30)
        queued = service.submit(Item("queued"))
        queued.abandon()
        begun.abandon()
        permits.release(100)
        with pytest.raises(KeyeError, match="begun is not wanted any more"):
            begun.result(30)
        assert service.submit(Item("other")).result(30) == "other"
    assert [name for name, _ in pool.done] == ["other"] and pool.dropped == ["begun"]


def test_a_file_goes_to_the_node_that_has_it() -> None:
    pool = FakePool(("a", "b"))
    with DecodeService(pool) as service:
        assert service.submit(Item("here.mp4", on=("b",))).result(30) == "here.mp4"
        assert pool.done == [("here.mp4", "b")] and service.gauges()["carried"] == 0
        for _ in range(5):  # where it was before, and where the caller says
            service.submit(Item("here.mp4", on=("b",))).result(30)
            until(service, lambda: service.gauges()["idle"] == 2)
            service.submit(Item("there.mp4", node="a")).result(30)
            until(service, lambda: service.gauges()["idle"] == 2)
    assert {node for name, node in pool.done if name == "here.mp4"} == {"b"}
    assert {node for name, node in pool.done if name == "there.mp4"} == {"a"}


def test_a_file_that_is_nowhere_else_is_brought_along() -> None:
    with DecodeService(FakePool(("a", "b"))) as service:
        assert service.submit(Item("mine.mp4", on=(), is_stored=True)).result(30) == "mine.mp4"
        assert service.gauges()["carried"] == 1
        with pytest.raises(MediaError, match=r"nowhere\.mp4 does not exist on any node"):
            service.submit(Item("nowhere.mp4", on=())).result(30)


def test_a_node_that_is_lost_and_the_last_one() -> None:
    pool = FakePool(("a", "b"))
    with DecodeService(pool) as service:
        pool.lost = {"a", "b"}

        def die(worker: FakeWorker, item: Item) -> None:
            if worker.node == item.name:
                raise WorkerDied

        pool.at_begin = die
        assert service.submit(Item("a", node="a")).result(30) == "a"
        until(service, lambda: service.gauges()["workers"] == 1)
        with pytest.raises(KeyeError, match="no decode worker is left"):
            service.submit(Item("b")).result(30)
        with pytest.raises(KeyeError, match="no decode worker is left"):
            service.submit(Item("c"))


def test_closing_ends_what_waits() -> None:
    pool = FakePool()
    with held_at_begin(pool) as (permits, waiting):
        service = DecodeService(pool)
        begun, queued = service.submit(Item("begun")), service.submit(Item("queued"))
        waiting.wait(30)
        threading.Thread(target=service.close).start()
        with pytest.raises(KeyeError, match="closed"):
            queued.result(30)
        permits.release(100)
        with pytest.raises(KeyeError, match="closed"):
            begun.result(30)
        service.close()
    with pytest.raises(KeyeError, match="closed"):
        service.submit(Item("late"))


@pytest.mark.parametrize("address", ["", "loca", "local:", "local:x", "local:-1", "ray:1", "http://x"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(KeyeError, match="is not an address of a decode service"):
        open_service(address)


def test_no_worker_at_all() -> None:
    with pytest.raises(KeyeError, match="0 decode workers"):
        open_service("local:0")
