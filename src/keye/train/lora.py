"""LoRA for training: small pairs of matrices beside the layers of a model, which alone are trained.

They hang on the model by hooks: names, tensors and, while `B` is zero, numbers of the model stay as they are, plain or
quantised. Experts have a pair for each expert, multiplied with that expert's rows alone; the products `B @ A` are never
formed. `keye.models.adapters` computes the same for inference.

Legend: N rows, R rank, E experts, K inputs, M outputs.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keye.errors import KeyeError
from keye.files import complete_file
from keye.models.adapter_files import CONFIG_FILE, TENSORS_FILE, LoraConfig, read_adapter
from keye.models.keye import KeyeModel
from keye.models.moe import ROW_MULTIPLE, Combine, Dispatch, MoE, Router, plan_rows
from keye.quant.layers import QuantLinear
from keye.train.config import PARTS, LoraSettings
from keye.train.parts import is_in_part
from keye.weights.safetensors import ShardWriter

#: The parts that have layers which can take a pair; see `keye.train.parts`.
GROUPS: Final = ("tower", "projector", "attention", "dense", "experts", "router", "indexer", "head")
#: What "all-linear" stands for: the decoder's layers, without routed experts, router, indexer and head.
ALL_LINEAR: Final = "all-linear"
_FUSED: Final = ("gate_up_proj", "down_proj")


class LoraError(KeyeError):
    """LoRA settings that do not fit a model."""


@dataclass(frozen=True)
class GroupCount:
    """How many of the `layers` of a group have a pair, and the trained numbers of these; the fused tensors of the
    experts of a layer count as two layers."""

    adapted: int
    layers: int
    numbers: int


class Pair(nn.Module):
    """`A` float32 [R, K], random, and `B` float32 [M, R], zero, of a linear layer; of a fused tensor of experts
    [E, R, K] and [E, M, R]. Both are multiplied in the dtype of the activations, as in inference."""

    def __init__(self, shape: tuple[int, ...], rank: int, scale: float, dropout: float, device: torch.device) -> None:
        """`shape` is [M, K], or [E, M, K]."""
        super().__init__()
        *experts, outputs, inputs = shape
        bound = 1 / math.sqrt(inputs)  # as PEFT begins
        self.A = nn.Parameter(torch.empty(*experts, rank, inputs, device=device).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(*experts, outputs, rank, device=device))
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor, sizes: list[int] | None, is_training: bool) -> Tensor:
        """`scale * B @ A @ x`: [..., K] -> [..., M]; of experts [N, K] -> [N, M] for rows that are sorted by expert,
        `sizes` of each."""
        x = F.dropout(x, self.dropout, is_training)
        if sizes is None:
            return x @ self.A.to(x.dtype).t() @ (self.B * self.scale).to(x.dtype).t()
        # Readers scale PEFT's B, which of experts is our A: rounding the other half would give other numbers.
        return multiply_grouped(x, (self.A * self.scale).to(x.dtype), self.B.to(x.dtype), sizes)


def multiply_grouped(x: Tensor, a: Tensor, b: Tensor, sizes: list[int]) -> Tensor:
    """`x_e @ a_e.T @ b_e.T` of rows [N, K] that are sorted by expert, `sizes` of each, with `a` [E, R, K] and `b`
    [E, M, R]: [N, M]. Where experts have whole blocks of rows, as in large steps, all blocks are multiplied at once."""
    if not any(size % ROW_MULTIPLE for size in sizes):
        counts = torch.tensor([size // ROW_MULTIPLE for size in sizes], device=x.device)
        expert = torch.repeat_interleave(counts)
        blocks = x.unflatten(0, (-1, ROW_MULTIPLE))
        return (blocks @ a[expert].mT @ b[expert].mT).flatten(0, 1)
    # Not `a[e]`, whose gradient would be a tensor of all experts for each expert.
    parts = zip(x.split(sizes), a.unbind(0), b.unbind(0), strict=True)
    return torch.cat([part @ own_a.t() @ own_b.t() for part, own_a, own_b in parts if part.shape[0]])


class LoraParameters:
    """What `add_lora` added to a model: `named` parameters, all float32 and the only ones of the model that take
    gradients, under the names of the layers that they belong to; `counts` by group."""

    def __init__(self, model: KeyeModel, settings: LoraSettings) -> None:
        self.settings, self.model = settings, model
        self.pairs: dict[str, Pair] = {}
        self.is_enabled = True
        config, device = adapter_config(settings), model.device
        for name, chosen in _choose(model, settings).items():
            rank, scale = config.rank_of(name), config.scale_of(name)
            self.pairs[name] = Pair(_shape(name, chosen), rank, scale, settings.dropout, device)

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """`model.layers.0.self_attn.q_proj.lora_A`, ..., in the order of the model."""
        return {f"{name}.lora_{half}": parameter for name, pair in self.pairs.items()
                for half, parameter in pair.named_parameters()}  # fmt: skip

    @property
    def counts(self) -> dict[str, GroupCount]:
        """Of each group that the model has, also of those without any pair."""
        layers = targets_of(self.model)
        out = {}
        for group in GROUPS:
            names = [name for name in layers if group_of(name) == group]
            own = [self.pairs[name] for name in names if name in self.pairs]
            numbers = sum(half.numel() for pair in own for half in (pair.A, pair.B))
            if names:
                out[group] = GroupCount(len(own), len(names), numbers)
        return out

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the model computes what it computes without them, as the reference of an objective."""
        before, self.is_enabled = self.is_enabled, False
        try:
            yield
        finally:
            self.is_enabled = before

    def attach(self) -> None:
        """Hooks the pairs to the layers of the model."""
        for name, layer in list(self.model.named_modules()):
            if (pair := self.pairs.get(name)) is not None:
                layer.register_forward_hook(partial(self._add, pair))
            up, down = (self.pairs.get(f"{name}.experts.{own}") for own in _FUSED)
            if isinstance(layer, MoE) and (up is not None or down is not None):
                layer.mix_adapted = partial(self._mix, up, down)

    def _add(self, pair: Pair, layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if not self.is_enabled:
            return out
        x = inputs[0].float() if isinstance(layer, Router) else inputs[0]
        return out + pair(x, None, layer.training).to(out.dtype)

    def _mix(
        self, up_pair: Pair | None, down_pair: Pair | None, moe: MoE, x: Tensor, weights: Tensor, chosen: Tensor
    ) -> Tensor | None:
        """What `MoE.mix` computes, with the pairs inside each expert."""
        if not self.is_enabled:
            return None
        token_of_row, row_of_slot, sizes = plan_rows(chosen, moe.gate.weight.shape[0])
        rows = Dispatch.apply(x, token_of_row, row_of_slot)
        up = moe.experts.project_up(rows, sizes)
        inner = moe.elementwise.swiglu(up if up_pair is None else up + up_pair(rows, sizes, moe.training))
        out = moe.experts.project_down(inner, sizes)
        out = out if down_pair is None else out + down_pair(inner, sizes, moe.training)
        weights, weighted_sum = weights.to(x.dtype), moe.elementwise.weighted_sum
        mixed: Tensor = Combine.apply(out, weights, row_of_slot, token_of_row, weighted_sum)
        return mixed


def add_lora(model: KeyeModel, settings: LoraSettings, *, seed: int = 0) -> LoraParameters:
    """Freezes a model and adds pairs to the layers that the settings name; its outputs stay the same to the last bit
    until `B` is trained. `LoraError` for a target that is not a layer of this model, before anything is changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lora = LoraParameters(model, settings)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    lora.attach()
    return lora


def adapter_config(settings: LoraSettings) -> LoraConfig:
    """Ranks and scales as readers of adapters look them up."""
    ranks = {name: float(rank) for name, rank in settings.rank_pattern.items()}
    return LoraConfig(settings.rank, settings.alpha, settings.rslora, ranks, settings.alpha_pattern)


def group_of(layer: str) -> str | None:
    """The part that a layer belongs to, by its name; None for one that takes no pair."""
    return next((part for part in GROUPS if is_in_part(f"{layer}.weight", part)), None)


def targets_of(model: nn.Module) -> dict[str, Any]:
    """All layers that can take a pair, by name: linear ones, and `MoE` for the two fused tensors of its experts."""
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | QuantLinear) and group_of(name) is not None:
            layers[name] = module
        elif isinstance(module, MoE):
            layers |= {f"{name}.experts.{own}": module for own in _FUSED}
    return layers


def _choose(model: KeyeModel, settings: LoraSettings) -> dict[str, Any]:
    layers = targets_of(model)
    targets, exclude = ((names,) if isinstance(names, str) else names for names in (settings.targets, settings.exclude))
    chosen = {name for name, layer in layers.items() if settings.experts and isinstance(layer, MoE)}
    if settings.experts and not chosen:
        raise LoraError("experts = true, but this model has no routed experts; leave it out")
    for target in targets:
        matched = {name for name in layers if _matches(target, name)}
        if not matched:
            parts = ", ".join(part for part in GROUPS if any(group_of(name) == part for name in layers))
            raise LoraError(f"the LoRA target {target!r} is not a layer of this model, so nothing would be trained; "
                            f"take all-linear, a part ({parts}), the end of a layer's name, or a pattern")  # fmt: skip
        chosen |= matched
    chosen -= {name for name in layers for target in exclude if _matches(target, name)}
    if not chosen:
        raise LoraError(f"exclude ({', '.join(exclude)}) leaves no layer for LoRA; name fewer there")
    return {name: module for name, module in layers.items() if name in chosen}


def _shape(name: str, layer: Any) -> tuple[int, ...]:
    """[M, K] of a linear layer, or [E, M, K] of a fused tensor of experts."""
    if not isinstance(layer, MoE):
        return layer.out_features, layer.in_features
    experts, d, inner = layer.experts.sizes
    return (experts, 2 * inner, d) if name.endswith(_FUSED[0]) else (experts, d, inner)


def _matches(target: str, name: str) -> bool:
    if target == ALL_LINEAR:
        return group_of(name) in ("attention", "dense") or ".shared_experts." in name
    if target in PARTS:
        return is_in_part(f"{name}.weight", target)
    if any(sign in target for sign in "*?["):
        return fnmatch.fnmatchcase(name, target)
    is_fused_down = name.endswith(".experts.down_proj")  # as for PEFT, "down_proj" is the linear layer of that name
    return name == target or (name.endswith(f".{target}") and not (is_fused_down and target == _FUSED[1]))


# --------------------------------------------------------------------------------------------------------------------
# Files


def save_adapter(lora: LoraParameters, folder: Path, *, base: str | None = None) -> Path:
    """Writes the pairs in PEFT's layout, which keye, PEFT and vLLM read: `adapter_model.safetensors` in float32 and
    `adapter_config.json`, which names `base`, the model that they belong to. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _file_tensors(lora)}
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with complete_file(folder / CONFIG_FILE) as config, complete_file(folder / TENSORS_FILE) as draft:
        with ShardWriter(draft, described) as file:
            for name, tensor in tensors.items():
                file.write(name, tensor)
        config.write_text(json.dumps(_file_config(lora, base), indent=2) + "\n", encoding="utf-8")
    return folder


