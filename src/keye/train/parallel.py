"""The processes of a run: `torchrun` starts them, on one machine or many, or the run itself starts `processes` of them
here. What they do together is in `Group`, and how they divide a model in `keye.train.mesh`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from keye.config import ConfigError
from keye.config.environment import launched_place
from keye.errors import KeyeError
from keye.process import leave_terminal

T = TypeVar("T")
#: How long a process waits for the others before it raises an error.
PATIENCE = timedelta(minutes=15)


class Group:
    """This process among `size`; with one process every method is the identity. `local_rank` counts those of this
    machine. Every process must call the same methods in the same order."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int | None = None) -> None:
        self.rank, self.size, self.local_rank = rank, size, rank if local_rank is None else local_rank

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor (float32, the same shapes everywhere) by its sum over the processes."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def total(self, *values: float) -> list[float]:
        """The sum of each value over the processes."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared)
        return shared.tolist()

    def divide(self, stack: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
        """work(stack) for a stack [n, ...] of equal shape and dtype bfloat16 out, each process doing a part."""
        if self.size == 1:
            return work(stack)
        share = -(-stack.shape[0] // self.size)
        mine = stack[self.rank * share : (self.rank + 1) * share]
        done = torch.zeros(share, *stack.shape[1:], dtype=torch.bfloat16, device=stack.device)
        if mine.shape[0]:
            done[: mine.shape[0]] = work(mine)
        parts = [torch.empty_like(done) for _ in range(self.size)]
        dist.all_gather([part.view(torch.uint8) for part in parts], done.view(torch.uint8))
        return torch.cat(parts)[: stack.shape[0]]

    def agree(self, *values: float) -> list[float]:
        """The values of process 0, for decisions that depend on the clock."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(shared, 0)
        return shared.tolist()

    def first(self, work: Callable[[], T]) -> T:
        """The result of `work`, which process 0 alone does; where it raises `KeyeError`, so does every process."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except KeyeError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, 0, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def collect(self, value: T) -> list[T]:
        """The values (any that can be pickled) of all processes, in order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def processes(size: int, device: str, follow: Callable[[Group], None]) -> Iterator[Group]:
    """This process's place in the run. Under `torchrun` that is what it says; else this is rank 0 of `size`, and
    `size - 1` others, which end with this one, run `follow(group)` beside it."""
    if (group := _torchrun_group(size)) is not None:
        _join(group, device)
        with _leaving():
            yield group
    elif size == 1:
        yield Group()
    else:
        with _children(size, device, follow) as group:
            yield group


def _torchrun_group(size: int) -> Group | None:
    """The place that `torchrun` gives to this process; None where it did not start it. `ConfigError` where the run
    asks for other processes."""
    place = launched_place()
    if place is None:
        return None
    rank, world, local_rank = place
    if size not in (1, world):
        raise ConfigError(f"processes is {size}, but torchrun starts {world}; leave processes out of the file")
    return Group(rank, world, local_rank)


@contextmanager
def _children(size: int, device: str, follow: Callable[[Group], None]) -> Iterator[Group]:
    """Rank 0 of `size` processes of this machine, the others started here."""
    with tempfile.TemporaryDirectory(prefix="keye-train-") as folder:
        meeting, context = Path(folder) / "meeting", get_context("spawn")
        errors: SimpleQueue[str] = context.SimpleQueue()
        others = [
            context.Process(target=_run, args=(follow, Group(rank, size), device, meeting, errors))
            for rank in range(1, size)
        ]
        for process in others:
            process.start()
        try:
            _join(Group(0, size), device, meeting)
            with _leaving():
                yield Group(0, size)
        except RuntimeError as error:  # what a collective raises when another process has ended
            for process in others:
                process.join(timeout=10)
            if not errors.empty():
                raise KeyeError(errors.get()) from error
            raise
        finally:
            for process in others:
                process.join(timeout=10)
                process.kill()


def _run(
    follow: Callable[[Group], None], group: Group, device: str, meeting: Path, errors: SimpleQueue[str]
) -> None:  # fmt: skip
    leave_terminal()
    _join(group, device, meeting)
    with suppress(KeyeError, KeyboardInterrupt), _leaving():
        try:
            follow(group)
        except KeyeError as error:
            errors.put(f"process {group.rank}: {error}")
            raise


def _join(group: Group, device: str, meeting: Path | None = None) -> None:
    """Meets the other processes: through a file, or as the environment says."""
    backend = "gloo"
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device_of(group, device))
        backend = "cpu:gloo,cuda:nccl"
    method = "env://" if meeting is None else f"file://{meeting}"
    dist.init_process_group(backend, init_method=method, rank=group.rank, world_size=group.size, timeout=PATIENCE)


@contextmanager
def _leaving() -> Iterator[None]:
    """Leaves the others at the end of the block: together where it succeeds, so that no process waits for one that has
    gone, and at once where it does not."""
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def device_of(group: Group, device: str) -> str:
    """The device of this process: each of a machine has a GPU of its own."""
    return f"cuda:{group.local_rank}" if device == "cuda" and group.size > 1 else device


def mean_figures(group: Group, sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Means by name of the sums and counts of all processes."""
    totals: dict[str, list[float]] = {}
    for part in group.collect(dict(sums)):
        for name, (total, count) in part.items():
            entry = totals.setdefault(name, [0.0, 0.0])
            entry[0] += total
            entry[1] += count
    return {name: total / count for name, (total, count) in sorted(totals.items()) if count}


# --------------------------------------------------------------------------------------------------------------------
# Tensors that are divided among processes


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def join_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor; where it is divided, every process calls this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_divided(tensor: Tensor) -> bool:
    """Whether no process holds all of a tensor."""
    return isinstance(tensor, DTensor) and any(place.is_shard() for place in tensor.placements)


def is_cut_first(tensor: Tensor) -> bool:
    """Whether a tensor is cut along its first dimension alone."""
    assert isinstance(tensor, DTensor)
    return all(place.is_shard(0) or not place.is_shard() for place in tensor.placements)


def copies_of(tensor: Tensor, size: int) -> int:
    """How many of the run's `size` processes hold the same part of a tensor."""
    if not isinstance(tensor, DTensor):
        return size
    mesh, parts = tensor.device_mesh, 1
    for dimension, place in enumerate(tensor.placements):
        parts *= mesh.size(dimension) if place.is_shard() else 1
    return size // parts


def sum_copies(grad: Tensor, like: Tensor) -> None:
    """Sums the gradient of a part over the processes that hold the same part of a tensor."""
    if isinstance(like, DTensor):
        for dimension, place in enumerate(like.placements):
            if place.is_replicate() and like.device_mesh.size(dimension) > 1:
                dist.all_reduce(grad, group=like.device_mesh.get_group(dimension))


def join_parts(part: Tensor, like: Tensor) -> Tensor:
    """All of a tensor that is divided as `like` is, from the parts of the processes."""
    assert isinstance(like, DTensor)
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=like.shape,
                              stride=like.stride()).full_tensor()  # fmt: skip


def cut_parts(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has, divided as `like` is."""
    assert isinstance(like, DTensor)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
