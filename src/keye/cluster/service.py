"""The decode service: videos to planned frames in many workers, by priority, within a budget of bytes.

A thread for each worker takes jobs from one queue and talks to it. A job whose worker died is done again, on another
node if there is one; one that has cost `DEATHS` workers is quarantined. Knows workers, no processes, no Ray.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Final

from keye.cluster.decode_queue import ByteBudget, Job, JobQueue
from keye.cluster.decode_queue import Priority as Priority
from keye.cluster.decode_work import Work
from keye.cluster.pool import LocalPool, Pool, PoolWorker, WorkerDied
from keye.cluster.pool_worker import ABSENT, DONE, REJECTED
from keye.errors import KeyeError, KeyeWarning, MediaError, warn
from keye.process import available_cores

#: Workers that a piece of work may cost.
DEATHS: Final = 3
#: Bytes of results that are made or wait to be taken, unless said otherwise.
BUDGET: Final = 1 << 30
#: Jobs of one priority that may wait for a worker, unless said otherwise.
QUEUE: Final = 64
#: Workers that may die in a row before any has got ready: then something else is wrong.
MAX_FAILED_STARTS: Final = 3


class Poisoned(MediaError):
    """A file that cost worker after worker and is not tried again."""


class Result(Future[Any]):
    """A result on its way. Its bytes count in the budget until `result` is called or it is dropped."""

    def __init__(self, service: DecodeService, rank: tuple[int, int]) -> None:
        super().__init__()
        self._service, self._rank = service, rank
        self.is_abandoned = False

    def result(self, timeout: float | None = None) -> Any:
        """The result, waited for; raises what went wrong with it."""
        value = super().result(timeout)
        self._service.mark_taken(self._rank)
        return value

    def abandon(self) -> None:
        """Abandons the result; work that has not begun is not done. May be called twice."""
        self.is_abandoned = True
        self.cancel()
        if self.done():
            self._service.mark_taken(self._rank)

    def __del__(self) -> None:
        if self.done():
            self._service.mark_taken(self._rank)


class DecodeService:
    """Made by `open_service`. Safe to use from many threads; closing abandons what has not been done."""

    def __init__(self, pool: Pool, *, budget: int = BUDGET, queue: int = QUEUE) -> None:
        if budget < 1 or queue < 1:
            raise KeyeError("the decode service needs a byte budget and a queue of 1 or more")
        self._pool, self._most = pool, queue
        # Reentrant: a dropped result may be freed while its thread holds the lock.
        self._changed = threading.Condition(threading.RLock())
        self._queue, self._budget = JobQueue(), ByteBudget(budget)
        self._numbers = 0
        self._closed: KeyeError | None = None
        self._poisoned: dict[str, str] = {}
        self._counts = dict.fromkeys(("done", "refused", "retried", "deaths", "carried", "carried_bytes"), 0)
        self._workers: dict[int, PoolWorker] = dict(enumerate(start_workers(pool)))
        #: The node of each worker that waits for a job.
        self._idle: dict[int, str] = {}
        self._threads = [
            threading.Thread(target=self._serve, args=(place, worker), name=f"keye-decode-{place}", daemon=True)
            for place, worker in self._workers.items()
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> DecodeService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def poisoned(self) -> Mapping[str, str]:
        """Names of quarantined work, each with its error."""
        with self._changed:
            return {name.rpartition("\0")[2]: sentence for name, sentence in self._poisoned.items()}

    def submit(
        self, work: Work, priority: Priority = Priority.INTERACTIVE, *, limited: bool = True,
        timeout: float | None = None,
    ) -> Result:  # fmt: skip
        """Has work done. Where too many of its priority wait already, this waits until there is room (`TimeoutError`
        after so many seconds), but for interactive work, whose number its server limits, and for callers that limit
        themselves (not `limited`). The future raises `KeyeError` for a mistake in the work, `Poisoned` for
        quarantined work."""
        waits = limited and priority is not Priority.INTERACTIVE
        with self._changed:
            if waits and not self._changed.wait_for(
                lambda: self._closed is not None or self._queue.waiting(priority) < self._most, timeout
            ):
                raise TimeoutError(f"{self._most} pieces of work wait already")
            if self._closed is not None:
                raise self._closed
            self._numbers += 1
            job = Job(self._numbers, work, priority, None)
            result = job.future = Result(self, job.rank)
            if (sentence := self._poisoned.get(_poison_key(work))) is not None:
                result.set_exception(Poisoned(sentence))
            else:
                self._queue.add(job)
                self._changed.notify_all()
            return result

    @property
    def workers(self) -> list[PoolWorker]:
        """The workers of this moment."""
        with self._changed:
            return list(self._workers.values())

    def wait_for(self, condition: Callable[[], bool], timeout: float | None = None) -> bool:
        """Waits until something that the service's threads bring about holds; False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    def gauges(self) -> dict[str, float]:
        """Numbers of this moment, and counts since the start."""
        with self._changed:
            waiting = {f"waiting_{priority.name.lower()}": self._queue.waiting(priority) for priority in Priority}
            return {
                "workers": len(self._workers), "idle": len(self._idle), **waiting, "bytes": self._budget.used,
                "bytes_limit": self._budget.limit, "poisoned": len(self._poisoned), **self._counts,
            }  # fmt: skip

    def close(self) -> None:
        """Ends all workers; results that are not there yet become errors. May be called more than once."""
        self._end(KeyeError("the decode service is closed"))
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._pool.close()

    def mark_taken(self, rank: tuple[int, int]) -> None:
        """The result of this rank is not in the service's hands any more."""
        with self._changed:
            self._budget.leave(rank)
            self._changed.notify_all()

    def _end(self, reason: KeyeError) -> None:
        with self._changed:
            if self._closed is not None:
                return
            self._closed = reason
            for job in list(self._queue):
                self._queue.remove(job)
                self._fail(job, reason)
            workers = list(self._workers.values())
            self._changed.notify_all()
        for worker in workers:
            worker.stop()

    def _serve(self, place: int, worker: PoolWorker | None) -> None:
        """What the thread of a worker does."""
        job: Job | None = None
        try:
            while worker is not None and (job := self._next(place, worker)) is not None:
                begun = False
                try:
                    worker.check()
                    begun = True
                    try:
                        self._attempt(job, worker)
                    except WorkerDied:
                        raise
                    except Exception as error:  # noqa: BLE001 - raised again where the result is taken
                        worker.drop()
                        self._fail(job, error)
                except WorkerDied:
                    self._on_worker_death(job, worker, begun)
                    worker = self._replaced(place, worker)
                job = None  # drops the result, which may be freed, while this thread waits
        except BaseException as error:
            reason = KeyeError(f"the decode service failed ({error}); start again")
            if job is not None:
                self._fail(job, reason)
            self._end(reason)
            raise
        finally:
            with self._changed:
                self._workers.pop(place, None)
                self._idle.pop(place, None)
                is_last = not self._workers
                self._changed.notify_all()
            if is_last:
                self._end(KeyeError("no decode worker is left: their nodes have gone; start them, then start again"))

    def _next(self, place: int, worker: PoolWorker) -> Job | None:
        """Waits for a job; None when the service is closed."""
        with self._changed:
            self._idle[place] = worker.node
            while self._closed is None:
                nodes = {other.node for other in self._workers.values()}
                job = self._queue.take(worker.node, set(self._idle.values()), nodes)
                if job is not None:
                    if not job.future.running() and not job.future.set_running_or_notify_cancel():
                        continue
                    del self._idle[place]
                    self._budget.enter(job.rank)
                    self._changed.notify_all()
                    return job
                self._changed.wait()
            self._idle.pop(place, None)
            return None

    def _attempt(self, job: Job, worker: PoolWorker) -> None:
        """One job: begun, given room, done."""
        kind, reason = worker.begin(self._work_for(job, worker))
        if kind != DONE:
            self._not_done(job, worker, kind, reason)
            return
        nbytes, buffer_bytes = reason
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed is not None or job.future.is_abandoned or self._budget.reserve(job.rank, nbytes)
            )
            is_wanted = self._closed is None and not job.future.is_abandoned
        if not is_wanted:
            worker.drop()
            self._fail(job, self._closed or KeyeError(f"{job.work.name} is not wanted any more"))
            return
        (kind, rest), buffer = worker.finish(buffer_bytes)
        if kind != DONE:
            self._not_done(job, worker, kind, rest)
            return
        result = job.work.result(rest, buffer)
        with self._changed:
            self._counts["done"] += 1
            self._queue.remember(job, worker.node)
            job.future.set_result(result)
            if job.future.is_abandoned:
                self._budget.leave(job.rank)
            self._changed.notify_all()

    def _work_for(self, job: Job, worker: PoolWorker) -> Work:
        """The work as this worker can do it: with its file in it where no node has that."""
        if worker.node not in job.absent:
            return job.work
        carried = job.work.carried()
        if carried is None:
            raise MediaError(f"{job.work.name} does not exist on any node of the decode service; check the path, or "
                             "copy it there")  # fmt: skip
        with self._changed:
            self._counts["carried"] += 1
            self._counts["carried_bytes"] += getattr(getattr(job.work, "source", None), "size", 0)
        return carried

    def _not_done(self, job: Job, worker: PoolWorker, kind: str, reason: Any) -> None:
        if kind != ABSENT:
            self._fail(job, reason if kind == REJECTED else RuntimeError(f"a decode worker failed:\n{reason}"))
            return
        with self._changed:
            job.absent.add(worker.node)
            self._again(job)

    def _on_worker_death(self, job: Job, worker: PoolWorker, begun: bool) -> None:
        """The worker died: the job is done again, or quarantined where it had `begun` too often."""
        with self._changed:
            if self._closed is not None:
                self._fail(job, self._closed)
                return
            self._counts["deaths"] += 1
            if begun:
                job.died.append(worker.node)
            if len(job.died) < DEATHS:
                self._counts["retried"] += 1
                self._again(job)
                return
            sentence = (f"{job.work.name} is quarantined: {DEATHS} decode workers died over it, one after another; "
                        "re-encode it or leave it out")  # fmt: skip
            self._poisoned[_poison_key(job.work)] = sentence
            self._fail(job, Poisoned(sentence))

    def _again(self, job: Job) -> None:
        self._budget.leave(job.rank)
        if job.future.is_abandoned:
            self._fail(job, KeyeError(f"{job.work.name} is not wanted any more"))
            return
        self._queue.add(job)
        self._changed.notify_all()

    def _fail(self, job: Job, error: Exception) -> None:
        with self._changed:
            self._budget.leave(job.rank)
            self._counts["refused"] += 1
            if not job.future.done():
                job.future.set_exception(error)
            self._changed.notify_all()

    def _replaced(self, place: int, worker: PoolWorker) -> PoolWorker | None:
        """A fit worker in the place of a dead one; None where there can be none."""
        worker.stop()
        for _ in range(MAX_FAILED_STARTS):
            with self._changed:
                if self._closed is not None or (fresh := self._pool.replace(worker)) is None:
                    return None
                self._workers[place] = fresh
            try:
                if fresh.hello()[0] == DONE:
                    return fresh
            except WorkerDied:
                pass
            fresh.stop()
        return None


