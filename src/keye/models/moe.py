"""Mixture of experts: router in float32, top-k experts, grouped matrix products.

Legend: T tokens, E experts, K experts a token, d model width, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from keye.config import TextConfig
from keye.models.layers import MLP, Layer
from keye.ops.cpu.gemv import LEAST_EXPERT_NUMBERS
from keye.ops.elementwise import Elementwise
from keye.ops.registry import find_grouped_matmul, mix_experts, score_experts

#: Rows of one expert's matrix product are padded to a multiple of this in large steps: CPU libraries build a kernel for
#: every new shape, so few shapes are faster than exact ones.
ROW_MULTIPLE = 64


class Experts(Layer):
    """Fused expert weights in the official layout: x @ gate_up_proj[e] -> [gate | up], then @ down_proj[e]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        E, d, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, d, 2 * inner))
        self.down_proj = nn.Parameter(torch.empty(E, inner, d))

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor | None:
        """Tokens `x` [T, d] through their `chosen` experts int64 [T, K], summed with `weights` float32 [T, K], in one
        call; None where that would not be faster."""
        return mix_experts(x, weights, chosen, self.gate_up_proj, self.down_proj)

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        """`x` [rows, d] sorted by expert, `sizes` rows of each expert -> [rows, d]."""
        return run_experts(x, self.gate_up_proj, self.down_proj, sizes, self.elementwise)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, d, I."""
        experts, inner, d = self.down_proj.shape
        return experts, d, inner

    def project_up(self, x: Tensor, sizes: list[int]) -> Tensor:
        """The first of the two products alone: [rows, d] -> [rows, 2I]."""
        return _multiply(x, self.gate_up_proj, sizes)

    def project_down(self, x: Tensor, sizes: list[int]) -> Tensor:
        """The second one: [rows, I] -> [rows, d]."""
        return _multiply(x, self.down_proj, sizes)


def run_experts(x: Tensor, gate_up: Tensor, down: Tensor, sizes: list[int], elementwise: Elementwise) -> Tensor:
    """`x` [rows, d] sorted by expert through weights [E, d, 2I] and [E, I, d]: [rows, d]."""
    if (matmul := find_grouped_matmul(x, gate_up)) is not None:
        return matmul(elementwise.swiglu(matmul(x, gate_up, sizes)), down, sizes)
    if _has_gradients(x, gate_up, down):
        out: Tensor = GroupedProduct.apply(elementwise.swiglu(GroupedProduct.apply(x, gate_up, sizes)), down, sizes)
        return out
    weights = zip(x.split(sizes), gate_up.unbind(0), down.unbind(0), strict=True)
    parts = [elementwise.swiglu(part @ up) @ own for part, up, own in weights if part.shape[0]]
    return torch.cat(parts) if parts else x @ x.new_zeros(x.shape[1], down.shape[2])


def _multiply(x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    if (matmul := find_grouped_matmul(x, weight)) is not None:
        return matmul(x, weight, sizes)
    if _has_gradients(x, weight):
        out: Tensor = GroupedProduct.apply(x, weight, sizes)
        return out
    return torch.cat([part @ own for part, own in zip(x.split(sizes), weight.unbind(0), strict=True) if part.shape[0]])


def _has_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class GroupedProduct(torch.autograd.Function):
    """`x` [rows, K], sorted by expert with `sizes` rows of each, times `weight` [E, K, M]: [rows, M]. Results and
    gradients of all experts are written where they belong, once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        out = x.new_empty(len(x), weight.shape[2])
        for part, own, target in zip(x.split(sizes), weight, out.split(sizes), strict=True):
            torch.mm(part, own, out=target)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, weight), sizes = ctx.saved_tensors, ctx.sizes
        to_x, to_weight, parts = None, None, grad.split(sizes)
        if ctx.needs_input_grad[0]:
            to_x = torch.empty_like(x)
            for part, own, target in zip(parts, weight, to_x.split(sizes), strict=True):
                torch.mm(part, own.mT, out=target)
        if ctx.needs_input_grad[1]:
            to_weight = torch.empty_like(weight)
            for part, rows, target in zip(parts, x.split(sizes), to_weight, strict=True):
                torch.mm(rows.mT, part, out=target)  # zeros where an expert has no rows
        return to_x, to_weight, None


def lay_out_for_decoding(network: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """Has the weights of large experts lie in memory with the inner dimension contiguous, shapes as before, where few
    rows meet them faster so. For a network on the meta device that gets memory on `device` by `to_empty`."""
    if dtype != torch.bfloat16 or torch.device(device).type != "cpu":
        return
    for module in network.modules():
        if isinstance(module, Experts) and module.gate_up_proj[0].numel() >= LEAST_EXPERT_NUMBERS:
            for name in ("gate_up_proj", "down_proj"):
                plain = getattr(module, name)
                setattr(
                    module, name, nn.Parameter(torch.empty_like(plain.mT, memory_format=torch.contiguous_format).mT)
                )


class Router(nn.Linear):
    """Scores of all experts, in float32 whatever the weight's dtype: never quantised or sharded."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config.hidden_size, config.num_experts, bias=False)
        self.top_k, self.normalise = config.num_experts_per_tok, config.norm_topk_prob

    def forward(self, x: Tensor) -> Tensor:
        """[T, d] -> float32 [T, E]."""
        return score_experts(x, self.weight)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Scores float32 [T, E] -> weights float32 and numbers int64 [T, K] of the chosen experts."""
        weights, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True) if self.normalise else weights, chosen


