"""Tensor parallelism: each process of a group has some heads of every attention, a part of the width of every dense MLP
and some experts of each routed layer.

What passes between layers is the same in all processes of a group, and so are norms, routers, indexers, embeddings,
head and vision tower. Each process learns from tokens of its own, so the loss is a sum over the processes, and the
gradient of what all have is a part of a sum, which the optimiser adds up. Divided weights need all of the gradient of
their output: where outputs are added up, so are their gradients.

Experts are divided by number, not by width: their first matrix holds two of that width side by side, and a part of both
would be no stretch of it that checkpoints of other sizes could read.

Legend: T tokens, d model width, n processes of the group, E experts.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from keye.config import ConfigError, TextConfig
from keye.models.attention import Attention
from keye.models.keye import KeyeModel
from keye.models.layers import MLP, Layer
from keye.models.moe import Combine, Dispatch, Experts, MoE, plan_rows, run_experts
from keye.ops import registry
from keye.train.collectives import add_outputs
from keye.train.parallel import local_part


def check_heads(parts: int, text: TextConfig, *, divides_experts: bool) -> None:
    """`ConfigError` where `parts` processes cannot divide the heads and widths of a model, and with `divides_experts`
    its experts."""
    if text.latent is not None:
        raise ConfigError(f"parallel.tensor is {parts}, but latent attention has no key heads to divide; leave it out")
    layers = range(text.num_hidden_layers)
    sizes = {"attention heads": text.num_attention_heads, "key heads": text.num_key_value_heads}
    if not all(map(text.is_moe_layer, layers)):
        sizes["numbers of an MLP's width (intermediate_size)"] = text.intermediate_size
    if divides_experts and any(map(text.is_moe_layer, layers)):
        sizes["experts of a layer"] = text.num_experts
    for name, size in sizes.items():
        if size % parts:
            raise ConfigError(f"parallel.tensor is {parts}, which does not divide the {size} {name}; choose a divisor")


class DividedLinear(nn.Module):
    """In place of a linear layer, under the same names. With `by_inputs`, this process has the weights of some inputs,
    and the outputs of all are added up; else those of some outputs, which it alone computes."""

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh, *, by_inputs: bool, shards: bool) -> None:
        """`mesh` has the dimensions "replica", whose processes hold the same heads, and "tensor"; `shards` as in
        `divide_parameter`."""
        super().__init__()
        self.group = mesh.get_group("tensor") if by_inputs else None
        self.weight = divide_parameter(linear.weight, mesh, int(by_inputs), shards=shards)
        bias: Tensor | None = linear.bias
        self.bias = bias if by_inputs or bias is None else divide_parameter(bias, mesh, 0, shards=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in / n] -> [T, out] with `by_inputs`, else [T, in] -> [T, out / n]."""
        bias = None if self.bias is None else local_part(self.bias)
        if self.group is None:
            return registry.linear(x, local_part(self.weight), bias)
        out = add_outputs(registry.linear(x, local_part(self.weight)), self.group)
        return out if bias is None else out + bias


class OwnExperts(Layer):
    """In place of `Experts`, under the same names: this process has some experts, and their outputs are added to those
    of the others."""

    def __init__(self, experts: Experts, mesh: DeviceMesh, *, shards: bool) -> None:
        """As `DividedLinear`."""
        super().__init__()
        self.elementwise = experts.elementwise
        self.group, self.number = mesh.get_group("tensor"), mesh.get_local_rank("tensor")
        self.gate_up_proj = divide_parameter(experts.gate_up_proj, mesh, 0, shards=shards)
        self.down_proj = divide_parameter(experts.down_proj, mesh, 0, shards=shards)

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Tokens `x` [T, d] through their `chosen` experts int64 [T, K], summed with `weights` float32 [T, K]."""
        up, down = local_part(self.gate_up_proj), local_part(self.down_proj)
        count = len(up)
        own = chosen - count * self.number
        # What others compute meets a last row here, of zeros.
        token_of_row, row_of_slot, sizes = plan_rows(own.masked_fill((own < 0) | (own >= count), count), count + 1)
        rows = sum(sizes[:count])
        token_of_row, row_of_slot = F.pad(token_of_row[:rows], (0, 1)), row_of_slot.clamp(max=rows)
        sent = Dispatch.apply(x, token_of_row, row_of_slot)[:rows]
        y = F.pad(run_experts(sent, up, down, sizes[:count], self.elementwise), (0, 0, 0, 1))
        out = Combine.apply(y, weights.to(x.dtype), row_of_slot, token_of_row, self.elementwise.weighted_sum)
        return add_outputs(out, self.group)


def divide_heads(
    model: KeyeModel, mesh: DeviceMesh, *, divides_experts: bool, shards: bool
) -> set[nn.Parameter]:  # fmt: skip
    """Divides heads and widths of the decoder's layers, and with `divides_experts` their experts. Returns their
    matrices, which with `shards` have to be divided further."""
    matrices: list[nn.Parameter] = []
    for module in list(model.model.modules()):
        if isinstance(module, Attention):
            names = {"q_proj": False, "k_proj": False, "v_proj": False, "o_proj": True}
        elif isinstance(module, MLP):
            names = {"gate_proj": False, "up_proj": False, "down_proj": True}
        else:
            names = {}
        for name, by_inputs in names.items():
            linear = module.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            divided = DividedLinear(linear, mesh, by_inputs=by_inputs, shards=shards)
            setattr(module, name, divided)
            matrices.append(divided.weight)
        if isinstance(module, MoE) and divides_experts:
            module.experts = own = OwnExperts(module.experts, mesh, shards=shards)  # type: ignore[assignment]
            matrices += own.parameters()
    return set(matrices)


def divide_parameter(parameter: Tensor, mesh: DeviceMesh, dimension: int, *, shards: bool) -> nn.Parameter:
    """This process's part of a parameter that every process has, cut along a dimension. With `shards` FSDP2 divides it
    further, among the processes that hold the same part."""
    where, places = (mesh["tensor"], [Shard(dimension)]) if shards else (mesh, [Replicate(), Shard(dimension)])
    part = distribute_tensor(parameter.detach(), where, places, src_data_rank=None)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


def choose_cut(parameter: nn.Parameter, width: int) -> Shard:
    """Where FSDP2 cuts a matrix of which this process has a part: along the model's width, which the part has all of.
    (Cut twice along the same dimension, the pieces of a process would be scattered.)"""
    assert isinstance(parameter, DTensor)
    (place,) = parameter.placements
    return Shard(next(number for number, size in enumerate(parameter.shape)
                      if size == width and not place.is_shard(number)))  # fmt: skip