def load_adapter(lora: LoraParameters, folder: Path) -> None:
    """Takes the numbers of an adapter that was trained before, to train it on. `LoraError` where it has other layers or
    ranks than the settings name, and as `keye.models.adapter_files.read_adapter`."""
    adapter = read_adapter(folder, folder.name, lora.model, dtype=torch.float32, device=lora.model.device)
    halves = {name: (low_rank.down, low_rank.up) for name, low_rank in adapter.layers.items()}
    for name, pairs in adapter.experts.items():
        both = zip(_FUSED, (pairs.gate_up, pairs.down), strict=True)
        halves |= {f"{name}.{own}": matrices for own, matrices in both if matrices is not None}
    if odd := sorted(halves.keys() ^ lora.pairs.keys()):
        differ = "has a pair" if odd[0] in halves else "has no pair"
        raise LoraError(f"{folder} {differ} for {odd[0]}, unlike the targets of this run: train it on with those that "
                        "it was trained with")  # fmt: skip
    for name, (down, _) in halves.items():
        own = lora.pairs[name].A
        if down.shape != own.shape:
            raise LoraError(f"{folder} has the rank {down.shape[-2]} for {name}, and this run {own.shape[-2]}: train "
                            "it on with the ranks that it was trained with")  # fmt: skip
    with torch.no_grad():
        for name, (down, up) in halves.items():
            pair = lora.pairs[name]
            # The reader has the scale in PEFT's B, which for experts is our A.
            by_down, by_up = (pair.scale, 1.0) if pair.A.ndim == 3 else (1.0, pair.scale)
            pair.A.copy_(down / by_down)
            pair.B.copy_(up / by_up)


