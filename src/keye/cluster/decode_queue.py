"""Which piece of work a free worker takes next, and whether there is room for its result. Plain bookkeeping: knows no
processes, no threads and no media, and is used under its owner's lock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

from keye.cluster.decode_work import Work

#: How often a piece of work may be passed over for one whose file is on the worker's node.
PATIENCE: Final = 8
#: Files whose node is remembered.
REMEMBERED: Final = 1 << 16


class Priority(IntEnum):
    """Lower ones go first: a user waits for an answer; a batch; training, which looks ahead."""

    INTERACTIVE = 0
    BATCH = 1
    TRAINING = 2


@dataclass(eq=False)
class Job:
    """A piece of work on its way. `number` tells the order of submission; `absent` are nodes that lack its file, `died`
    those where a worker died over it."""

    number: int
    work: Work
    priority: Priority
    future: Any
    absent: set[str] = field(default_factory=set)
    died: list[str] = field(default_factory=list)
    passed: int = 0

    @property
    def rank(self) -> tuple[int, int]:
        """Of two jobs, the one that goes first has the lower rank."""
        return self.priority, self.number


class JobQueue:
    """Jobs that wait, by priority and then by number."""

    def __init__(self) -> None:
        self._jobs: dict[Priority, OrderedDict[int, Job]] = {priority: OrderedDict() for priority in Priority}
        self._homes: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._jobs.values()))

    def __iter__(self) -> Iterator[Job]:
        for jobs in self._jobs.values():
            yield from jobs.values()

    def waiting(self, priority: Priority) -> int:
        return len(self._jobs[priority])

    def add(self, job: Job) -> None:
        """A new job, or one that has to be done again: it gets its old place."""
        jobs = self._jobs[job.priority]
        later = [number for number in reversed(jobs) if number > job.number]
        jobs[job.number] = job
        for number in reversed(later):
            jobs.move_to_end(number)

    def remove(self, job: Job) -> bool:
        """Whether the job was still waiting."""
        return self._jobs[job.priority].pop(job.number, None) is not None

    def take(self, node: str, idle: Collection[str], nodes: Collection[str]) -> Job | None:
        """The job for an idle worker on `node`, taken out of the queue; None where there is none for it.

        `idle` are the nodes of all idle workers, this one among them, `nodes` those of all workers. Priorities come
        first. Within one, work whose file is on the node goes before what came earlier, which is passed over at most
        `PATIENCE` times; work whose file is on another node with an idle worker is left to that.
        """
        for jobs in self._jobs.values():
            passed: list[Job] = []
            first: Job | None = None
            for job in jobs.values():
                if not self.may(job, node, nodes):
                    continue
                home = self.home(job)
                if home == node or (job.passed >= PATIENCE and first is None):
                    for skipped in passed:
                        skipped.passed += 1
                    return jobs.pop(job.number)
                if home in idle and self.may(job, str(home), nodes):
                    continue
                passed.append(job)
                first = first or job
                if first.passed >= PATIENCE:
                    break
            if first is not None:
                return jobs.pop(first.number)
        return None

    def may(self, job: Job, node: str, nodes: Collection[str]) -> bool:
        """Whether a job may be done on a node: not where its file is known to be missing while a node is left to be
        asked, and not where a worker died over it while there is another node."""
        if job.absent.issuperset(nodes):
            return True  # the file has to be brought along
        if node in job.absent:
            return False
        others = [other for other in nodes if other not in job.absent and other not in job.died]
        return node not in job.died or not others

    def home(self, job: Job) -> str | None:
        """The node where a job's file is known to be, or was read last."""
        home = job.work.node or self._homes.get(job.work.key or "")
        return None if home in job.absent else home

    def remember(self, job: Job, node: str) -> None:
        """The job was done on a node."""
        key = job.work.key
        if key is not None:
            self._homes[key] = node
            self._homes.move_to_end(key)
            while len(self._homes) > REMEMBERED:
                self._homes.popitem(last=False)


class ByteBudget:
    """Bytes of results that are being made or wait to be taken: at most `limit`, but for the oldest job.

    That one is let through in any case, since a reader of results in order waits for it. So `limit` and one result
    are held at most, and one more for each job that overtakes it, by its priority or since its file lay nearer. Jobs
    are known by their rank; a rank is entered when it starts, and leaves when its result is taken or it has none.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._reserved: dict[tuple[int, int], int] = {}

    def enter(self, rank: tuple[int, int]) -> None:
        """A job is started; a second time where it has to be done again."""
        self._reserved.setdefault(rank, 0)

    def reserve(self, rank: tuple[int, int], nbytes: int) -> bool:
        """Reserves bytes for an entered job, in place of what it had; False where there is no room now."""
        others = self.used - self._reserved[rank]
        if others + nbytes > self.limit and rank != min(self._reserved):
            return False
        self.used, self._reserved[rank] = others + nbytes, nbytes
        return True

    def leave(self, rank: tuple[int, int]) -> None:
        """Releases a job's bytes; may be called twice."""
        self.used -= self._reserved.pop(rank, 0)
