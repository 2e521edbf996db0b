"""Muon for matrices and AdamW for the rest, over a bfloat16 model with float32 master weights.

Muon (Jordan et al., 2024) orthogonalises the momentum of each matrix with a few Newton-Schulz steps; coefficients from
Polar Express (Amsel et al., 2025).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from keye.errors import KeyeError
from keye.train.config import StageConfig
from keye.train.parallel import Group
from keye.train.parts import choose_parameters

_COEFFICIENTS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                 (2.8769, -3.1427, 1.2046))  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A parameter that a stage changes. `is_matrix`: its last two dimensions are a matrix that follows Muon; else it
    follows AdamW. `lr` is its highest learning rate."""

    name: str
    parameter: nn.Parameter
    is_matrix: bool
    lr: float


def orthogonalise(x: Tensor) -> Tensor:
    """Approximately U V^T of each matrix of `x` [n, a, b], in bfloat16."""
    x = x.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in _COEFFICIENTS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Optimizer:
    """Steps `parameters`. State can be saved and restored by parameter name."""

    def __init__(
        self, parameters: Iterable[Trained], *, group: Group | None = None, weight_decay: float = 0.02,
        momentum: float = 0.95, betas: tuple[float, float] = (0.9, 0.97), clip: float = 1.0,
    ) -> None:  # fmt: skip
        trained = list(parameters)
        self.parameters = {each.name: each.parameter for each in trained}
        self.rates = {each.name: each.lr for each in trained}
        self.master = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        self.first = {name: torch.zeros_like(m) for name, m in self.master.items()}
        self.weight_decay, self.momentum, self.betas, self.clip = weight_decay, momentum, betas, clip
        self.group = group or Group()
        self.groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for each in trained:
            if each.is_matrix:
                self.groups[tuple(each.parameter.shape[-2:])].append(each.name)
        self.rest = [each.name for each in trained if not each.is_matrix]
        self.second = {name: torch.zeros_like(self.master[name]) for name in self.rest}
        self.count = 0

    @torch.no_grad()
    def step(self, factor: float) -> float:
        """One update from the gradients, at `factor` times the learning rates; the gradients are then cleared. Returns
        the gradient norm before clipping."""
        if self.group.size > 1:  # what one process's batch left out, another's may hold: all must send the same tensors
            for p in self.parameters.values():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads = {name: p.grad.float() for name, p in self.parameters.items() if p.grad is not None}
        self.group.sum(list(grads.values()))
        norm = float(torch.stack([g.norm() for g in grads.values()]).norm())
        if norm < float("inf"):  # else, also where it is NaN, skip the step rather than spoil the weights
            scale = min(1.0, self.clip / (norm + 1e-6))
            self.count += 1
            self._muon(grads, scale, factor)
            self._adam(grads, scale, factor)
            for name, p in self.parameters.items():
                p.copy_(self.master[name])
        for p in self.parameters.values():
            p.grad = None
        return norm

    def _muon(self, grads: dict[str, Tensor], scale: float, factor: float) -> None:
        for shape, names in self.groups.items():
            present = [name for name in names if name in grads]
            if not present:
                continue
            updates = []
            for name in present:
                grad = grads[name].mul_(scale)
                self.first[name].lerp_(grad, 1 - self.momentum)
                updates.append(grad.lerp(self.first[name], self.momentum).reshape(-1, *shape))
            joined = self.group.divide(torch.cat(updates), orthogonalise).float()
            for name, update in zip(present, joined.split([u.shape[0] for u in updates]), strict=True):
                master, rate = self.master[name], factor * self.rates[name]
                step = -rate * 0.2 * max(shape) ** 0.5
                master.mul_(1 - rate * self.weight_decay).add_(update.view_as(master), alpha=step)

    def _adam(self, grads: dict[str, Tensor], scale: float, factor: float) -> None:
        b1, b2 = self.betas
        bias1, bias2 = 1 - b1**self.count, 1 - b2**self.count
        for name in self.rest:
            if name not in grads:
                continue
            grad, master = grads[name].mul_(scale), self.master[name]
            self.first[name].lerp_(grad, 1 - b1)
            self.second[name].mul_(b2).addcmul_(grad, grad, value=1 - b2)
            denominator = (self.second[name] / bias2).sqrt_().add_(1e-8)
            master.addcdiv_(self.first[name], denominator, value=-factor * self.rates[name] / bias1)

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, as flat tensors."""
        parts = {"master": self.master, "first": self.first, "second": self.second}
        flat = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
        return {**flat, "count": torch.tensor(self.count)}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores what `state` returned; `KeyeError` when it is that of other parameters."""
        known = self.state()
        fits = state.keys() == known.keys() and all(tensor.shape == known[name].shape for name, tensor in state.items())
        if not fits:
            raise KeyeError("the saved optimiser state is that of other parameters; resume with the same stages")
        for name, tensor in known.items():
            tensor.copy_(state[name])
        self.count = int(state["count"])
        for name, p in self.parameters.items():
            p.copy_(self.master[name])


def mark_trainable(model: nn.Module, stage: StageConfig) -> list[Trained]:
    """Marks and returns the parameters that a stage changes; everything else stays as it is."""
    trained = []
    for name, parameter in choose_parameters(model, stage).items():
        is_matrix = stage.optimizer == "muon" and is_muon_matrix(name, parameter)
        trained.append(Trained(name, parameter, is_matrix, highest_rate(stage, name, is_matrix)))
    return trained


def highest_rate(stage: StageConfig, name: str, is_matrix: bool) -> float:
    """The learning rate of a parameter before warm-up and decay."""
    if name.startswith("visual.") and stage.vision_lr is not None:
        return stage.vision_lr
    if name.startswith("mlp_AR.") and stage.projector_lr is not None:
        return stage.projector_lr
    return stage.lr if is_matrix or stage.optimizer == "adamw" else stage.adam_lr * adam_scale(name)


def adam_scale(name: str) -> float:
    """The head learns at a tenth of the rate: AdamW gives rare tokens steps as large as common ones, and their rows
    would drift away from the embeddings that they copy."""
    return 0.1 if name == "lm_head.weight" else 1.0


def is_muon_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Hidden matrices follow Muon; embeddings, heads, routers, indexers, patch and position tables follow AdamW."""
    other = ("embed", "lm_head", "heads.", ".mlp.gate.", ".sa_indexer.", "norm")
    return parameter.ndim in (2, 3) and not any(part in name for part in other)
