"""Operations over the processes of a group, with gradients: gathering and adding up, whose gradients are summed in
float32.

Each process has tensors of its own, also where their numbers are equal, and the loss is the sum of those of all
processes: the gradient of a tensor is that of this sum.
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch
import torch.distributed as dist
from torch import Tensor

# Their names in torch 2.13; older ones warn there.
_all_gather: Final = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Final = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Gather(torch.autograd.Function):
    """The whole [n, ...] of a tensor of which each process has a part; the gradient is summed and cut."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, n: int, size: int) -> Tensor:
        ctx.rows, ctx.size, ctx.dtype = part.shape[0], size, part.dtype
        most = -(-n // size)
        padded = part.new_zeros(most, *part.shape[1:])
        padded[: part.shape[0]] = part
        full = part.new_empty(most * size, *part.shape[1:])
        _all_gather(full, padded)
        return full[:n]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        most = -(-grad.shape[0] // ctx.size)
        padded = grad.new_zeros(most * ctx.size, *grad.shape[1:], dtype=torch.float32)
        padded[: grad.shape[0]] = grad
        part = padded.new_empty(most, *grad.shape[1:])
        _reduce_scatter(part, padded)
        return part[: ctx.rows].to(ctx.dtype), None, None


def gather_rows(stops: list[int], number: int, group: dist.ProcessGroup, rows: Tensor) -> Tensor:
    """All rows of a tensor of which process `number` has those up to `stops[number]`."""
    return cast(Tensor, GatherRows.apply(rows, stops, number, group))


class GatherRows(torch.autograd.Function):
    """Rows of all processes, in order; the gradient of each goes back to the process that has it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, stops: list[int], number: int, group: dist.ProcessGroup) -> Tensor:
        starts = [0, *stops[:-1]]
        ctx.places, ctx.number, ctx.group = list(zip(starts, stops, strict=True)), number, group
        most = max(stop - start for start, stop in ctx.places)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        full = rows.new_empty(most * len(stops), *rows.shape[1:])
        _all_gather(full, padded, group=group)
        pieces = full.split(most)
        return torch.cat([piece[: stop - start] for piece, (start, stop) in zip(pieces, ctx.places, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        most = max(stop - start for start, stop in ctx.places)
        padded = grad.new_zeros(most * len(ctx.places), *grad.shape[1:], dtype=torch.float32)
        for piece, (start, stop) in zip(padded.split(most), ctx.places, strict=True):
            piece[: stop - start] = grad[start:stop]
        mine = padded.new_empty(most, *grad.shape[1:])
        _reduce_scatter(mine, padded, group=ctx.group)
        start, stop = ctx.places[ctx.number]
        return mine[: stop - start].to(grad.dtype), None, None, None


def add_outputs(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of a tensor over the processes of a group; the gradient of each part is the sum of theirs."""
    return cast(Tensor, AddOutputs.apply(part, group))


class AddOutputs(torch.autograd.Function):
    """Sums in float32, forward and backward."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return add_up(group, part.float()).to(part.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return add_up(ctx.group, grad.float()).to(grad.dtype), None


def add_up(group: dist.ProcessGroup, tensor: Tensor) -> Tensor:
    """The sum of a tensor over the processes of a group, without gradients."""
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