def start_workers(pool: Pool) -> list[PoolWorker]:
    """The workers that start and are fit; a warning for each that is not, an error if none is."""
    fit: list[PoolWorker] = []
    sentences: list[str] = []
    for worker in pool.start():
        try:
            answer, reason = worker.hello()
        except WorkerDied as death:
            why = str(death).strip().rpartition("\n")[2] or "see what it wrote above"
            answer = REJECTED
            reason = f"a decode worker ended while it started ({why}): this version of keye must be on every node"
        if answer == DONE:
            fit.append(worker)
        else:
            sentences.append(reason)
            worker.stop()
    if not fit:
        pool.close()
        raise KeyeError(sentences[0] if sentences else "the cluster has no node that can run a decode worker")
    for sentence in dict.fromkeys(sentences):
        warn(KeyeWarning(f"{sentence}; it is left out"), stacklevel=4)
    return fit


def _poison_key(work: Work) -> str:
    return f"{work.key or ''}\0{work.name}"


def open_service(address: str, *, budget: int = BUDGET, queue: int = QUEUE) -> DecodeService:
    """The service on `address`: "local" (a process for each processor of this machine), "local:N" (N of them), "ray"
    (the cluster that this machine belongs to) or "ray://host:port" (another).

    `budget` bytes of results may be made or wait to be taken; `queue` jobs of a priority may wait for a worker before
    `submit` does. `KeyeError` for an address of another form, a cluster that cannot be reached, Ray missing, or workers
    that cannot decode.
    """
    if match := re.fullmatch(r"local(?::(\d+))?", address):
        return DecodeService(LocalPool(int(match[1] or available_cores())), budget=budget, queue=queue)
    if address == "ray" or address.startswith("ray://"):
        from keye.cluster.ray_pool import RayPool

        return DecodeService(RayPool(address), budget=budget, queue=queue)
    raise KeyeError(f"{address!r} is not an address of a decode service: give local, local:N, ray or ray://host:port")
