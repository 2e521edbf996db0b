"""Muon for matrices and AdamW for the rest, over a bfloat16 model with float32 master weights.

Muon (Jordan et al., 2024) orthogonalises the momentum of each matrix with a few Newton-Schulz steps; coefficients from
Polar Express (Amsel et al., 2025).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from keye.train.config import StageConfig
from keye.train.parallel import (
    Group,
    copies_of,
    cut_parts,
    is_cut_first,
    is_divided,
    join_parts,
    local_part,
    sum_copies,
)
from keye.train.parts import choose_parameters

_COEFFICIENTS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                 (2.8769, -3.1427, 1.2046))  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A parameter that a stage changes. `is_matrix`: its last two dimensions are a matrix that follows Muon; else it
    follows AdamW. `lr` is its highest learning rate. Matrices of Muon lose a share of their
    weights (`weight_decay`) at each step, others where `decay` says so."""

    name: str
    parameter: nn.Parameter
    is_matrix: bool
    lr: float
    decay: bool = False


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
    """Steps `parameters`. State can be saved and restored by parameter name.

    Parameters may be divided among the processes (`DTensor`): masters and moments are then those of this process's
    part. Gradients of parameters that every process holds are summed over `group`. `buffers` go
    along with the state.
    """

    def __init__(
        self, parameters: Iterable[Trained], buffers: Iterable[tuple[str, Tensor]] = (), *,
        group: Group | None = None, weight_decay: float = 0.02, momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.97), clip: float = 1.0,
    ) -> None:  # fmt: skip
        trained = list(parameters)
        self.parameters = {each.name: each.parameter for each in trained}
        self.rates = {each.name: each.lr for each in trained}
        self.decays = {each.name: each.decay for each in trained}
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
        self.buffers, self.count = dict(buffers), 0
        self._grads: dict[str, Tensor] = {}

    def step(self, factor: float) -> float:
        """One update from the gradients, at `factor` times the learning rates; the gradients are then cleared. Returns
        the gradient norm before clipping. Nothing is updated where that is not finite."""
        norm = self.reduce()
        if math.isfinite(norm):
            self.update(factor, norm)
        self.clear()
        return norm

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Takes the gradients of a micro-batch out of the parameters and adds them up in float32."""
        for name, p in self.parameters.items():
            if p.grad is not None:
                grad = local_part(p.grad).float()
                self._grads[name] = self._grads[name].add_(grad) if name in self._grads else grad
            p.grad = None

    @torch.no_grad()
    def reduce(self) -> float:
        """The norm of the step's gradient, which is summed over the processes first."""
        self.add_gradients()
        grads, size = self._grads, self.group.size
        if size > 1:  # what one process's batch left out, another's may hold: all send the same tensors in one order
            for name, p in self.parameters.items():
                grad = grads.pop(name, None)
                grads[name] = torch.zeros_like(local_part(p), dtype=torch.float32) if grad is None else grad
                sum_copies(grads[name], p)
        copies = {name: copies_of(p, size) for name, p in self.parameters.items()}
        self.group.sum([grad for name, grad in grads.items() if copies[name] == size])
        if not grads:
            return 0.0
        norms = torch.stack([grad.norm() for grad in grads.values()]).double()
        squares = (norm**2 / copies[name] for norm, name in zip(norms.tolist(), grads, strict=True))
        totals = dict(zip(grads, self.group.total(*squares), strict=True))
        # What no token of the step has met stays as it is, without decay too, however the step is divided.
        self._grads = {name: grad for name, grad in grads.items() if totals[name] != 0}
        return math.sqrt(math.fsum(totals.values()))

    @torch.no_grad()
    def update(self, factor: float, norm: float) -> None:
        """Changes the parameters by the gradients that `reduce` left, whose norm is `norm`."""
        scale = min(1.0, self.clip / (norm + 1e-6))
        self.count += 1
        self._muon(self._grads, scale, factor)
        self._adam(self._grads, scale, factor)
        for name, p in self.parameters.items():
            local_part(p).copy_(local_part(self.master[name]))

    def clear(self) -> None:
        """Forgets the gradients."""
        self._grads = {}
        for p in self.parameters.values():
            p.grad = None

    def _muon(self, grads: dict[str, Tensor], scale: float, factor: float) -> None:
        for shape, names in self.groups.items():
            present = [name for name in names if name in grads]
            updates = []
            for name in present:
                grad, first = grads[name].mul_(scale), local_part(self.first[name])
                first.lerp_(grad, 1 - self.momentum)
                updates.append(grad.lerp(first, self.momentum))
            for name, update in zip(present, self._orthogonalise(present, updates, shape), strict=True):
                master, rate = local_part(self.master[name]), factor * self.rates[name]
                step = -rate * 0.2 * max(shape) ** 0.5
                master.mul_(1 - rate * self.weight_decay).add_(update.float().view_as(master), alpha=step)

    def _orthogonalise(self, names: list[str], updates: list[Tensor], shape: tuple[int, ...]) -> list[Tensor]:
        """Of each update the orthogonal factor. Matrices that are divided among processes are put together for it, one
        after another, in bfloat16; stacks of whole matrices stay where they are."""
        divided = [is_divided(self.parameters[name]) for name in names]
        together = [update.reshape(-1, *shape) for update, cut in zip(updates, divided, strict=True) if not cut]
        if together:
            done = self.group.divide(torch.cat(together), orthogonalise)
            stacked = iter(done.split([update.shape[0] for update in together]))
        results = []
        for name, update, cut in zip(names, updates, divided, strict=True):
            p = self.parameters[name]
            if not cut:
                results.append(next(stacked))
            elif p.ndim == 3 and is_cut_first(p):
                results.append(orthogonalise(update) if update.numel() else update)
            else:
                full = join_parts(update.bfloat16(), p)
                results.append(local_part(cut_parts(orthogonalise(full.view(-1, *shape)).view(p.shape), p)))
        return results

    def _adam(self, grads: dict[str, Tensor], scale: float, factor: float) -> None:
        b1, b2 = self.betas
        bias1, bias2 = 1 - b1**self.count, 1 - b2**self.count
        for name in self.rest:
            if name not in grads:
                continue
            grad, master, rate = grads[name].mul_(scale), local_part(self.master[name]), factor * self.rates[name]
            first, second = local_part(self.first[name]), local_part(self.second[name])
            first.lerp_(grad, 1 - b1)
            second.mul_(b2).addcmul_(grad, grad, value=1 - b2)
            denominator = (second / bias2).sqrt_().add_(1e-8)
            if self.decays[name]:
                master.mul_(1 - rate * self.weight_decay)
            master.addcdiv_(first, denominator, value=-rate / bias1)

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, as flat tensors."""
        parts = {"master": self.master, "first": self.first, "second": self.second}
        flat = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
        return {**flat, **{f"buffer.{name}": t for name, t in self.buffers.items()}, "count": torch.tensor(self.count)}

    @torch.no_grad()
    def take_state(self, state: Mapping[str, Tensor]) -> None:
        """After the tensors of `state()` were overwritten: goes on from these."""
        self.count = int(state["count"])
        for name, p in self.parameters.items():
            local_part(p).copy_(local_part(self.master[name]))


def mark_trainable(model: nn.Module, stage: StageConfig) -> list[Trained]:
    """Marks and returns the parameters that a stage changes; everything else stays as it is."""
    trained = []
    for name, parameter in choose_parameters(model, stage).items():
        is_matrix = stage.optimizer == "muon" and is_muon_matrix(name, parameter)
        decay = stage.optimizer == "adamw" and parameter.ndim > 1
        trained.append(Trained(name, parameter, is_matrix, highest_rate(stage, name, is_matrix), decay))
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