class GroupRouter(Router):
    """The router of DeepSeek-V3: sigmoid scores, experts in groups, and a bias that takes part in the choice alone."""

    e_score_correction_bias: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        assert config.group_routing is not None
        self.routing = config.group_routing
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores, routing = logits.sigmoid(), self.routing
        groups = (scores + self.e_score_correction_bias).unflatten(1, (routing.n_group, -1))
        best = groups.topk(2, dim=-1).values.sum(-1).topk(routing.topk_group, dim=-1).indices
        closed = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, False)
        chosen = groups.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(1).topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * routing.routed_scaling_factor, chosen

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GroupRouter:
        """Moves between devices; the bias stays in float32, since it decides between nearly equal scores."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        self.e_score_correction_bias = moved if moved.dtype == bias.dtype else bias.to(moved.device)
        return self


class MoE(Layer):
    """Routes each token to its top-k experts and sums their outputs with the router's weights; shared experts, where
    there are any, are an MLP whose output is added for every token.

    `mix_adapted` goes before `mix` where adapters change the experts: (self, x, weights, chosen) -> the sums, or None
    where no row uses one.
    """

    mix_adapted: Callable[[MoE, Tensor, Tensor, Tensor], Tensor | None] | None = None

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate = Router(config) if config.group_routing is None else GroupRouter(config)
        self.experts = Experts(config)
        if shared := config.n_shared_experts:
            self.shared_experts: MLP | None = MLP(config.hidden_size, shared * config.moe_intermediate_size)
        else:
            self.shared_experts = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, d] -> output [T, d], router logits float32 [T, E], chosen experts int64 [T, K]."""
        logits = self.gate(x)
        weights, chosen = self.gate.choose(logits)
        out = None if self.mix_adapted is None else self.mix_adapted(self, x, weights, chosen)
        if out is None:
            out = self.mix(x, weights, chosen)
        return out if self.shared_experts is None else out + self.shared_experts(x), logits, chosen

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The outputs of the `chosen` experts [T, K] of each token, summed with their `weights`: [T, d]."""
        mix = getattr(self.experts, "mix", None)  # what stands in place of the experts need not have it
        if mix is not None and (mixed := mix(x, weights, chosen)) is not None:
            return mixed
        count = self.gate.weight.shape[0]
        return mix_by_rows(self.experts, x, weights, chosen, count, self.elementwise.weighted_sum)


def mix_by_rows(
    experts: Callable[[Tensor, list[int]], Tensor], x: Tensor, weights: Tensor, chosen: Tensor, count: int,
    weighted_sum: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """As `MoE.mix`, of `count` experts that take rows of tokens and the number of rows of each expert."""
    token_of_row, row_of_slot, sizes = plan_rows(chosen, count)
    y = experts(Dispatch.apply(x, token_of_row, row_of_slot), sizes)
    out: Tensor = Combine.apply(y, weights.to(x.dtype), row_of_slot, token_of_row, weighted_sum)
    return out


def plan_rows(chosen_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Orders (token, expert) pairs by expert, with padding rows that nothing reads.

    Returns the token of each row int64 [rows], the row of each pair int64 [T, K], and rows per expert.
    """
    flat = chosen_TK.flatten()
    counts = torch.bincount(flat, minlength=experts)
    multiple = ROW_MULTIPLE if flat.numel() >= ROW_MULTIPLE * experts else 1
    padded = (counts + multiple - 1) // multiple * multiple
    order = flat.argsort(stable=True)
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    rows = torch.arange(flat.numel(), device=flat.device) + shift[flat[order]]
    sizes = padded.tolist()
    token_of_row = flat.new_zeros(sum(sizes))
    token_of_row[rows] = order // chosen_TK.shape[1]
    row_of_slot = torch.empty_like(flat)
    row_of_slot[order] = rows
    return token_of_row, row_of_slot.view_as(chosen_TK), sizes


class Dispatch(torch.autograd.Function):
    """x[token_of_row], with a gather instead of a scatter-add in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_slot)
        return x.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (row_of_slot,) = ctx.saved_tensors
        total = grad.index_select(0, row_of_slot[:, 0])
        for k in range(1, row_of_slot.shape[1]):
            total = total + grad.index_select(0, row_of_slot[:, k])
        return total, None, None


class Combine(torch.autograd.Function):
    """`weighted_sum(y[row_of_slot], weights)`, [T, d] of the rows of experts and `weights` [T, K], with a backward pass
    by rows that holds the outputs of one expert a token in float32 at most."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weights: Tensor, row_of_slot: Tensor, token_of_row: Tensor,
        weighted_sum: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(y, weights, row_of_slot, token_of_row)
        return weighted_sum(y.index_select(0, row_of_slot.flatten()).view(*row_of_slot.shape, y.shape[1]), weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        y, weights, row_of_slot, token_of_row = ctx.saved_tensors
        to_y, to_weights = None, None
        if ctx.needs_input_grad[0]:
            weight_of_row = weights.new_zeros(len(y))  # that of padding stays zero
            weight_of_row[row_of_slot.flatten()] = weights.flatten()
            to_y = grad.index_select(0, token_of_row) * weight_of_row.unsqueeze(1)
        if ctx.needs_input_grad[1]:
            wide = grad.float()
            parts = [(y.index_select(0, rows).float() * wide).sum(1) for rows in row_of_slot.unbind(1)]
            to_weights = torch.stack(parts, dim=1).to(weights.dtype)
        return to_y, to_weights, None, None, None
