"""Muon for matrices and AdamW for the rest, over a bfloat16 model with float32 master weights.

Muon (Jordan et al., 2024) orthogonalises the momentum of each matrix with a few Newton-Schulz steps; coefficients from
Polar Express (Amsel et al., 2025).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from keye.errors import KeyeError
from keye.train.config import StageConfig
from keye.train.parallel import Group
from keye.train.parts import choose_parameters

_COEFFICIENTS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                 (2.8769, -3.1427, 1.2046))  # fmt: skip


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
    """Steps the trainable parameters of `model`.

    Matrices that `is_matrix(name, parameter)` accepts (the last two dimensions count; experts are stacks) follow Muon,
    everything else AdamW, at `adam_scale(name)` times its learning rate. State can be saved and restored by parameter
    name.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], is_matrix: Callable[[str, nn.Parameter], bool], *,
        adam_scale: Callable[[str], float] = lambda name: 1.0, group: Group | None = None, weight_decay: float = 0.02,
        momentum: float = 0.95, betas: tuple[float, float] = (0.9, 0.97), clip: float = 1.0,
    ) -> None:  # fmt: skip
        self.parameters = dict(parameters)
        self.master = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        self.first = {name: torch.zeros_like(m) for name, m in self.master.items()}
        self.weight_decay, self.momentum, self.betas, self.clip = weight_decay, momentum, betas, clip
        self.adam_scale, self.group = adam_scale, group or Group()
        self.groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
        self.rest: list[str] = []
        for name, p in self.parameters.items():
            if is_matrix(name, p):
                self.groups[tuple(p.shape[-2:])].append(name)
            else:
                self.rest.append(name)
        self.second = {name: torch.zeros_like(self.master[name]) for name in self.rest}
        self.count = 0

    @torch.no_grad()
    def step(self, lr: float, adam_lr: float) -> float:
        """One update from the gradients, which are then cleared. Returns the gradient norm before clipping."""
        if self.group.size > 1:  # what one process's batch left out, another's may hold: all must send the same tensors
            for p in self.parameters.values():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads = {name: p.grad.float() for name, p in self.parameters.items() if p.grad is not None}
        self.group.average(list(grads.values()))
        norm = float(torch.stack([g.norm() for g in grads.values()]).norm())
        if norm < float("inf"):  # else, also where it is NaN, skip the step rather than spoil the weights
            scale = min(1.0, self.clip / (norm + 1e-6))
            self.count += 1
            self._muon(grads, scale, lr)
            self._adam(grads, scale, adam_lr)
            for name, p in self.parameters.items():
                p.copy_(self.master[name])
        for p in self.parameters.values():
            p.grad = None
        return norm

    def _muon(self, grads: dict[str, Tensor], scale: float, lr: float) -> None:
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
            step = -lr * 0.2 * max(shape) ** 0.5
            for name, update in zip(present, joined.split([u.shape[0] for u in updates]), strict=True):
                master = self.master[name]
                master.mul_(1 - lr * self.weight_decay).add_(update.view_as(master), alpha=step)

    def _adam(self, grads: dict[str, Tensor], scale: float, lr: float) -> None:
        b1, b2 = self.betas
        bias1, bias2 = 1 - b1**self.count, 1 - b2**self.count
        for name in self.rest:
            if name not in grads:
                continue
            grad, master = grads[name].mul_(scale), self.master[name]
            self.first[name].lerp_(grad, 1 - b1)
            self.second[name].mul_(b2).addcmul_(grad, grad, value=1 - b2)
            denominator = (self.second[name] / bias2).sqrt_().add_(1e-8)
            master.addcdiv_(self.first[name], denominator, value=-lr * self.adam_scale(name) / bias1)

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


def mark_trainable(model: nn.Module, stage: StageConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """Marks and yields the parameters that a stage changes; everything else stays as it is."""
    yield from choose_parameters(model, stage).items()


def adam_scale(name: str) -> float:
    """The head learns at a tenth of the rate: AdamW gives rare tokens steps as large as common ones, and their rows
    would drift away from the embeddings that they copy."""
    return 0.1 if name == "lm_head.weight" else 1.0


def is_muon_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Hidden matrices follow Muon; embeddings, heads, routers, indexers, patch and position tables follow AdamW."""
    other = ("embed", "lm_head", "heads.", ".mlp.gate.", ".sa_indexer.", "norm")
    return parameter.ndim in (2, 3) and not any(part in name for part in other)
