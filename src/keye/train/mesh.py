"""How the processes of a run divide a model: FSDP2 for the decoder, parts that are gathered once a step for the rest.

Legend: a *part* is what one process holds of a parameter (`DTensor`, cut along its first dimension).

Every process passes once through each decoder layer in a micro-batch, so FSDP2 gathers a layer before it is used and
frees it after. The vision tower, the projector, embeddings and the head run as often as a process has images and
chunks, which differs between processes: their large matrices are gathered once before a micro-batch and their
gradients scattered once after it, whatever happens between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from keye.config import ConfigError, KeyeConfig
from keye.models.keye import KeyeModel
from keye.models.quant_fill import quantized_weights
from keye.train.config import ParallelSettings
from keye.train.experts import divide_experts
from keye.train.packed import RowShare
from keye.train.parallel import Group, join_tensor
from keye.train.tree import IGNORE

#: Parameters of fewer numbers stay whole in every process.
LEAST_NUMBERS: Final = 1 << 13
# Their names in torch 2.13; older ones warn there.
_all_gather: Final = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Final = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def check_sizes(settings: ParallelSettings, size: int, experts: int) -> None:
    """`ConfigError` where `size` processes, or a model's number of experts in a layer, cannot be divided as the
    settings say."""
    for name, parts in (("context", settings.context), ("expert", settings.expert)):
        if size % parts:
            raise ConfigError(f"parallel.{name} is {parts}, which does not divide the {size} processes of the run; "
                              "start a multiple of it")  # fmt: skip
    if experts % settings.expert or (settings.expert > 1 and not experts):
        raise ConfigError(f"parallel.expert is {settings.expert}, which does not divide the {experts} experts of a "
                          "layer; choose a divisor")  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A matrix that is gathered once a micro-batch: an attribute of a module, in every module that has it."""

    owners: tuple[tuple[nn.Module, str], ...]
    parameter: nn.Parameter


