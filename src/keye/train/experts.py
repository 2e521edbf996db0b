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
from keye.models.moe import Experts, MoE, mix_by_rows, run_experts
from keye.train.collectives import gather_rows


class DividedExperts(Layer):
    """In place of `Experts`, under the same names: rows go to the process that has their expert, and come back."""

    def __init__(self, experts: Experts, mesh: DeviceMesh, tensors: DeviceMesh | None) -> None:
        """`mesh` has the dimensions "replica", whose processes hold the same experts, and "expert"; `tensors` the
        dimension "tensor", whose processes have the same tokens."""
        super().__init__()
        self.elementwise, self.count = experts.elementwise, len(experts.down_proj)
        self.group, self.processes, self.tensors = mesh.get_group("expert"), mesh.size(1), tensors
        for name in ("gate_up_proj", "down_proj"):
            p = getattr(experts, name)
            part = distribute_tensor(p.detach(), mesh, [Replicate(), Shard(0)], src_data_rank=None)
            self.register_parameter(name, nn.Parameter(part, requires_grad=p.requires_grad))

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor | None:
        """As `Experts.mix`: each process that has the same tokens sends a share of them; None where no other has."""
        if self.tensors is None:
            return None
        number, parts = self.tensors.get_local_rank("tensor"), self.tensors.size(1)
        stops = [len(x) * (part + 1) // parts for part in range(parts)]
        own = slice([0, *stops][number], stops[number])
        mixed = mix_by_rows(self, x[own], weights[own], chosen[own], self.count, self.elementwise.weighted_sum)
        return gather_rows(stops, number, self.tensors.get_group("tensor"), mixed)

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


def divide_experts(model: nn.Module, mesh: DeviceMesh, tensors: DeviceMesh | None) -> set[nn.Parameter]:
    """Divides the experts of all layers; returns their parameters. Meshes as in `DividedExperts`."""
    divided: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, MoE):
            module.experts = DividedExperts(module.experts, mesh, tensors)  # type: ignore[assignment]
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
