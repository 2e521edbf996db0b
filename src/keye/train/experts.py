"""Expert parallelism: each process of a group has some experts of every layer, and the rows of tokens travel to them.

Legend: E experts, n processes of the group, E/n experts of each, d model width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from keye.models.layers import Layer
from keye.models.moe import Experts, MoE, run_experts


class DividedExperts(Layer):
    """In place of `Experts`, under the same names: rows go to the process that has their expert, and come back."""

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        """`mesh` has the dimensions "replica", whose processes hold the same experts, and "expert"."""
        super().__init__()
        self.elementwise = experts.elementwise
        self.group, self.processes = mesh.get_group("expert"), mesh.size(1)
        for name in ("gate_up_proj", "down_proj"):
            p = getattr(experts, name)
            part = distribute_tensor(p.detach(), mesh, [Replicate(), Shard(0)], src_data_rank=None)
            self.register_parameter(name, nn.Parameter(part, requires_grad=p.requires_grad))

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        """`x` [rows, d] sorted by expert, `sizes` rows of each of the E experts -> [rows, d]."""
        n = self.processes
        sent = torch.tensor(sizes, device=x.device).view(n, -1)
        received = torch.empty_like(sent)  # rows from each process for each expert of this one
        dist.all_to_all_single(received, sent, group=self.group)
        out_splits, in_splits = received.sum(1).tolist(), sent.sum(1).tolist()
        rows = cast(Tensor, Exchange.apply(x, out_splits, in_splits, self.group))
        order = order_by_expert(received)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=x.device)
        up, down = (_local(getattr(self, name)) for name in ("gate_up_proj", "down_proj"))
        y = run_experts(rows[order], up, down, received.sum(0).tolist(), self.elementwise)
        return cast(Tensor, Exchange.apply(y[back], in_splits, out_splits, self.group))


def divide_experts(model: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Divides the experts of all layers; returns their parameters."""
    divided: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, MoE):
            module.experts = DividedExperts(module.experts, mesh)  # type: ignore[assignment]
            divided |= set(module.experts.parameters())
    return divided


def order_by_expert(counts: Tensor) -> Tensor:
    """The rows of a block sorted by process, then expert, in the order of experts, then processes: int64 [rows].
    `counts` int64 [n, E/n]."""
    flat = counts.flatten()
    starts = (flat.cumsum(0) - flat).view_as(counts).T.flatten()
    lengths = counts.T.flatten()
    shift = starts - (lengths.cumsum(0) - lengths)
    return torch.repeat_interleave(shift, lengths) + torch.arange(int(lengths.sum()), device=counts.device)


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


class Exchange(torch.autograd.Function):
    """Rows [sum(in_splits), d], of which process i gets `in_splits[i]`, -> rows [sum(out_splits), d] of all."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, out_splits: list[int], in_splits: list[int], group: dist.ProcessGroup
    ) -> Tensor:  # fmt: skip
        ctx.splits, ctx.group = (out_splits, in_splits), group
        out = rows.new_empty(sum(out_splits), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), out_splits, in_splits, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        out_splits, in_splits = ctx.splits
        back = grad.new_empty(sum(in_splits), grad.shape[1])
        dist.all_to_all_single(back, grad.contiguous(), in_splits, out_splits, group=ctx.group)
        return back, None, None, None