def _file_tensors(lora: LoraParameters) -> Iterator[tuple[str, Tensor]]:
    for name, pair in lora.pairs.items():
        if pair.A.ndim == 3:
            # PEFT takes the stored [E, in, out] for [E, out, in]: its A is our B.
            module, _, own = name.rpartition(".")
            if own == _FUSED[0] and f"{module}.{_FUSED[1]}" in lora.pairs:
                module += ".base_layer"  # of two parameters of a module, the first is inside the second
            yield f"base_model.model.{module}.lora_A.weight", pair.B.mT.flatten(0, 1)
            yield f"base_model.model.{module}.lora_B.weight", pair.A.permute(2, 1, 0).flatten(1)
        else:
            yield f"base_model.model.{name}.lora_A.weight", pair.A
            yield f"base_model.model.{name}.lora_B.weight", pair.B


def _file_config(lora: LoraParameters, base: str | None) -> dict[str, Any]:
    settings = lora.settings
    experts = [name for name, pair in lora.pairs.items() if pair.A.ndim == 3]
    return {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "inference_mode": True,
        "r": settings.rank, "lora_alpha": settings.alpha, "use_rslora": settings.rslora, "use_dora": False,
        # PEFT has no dropout for parameters, and an adapter in use needs none.
        "lora_dropout": 0.0 if experts else settings.dropout, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "modules_to_save": None,
        "target_modules": [name for name in lora.pairs if name not in experts], "target_parameters": experts or None,
        "rank_pattern": dict(settings.rank_pattern), "alpha_pattern": dict(settings.alpha_pattern),
    }  # fmt: skip