class Mesh:
    """The processes of a run and what each holds. With one process nothing is divided."""

    def __init__(
        self, settings: ParallelSettings, group: Group, config: KeyeConfig, device: torch.device, shards: bool
    ) -> None:  # fmt: skip
        """`shards`: the processes divide all weights, not those of `settings` alone."""
        check_sizes(settings, group.size, config.text.num_experts or 0)
        self.group, self.device, self.context = group, device, settings.context
        self.data_rank, self.data_size = group.rank // settings.context, group.size // settings.context
        self.shards = shards and group.size > 1
        self.mesh: DeviceMesh | None = None
        self._gathered: list[Place] = []
        self._rows, self._anchor = (0, 0, 0), cast(Tensor | float, 0.0)
        self._whole_anchor: Tensor | float = 0.0
        self.contexts: DeviceMesh | None = None
        self.experts: DeviceMesh | None = None
        if settings.expert > 1:
            sizes = group.size // settings.expert, settings.expert
            self.experts = init_device_mesh(device.type, sizes, mesh_dim_names=("replica", "expert"))
        if settings.context > 1:
            names = ("data", "context")
            self.contexts = init_device_mesh(device.type, (self.data_size, settings.context), mesh_dim_names=names)
        if self.shards:
            self.mesh = init_device_mesh(device.type, (group.size,), mesh_dim_names=("shard",))

    def divide(self, model: KeyeModel) -> None:
        """Divides the parameters of a model that every process holds whole. Quantised models stay whole: what is
        trained on them is an adapter."""
        if self.context > 1:
            self._divide_tokens(model)
        divided = set() if self.experts is None else divide_experts(model, self.experts)
        if self.mesh is None or quantized_weights(model):
            return
        # Gradients are summed in float32 and not averaged: a loss is divided by the count of all processes.
        options: dict[str, Any] = {"mesh": self.mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
        decoder: Any = model.model
        for layer in decoder.layers:
            fully_shard(layer, ignored_params=divided & set(layer.parameters()), **options)
            layer.set_force_sum_reduction_for_comms(True)  # gloo knows sums alone
            layer.set_gradient_divide_factor(1.0)
        inside = {id(p) for layer in decoder.layers for p in layer.parameters()}
        outside = {p for p in decoder.parameters() if id(p) not in inside}
        fully_shard(decoder, ignored_params=outside, **options)
        decoder.register_forward_pre_hook(self._tie_to_gathered)
        self._gathered = list(self._divide_rest(model, inside))

    def _tie_to_gathered(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Has gradients pass by every layer in each process: where the decoder is frozen, they would where a pack has
        pictures alone, and layers are gathered by all processes together."""
        x, *others = arguments
        return (x + self._whole_anchor, *others)

    def _divide_rest(self, model: KeyeModel, inside: set[int]) -> Iterator[Place]:
        """Divides large parameters outside the decoder layers."""
        assert self.mesh is not None
        owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        decoder_layers = set(model.model.layers.modules())
        for module in model.modules():
            if module in decoder_layers:
                continue
            for name, p in module.named_parameters(recurse=False):
                if p.numel() >= LEAST_NUMBERS and p.is_floating_point():
                    owners.setdefault(p, []).append((module, name))
        for p, places in owners.items():
            part = nn.Parameter(distribute_tensor(p.detach(), self.mesh, [Shard(0)], src_data_rank=None),
                                requires_grad=p.requires_grad)  # fmt: skip
            for module, name in places:
                module.register_parameter(name, part)
            yield Place(tuple(places), part)

    def anchor(self) -> Tensor | float:
        """Zero, to be added to the loss after the forward pass: with a gradient for all tokens of this process, whose
        keys others have attended to, even where it learns from none of them."""
        anchor, self._anchor = self._anchor, 0.0
        return anchor

    @contextmanager
    def gathered(self, model: KeyeModel) -> Iterator[Tensor | float]:
        """In the block, for one forward and backward pass, the parameters outside the decoder layers are whole. What it
        yields is to be added to the loss: zero, with a gradient for each of them, so that no process misses one."""
        if not self._gathered:
            yield 0.0
            return
        anchor: Tensor | float = 0.0
        try:
            for place in self._gathered:
                assert isinstance(place.parameter, DTensor)
                full = Gather.apply(place.parameter.to_local(), place.parameter.shape[0], self.group.size)
                if full.requires_grad:
                    anchor = anchor + full.flatten()[0] * 0.0
                for module, name in place.owners:
                    del module._parameters[name]
                    module.__dict__[name] = full
            self._whole_anchor = anchor
            yield anchor
        finally:
            self._whole_anchor = 0.0
            for place in self._gathered:
                for module, name in place.owners:
                    module.__dict__.pop(name, None)
                    module.register_parameter(name, place.parameter)

    def gather_state(self, model: KeyeModel) -> dict[str, Tensor]:
        """The whole state of the model: in process 0 in main memory where it is divided, and empty elsewhere."""
        state = model.state_dict()
        if not any(isinstance(tensor, DTensor) for tensor in state.values()):
            return state
        gathered = {}
        for name, tensor in state.items():
            full = join_tensor(tensor)
            if self.group.rank == 0:
                gathered[name] = full.cpu()
        return gathered

    def _divide_tokens(self, model: KeyeModel) -> None:
        """Has each process of a context group compute its part of the tokens between embeddings and head."""
        assert self.contexts is not None
        group, parts, number = self.contexts.get_group("context"), self.context, self.group.rank % self.context

        def cut(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            x, position_ids, step = arguments
            stops = [len(x) * (part + 1) // parts for part in range(parts)]
            start, stop = ([0, *stops])[number], stops[number]
            gather, total = partial(gather_rows, stops, number, group), partial(add_up, group)
            step.divide(RowShare(start, stop, parts, gather, total))
            self._rows = start, stop, len(x)
            return x[start:stop], position_ids[:, start:stop], step

        def widen(module: nn.Module, arguments: tuple[Any, ...], hidden: Tensor) -> Tensor:
            start, stop, tokens = self._rows
            self._anchor = hidden.flatten()[0] * 0.0 if hidden.requires_grad else 0.0
            return nn.functional.pad(hidden, (0, 0, start, tokens - stop))

        model.model.register_forward_pre_hook(cut)
        model.model.register_forward_hook(widen)

    def keep_own_labels(self, micro: Any) -> Any:
        """A micro-batch in which this process learns from its own tokens alone."""
        if self.context == 1:
            return micro
        tokens, number = len(micro.labels), self.group.rank % self.context
        start, stop = (tokens * part // self.context for part in (number, number + 1))
        labels = torch.full_like(micro.labels, IGNORE)
        labels[start:stop] = micro.labels[start:stop]
        return replace(micro, labels=labels)


class Gather(torch.autograd.Function):
    """The whole [n, ...] of a tensor of which each process has a part; the gradient is summed in float32 and cut."""

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


def add_up(group: dist.ProcessGroup, tensor: Tensor) -> Tensor:
    """The sum of a tensor over the processes of a group, without gradients."""
    total = tensor.detach().clone()
    dist.all_reduce(total, group=group)
    return total


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
