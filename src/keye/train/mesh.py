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
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from keye.config import ConfigError, KeyeConfig, TextConfig
from keye.models.keye import KeyeModel
from keye.models.quant_fill import quantized_weights
from keye.train.collectives import Gather, add_up, gather_rows
from keye.train.config import ParallelSettings
from keye.train.experts import divide_experts
from keye.train.packed import RowShare
from keye.train.parallel import Group, join_tensor
from keye.train.tensor import check_heads, choose_cut, divide_heads
from keye.train.tree import IGNORE

#: Parameters of fewer numbers stay whole in every process.
LEAST_NUMBERS: Final = 1 << 13


def check_sizes(settings: ParallelSettings, size: int, text: TextConfig, *, shards: bool = False) -> None:
    """`ConfigError` where `size` processes, or a decoder's heads, widths and experts, cannot be divided as the settings
    say; with `shards` also what each process has of them."""
    for name in ("context", "tensor", "expert"):
        parts = getattr(settings, name)
        if size % parts:
            raise ConfigError(f"parallel.{name} is {parts}, which does not divide the {size} processes of the run; "
                              "start a multiple of it")  # fmt: skip
    if size % (parts := settings.context * settings.tensor):
        raise ConfigError(f"parallel.context times parallel.tensor is {parts}, which does not divide the {size} "
                          "processes of the run; start a multiple of it")  # fmt: skip
    experts = text.num_experts or 0
    if experts % settings.expert or (settings.expert > 1 and not experts):
        raise ConfigError(f"parallel.expert is {settings.expert}, which does not divide the {experts} experts of a "
                          "layer; choose a divisor")  # fmt: skip
    if settings.tensor > 1:
        check_heads(settings.tensor, text, divides_experts=settings.expert == 1)
        if shards and text.hidden_size % (parts := size // settings.tensor):
            raise ConfigError(f"parallel.shard with parallel.tensor = {settings.tensor} divides the hidden_size "
                              f"{text.hidden_size} among {parts} processes, which does not go evenly; start a divisor "
                              f"of it times {settings.tensor}, or set shard = false")  # fmt: skip


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
        check_sizes(settings, group.size, config.text, shards=shards)
        self.group, self.device, self.context, self.tensor = group, device, settings.context, settings.tensor
        #: Processes that learn from the same packs.
        self.mates = settings.context * settings.tensor
        self.data_rank, self.data_size = group.rank // self.mates, group.size // self.mates
        self.shards = shards and group.size > 1
        self.mesh: DeviceMesh | None = None
        self._gathered: list[Place] = []
        self._rows, self._anchor = (0, 0, 0), cast(Tensor | float, 0.0)
        self._whole_anchor: Tensor | float = 0.0
        self.contexts: DeviceMesh | None = None
        self.tensors: DeviceMesh | None = None
        self.experts: DeviceMesh | None = None
        if settings.expert > 1:
            sizes: tuple[int, ...] = (group.size // settings.expert, settings.expert)
            self.experts = init_device_mesh(device.type, sizes, mesh_dim_names=("replica", "expert"))
        if settings.context > 1:
            sizes, names = (self.data_size, settings.context, settings.tensor), ("data", "context", "tensor")
            self.contexts = init_device_mesh(device.type, sizes, mesh_dim_names=names)
        if settings.tensor > 1:
            sizes = group.size // settings.tensor, settings.tensor
            self.tensors = init_device_mesh(device.type, sizes, mesh_dim_names=("replica", "tensor"))
        if self.shards:
            self.mesh = init_device_mesh(device.type, (group.size,), mesh_dim_names=("shard",))

    def divide(self, model: KeyeModel) -> None:
        """Divides the parameters of a model that every process holds whole. Quantised models stay whole: what is
        trained on them is an adapter."""
        if self.mates > 1:
            model.model.register_forward_hook(self._set_anchor)
        if self.context > 1:
            self._divide_tokens(model)
        if self.group.size > 1:
            for p in model.model.parameters():  # experts lie in memory as decoding likes them, which FSDP2 refuses
                p.data = p.data.contiguous()
        heads = set() if self.tensors is None else self._divide_heads(model, self.tensors)
        experts = set() if self.experts is None else divide_experts(model, self.experts, self.tensors)
        if self.shards and not quantized_weights(model):
            self._divide_all(model, heads, experts)

    def _divide_all(self, model: KeyeModel, heads: set[nn.Parameter], experts: set[nn.Parameter]) -> None:
        """Divides weights among all processes: in decoder layers those of `heads`, the matrices of which a tensor group
        has parts, among these groups; without any, all but those of `experts`."""
        assert self.mesh is not None
        # Gradients are summed in float32 and not averaged: a loss is divided by the count of all processes.
        options: dict[str, Any] = {"mesh": self.mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
        if self.tensors is not None:
            choose = partial(choose_cut, width=model.config.text.hidden_size)
            options |= {"mesh": self.tensors["replica"], "shard_placement_fn": choose}
        decoder: Any = model.model
        for layer in decoder.layers:
            own = set(layer.parameters())
            fully_shard(layer, ignored_params=own - heads if heads else own & experts, **options)
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
        """Zero, to be added to the loss after the forward pass: with a gradient for the hidden states of this process,
        which others have used, even where it learns from no token."""
        anchor, self._anchor = self._anchor, 0.0
        return anchor

    def _set_anchor(self, module: nn.Module, arguments: Any, hidden: Tensor) -> None:
        self._anchor = hidden[:1].sum() * 0.0 if hidden.requires_grad else 0.0

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
        group, parts, number = self.contexts.get_group("context"), self.context, self._context_rank

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
            return nn.functional.pad(hidden, (0, 0, start, tokens - stop))

        model.model.register_forward_pre_hook(cut)
        model.model.register_forward_hook(widen)

    def _divide_heads(self, model: KeyeModel, mesh: DeviceMesh) -> set[nn.Parameter]:
        """Has each process of a tensor group compute its heads, widths and experts of all layers. Returns the matrices
        that `_divide_all` may divide further."""

        def share(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            arguments[2].copies = self.tensor

        model.model.register_forward_pre_hook(share)
        return divide_heads(model, mesh, divides_experts=self.experts is None, shards=self.shards)

    @property
    def _context_rank(self) -> int:
        return self.group.rank // self.tensor % self.context

    def keep_own_labels(self, micro: Any) -> Any:
        """A micro-batch in which this process learns from its own tokens alone."""
        if self.mates == 1:
            return micro
        tokens, number = len(micro.labels), self._context_rank
        start, stop = (tokens * part // self.context for part in (number, number + 1))
        own = slice(start + self.group.rank % self.tensor, stop, self.tensor)
        labels = torch.full_like(micro.labels, IGNORE)
        labels[own] = micro.labels[own]
        return replace(micro, labels=labels)
