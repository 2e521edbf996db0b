"""Several processes that train one model on one machine: each takes its own batches, gradients are summed.

On CPUs whose cores one process keeps busy badly, a process for each core trains faster than threads. All processes hold
the whole model and take the same steps; Muon's orthogonalisation is divided among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from keye.process import end_with_parent

#: How long a process waits for the others before it raises an error.
PATIENCE = timedelta(minutes=15)


class Group:
    """This process among `size`; with one process every method is the identity."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor (float32, the same shapes everywhere) by its sum over the processes."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

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

    def agree(self, value: float) -> float:
        """The value of process 0, for decisions that depend on the clock."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(shared, 0)
        return float(shared)


@contextmanager
def processes(size: int, folder: Path, follow: Callable[[Group], None]) -> Iterator[Group]:
    """Starts `size - 1` processes that run `follow(group)` beside this one, which gets the group of rank 0.

    `folder` holds the file through which they meet. The others are ended with this one.
    """
    if size == 1:
        yield Group()
        return
    meeting = folder / ".processes"
    meeting.unlink(missing_ok=True)
    context = get_context("spawn")
    others = [context.Process(target=_run, args=(follow, rank, size, meeting)) for rank in range(1, size)]
    for process in others:
        process.start()
    try:
        _join(0, size, meeting)
        yield Group(0, size)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for process in others:
            process.join(timeout=10)
            process.kill()
        meeting.unlink(missing_ok=True)


def _run(follow: Callable[[Group], None], rank: int, size: int, meeting: Path) -> None:
    end_with_parent()
    _join(rank, size, meeting)
    try:
        follow(Group(rank, size))
    finally:
        dist.destroy_process_group()


def _join(rank: int, size: int, meeting: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=PATIENCE)
