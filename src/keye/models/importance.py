"""How much each input of a matrix counts: its mean squared activation while a model answers prompts.

An error of a weight changes an output by the error times its input, so that the squared error of outputs is that of
weights with each input's mean square as its weight.

Legend: T tokens, K inputs of a matrix, E experts, C experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from keye.models.keye import KeyeModel
from keye.models.moe import MoE, Router
from keye.ops.elementwise import swiglu
from keye.quant.layers import QuantizedWeight, QuantLinear

#: Tokens of the average expert that are added to what each one saw: of those that were rarely chosen little is known.
PRIOR_TOKENS: Final = 16.0


class Squares:
    """Sums of squared inputs by the official names of matrices: float64 [K], or [E, K] for experts."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Inputs [..., K] of a matrix."""
        rows = x.detach().reshape(-1, x.shape[-1])
        self._put(name, rows.float().square().sum(0).double().cpu(), torch.tensor(float(len(rows))))

    def add_experts(self, name: str, expert: int, experts: int, rows: Tensor) -> None:
        """Inputs [n, K] of one of `experts` experts."""
        sums, tokens = torch.zeros(experts, rows.shape[1], dtype=torch.float64), torch.zeros(experts)
        sums[expert], tokens[expert] = rows.float().square().sum(0).double().cpu(), len(rows)
        self._put(name, sums, tokens)

    def means(self) -> dict[str, Tensor]:
        """Mean squares as float32; an input that was always 0 counts a little, since another prompt may use it."""
        means = {}
        for name, sums in self._sums.items():
            tokens = self._tokens[name]
            if sums.dim() == 2:
                average = sums.sum(0) / tokens.sum().clamp_min(1)
                mean = (sums + PRIOR_TOKENS * average) / (tokens.unsqueeze(1) + PRIOR_TOKENS)
            else:
                mean = sums / tokens.clamp_min(1)
            least = 1e-3 * mean.mean(-1, keepdim=True)
            means[name] = (mean.clamp_min(least) + 1e-12).float()
        return means

    def _put(self, name: str, sums: Tensor, tokens: Tensor) -> None:
        if name in self._sums:
            self._sums[name] += sums
            self._tokens[name] += tokens
        else:
            self._sums[name], self._tokens[name] = sums, tokens


@contextmanager
def observe_squares(model: KeyeModel) -> Iterator[Squares]:
    """Counts what the matrices of a model meet while the block runs; whether they are quantised or not."""
    squares, hooks = Squares(), []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | QuantLinear) and not isinstance(layer, Router):
            hooks.append(layer.register_forward_pre_hook(partial(_meet, squares, f"{name}.weight")))
        elif isinstance(layer, MoE):
            hooks.append(layer.register_forward_hook(partial(_meet_experts, squares, f"{name}.experts")))
    try:
        yield squares
    finally:
        for hook in hooks:
            hook.remove()


def _meet(squares: Squares, name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    squares.add(name, inputs[0])


def _meet_experts(squares: Squares, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], outputs: Any) -> None:
    """What the chosen experts meet, which is computed once more: fused kernels show nothing of it."""
    assert isinstance(layer, MoE)
    x, chosen_TC = inputs[0], outputs[2]
    up: Any = layer.experts.gate_up_proj  # of plain or of quantised experts
    E = up.shape[0]
    for e in chosen_TC.unique().tolist():
        rows = x[(chosen_TC == e).any(1)]
        weight = up.tensor[e].dequantize(x.dtype) if isinstance(up, QuantizedWeight) else up[e].t()
        squares.add_experts(f"{name}.gate_up_proj", e, E, rows)
        squares.add_experts(f"{name}.down_proj", e, E, swiglu(nn.functional.linear(rows, weight)))
