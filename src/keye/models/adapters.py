"""LoRA adapters: small pairs of matrices whose product is added to what a layer of the model computes.

Several adapters can be attached to one model, and each row of a step uses one of them or none. They are forward hooks
of the layers that they change: names, tensors and numbers of the model stay as they are, quantised or not, and rows
without an adapter are computed as if there were none. Knows layers and rows; `adapter_files` reads the files.

Legend: T rows of a step, R rank, E experts, d model width, I expert width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from keye.errors import KeyeError
from keye.models.moe import Experts, MoE, plan_rows


class LowRank(NamedTuple):
    """What is added to a linear layer's output: `up @ down @ x`. `down` [R, in], `up` [out, R] with the scale in it."""

    down: Tensor
    up: Tensor

    def delta(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return x.to(self.down.dtype) @ self.down.t() @ self.up.t()

    def product(self) -> Tensor:
        """What is added to the weight: float32 [out, in]."""
        return self.up.float() @ self.down.float()


class EmbeddingLowRank(NamedTuple):
    """The same for a table of embeddings: `down` [vocabulary, R], `up` [d, R]."""

    down: Tensor
    up: Tensor

    def delta(self, token_ids: Tensor) -> Tensor:
        """int64 [...] -> [..., d]."""
        return self.down[token_ids] @ self.up.t()

    def product(self) -> Tensor:
        """What is added to the table: float32 [vocabulary, d]."""
        return self.down.float() @ self.up.float().t()


class ExpertsLowRank(NamedTuple):
    """What is added to the two products of each expert, None for nothing: `gate_up` and `down`, each a pair `down`
    [E, R, in] and `up` [E, out, R]."""

    gate_up: tuple[Tensor, Tensor] | None = None
    down: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in memory. `layers` and `experts` are by the names of the modules that they change. `fingerprint` is a
    hash of its numbers."""

    name: str
    layers: Mapping[str, LowRank | EmbeddingLowRank]
    experts: Mapping[str, ExpertsLowRank]
    fingerprint: str
    nbytes: int

    @property
    def vision_salt(self) -> bytes:
        """Tells visual tokens that it changes from those of the model; empty where it changes none."""
        is_changed = any(name.startswith(("visual.", "mlp_AR.")) for name in self.layers)
        return b"\0adapter " + self.fingerprint.encode() if is_changed else b""


#: Rows of a step that use an adapter: a slice, or int64 indices of rows that are not contiguous.
Part = tuple[Adapter, slice | Tensor]


def split_rows(adapters: Iterable[tuple[Adapter | None, range]], device: torch.device | str = "cpu") -> list[Part]:
    """The rows of each adapter, from the adapter of each range of rows."""
    ranges: dict[int, tuple[Adapter, list[range]]] = {}
    for adapter, rows in adapters:
        if adapter is None or not rows:
            continue
        known = ranges.setdefault(id(adapter), (adapter, []))[1]
        if known and known[-1].stop == rows.start:
            known[-1] = range(known[-1].start, rows.stop)
        else:
            known.append(rows)
    return [
        (adapter, slice(known[0].start, known[0].stop) if len(known) == 1 else
         torch.tensor([row for rows in known for row in rows], device=device))
        for adapter, known in ranges.values()
    ]  # fmt: skip


@dataclass
class AdapterRows:
    """Which rows of what a model is computing use which adapter; all hooks of the model read it. Rows of which nothing
    is said use the `default`."""

    default: Adapter | None = None
    parts: Sequence[Part] = ()
    _hooked: set[str] = field(default_factory=set)

    @contextmanager
    def use(self, adapters: Sequence[tuple[Adapter | None, range]], device: torch.device) -> Iterator[None]:
        """Within this context rows use the adapters of their ranges."""
        before, self.parts = self.parts, split_rows(((own or self.default, rows) for own, rows in adapters), device)
        try:
            yield
        finally:
            self.parts = before

    @contextmanager
    def use_for_all(self, adapter: Adapter | None) -> Iterator[None]:
        """Within this context all rows use one adapter."""
        before, chosen = self.parts, adapter or self.default
        self.parts = () if chosen is None else [(chosen, slice(None))]
        try:
            yield
        finally:
            self.parts = before

    def attach(self, model: nn.Module, adapter: Adapter) -> None:
        """Has the layers of `model` that the adapter changes look for rows that use it. They do so from now on, also
        when the adapter is not used any more."""
        for name in adapter.layers.keys() - self._hooked:
            model.get_submodule(name).register_forward_hook(partial(self._add, name))
        for name in adapter.experts.keys() - self._hooked:
            moe = model.get_submodule(name.rpartition(".")[0])
            assert isinstance(moe, MoE)
            moe.mix_adapted = partial(self._mix, name)
        self._hooked |= adapter.layers.keys() | adapter.experts.keys()

    def _add(self, name: str, _layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """The output of a layer with those of adapters added to their rows, in place."""
        for adapter, rows in self.parts:
            if (pair := adapter.layers.get(name)) is not None:
                out[rows] += pair.delta(inputs[0][rows]).to(out.dtype)
        return out

    def _mix(self, name: str, moe: MoE, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor | None:
        """What `MoE.mix` computes, the outputs of adapters added inside each expert; None where no row uses one."""
        parts = [(pairs, rows) for adapter, rows in self.parts if (pairs := adapter.experts.get(name)) is not None]
        if not parts:
            return None
        experts: Experts = moe.experts
        token_of_row, row_of_slot, sizes = plan_rows(chosen, moe.gate.weight.shape[0])
        owners = torch.full((len(x),), -1, device=x.device)
        for number, (_, rows) in enumerate(parts):
            owners[rows] = number
        owner_of_row = owners[token_of_row]
        expert_of_row = torch.repeat_interleave(torch.tensor(sizes, device=x.device))
        rows_of = [(owner_of_row == number).nonzero().squeeze(1) for number in range(len(parts))]
        inputs = x.index_select(0, token_of_row)
        up = experts.project_up(inputs, sizes)
        for (pairs, _), rows in zip(parts, rows_of, strict=True):
            _add_to_experts(pairs.gate_up, inputs, up, rows, expert_of_row)
        inner = moe.elementwise.swiglu(up)
        out = experts.project_down(inner, sizes)
        for (pairs, _), rows in zip(parts, rows_of, strict=True):
            _add_to_experts(pairs.down, inner, out, rows, expert_of_row)
        gathered = out.index_select(0, row_of_slot.flatten()).view(*row_of_slot.shape, -1)
        return moe.elementwise.weighted_sum(gathered, weights.to(x.dtype))


def _add_to_experts(
    pair: tuple[Tensor, Tensor] | None, x: Tensor, out: Tensor, rows: Tensor, expert_of_row: Tensor
) -> None:
    """Adds each expert's `up @ down @ x` to its share of `rows` of `out`; `rows` are sorted by expert."""
    if pair is None or not len(rows):
        return
    experts, counts = expert_of_row[rows].unique_consecutive(return_counts=True)
    for expert, part in zip(experts.tolist(), rows.split(counts.tolist()), strict=True):
        down, up = (matrix[expert] for matrix in pair)
        out[part] += (x[part].to(down.dtype) @ down.t() @ up.t()).to(out.dtype)


#: Adds to a weight, in place, what an adapter changes of it.
Addition = Callable[[Tensor], None]


@torch.no_grad()
def merge(model: nn.Module, adapter: Adapter) -> None:
    """Adds an adapter to the weights of a model in place, which then computes what it computed with the adapter, up to
    rounding. Errors as of `additions`, before anything is changed."""
    for name, add in additions(model, adapter).items():
        add(model.get_parameter(name))


def additions(model: nn.Module, adapter: Adapter) -> dict[str, Addition]:
    """What an adapter adds to the weights of a model, which may be on the meta device, by the names of its parameters.
    `KeyeError` for quantised layers and for those that share their weight with another one."""
    targets: dict[str, tuple[Tensor, Addition]] = {}
    for name, pair in adapter.layers.items():
        targets[f"{name}.weight"] = _plain_weight(model, name, "weight"), partial(_add_product, pair)
    for name, pairs in adapter.experts.items():
        for own, matrices in (("gate_up_proj", pairs.gate_up), ("down_proj", pairs.down)):
            if matrices is not None:
                targets[f"{name}.{own}"] = _plain_weight(model, name, own), partial(_add_expert_products, *matrices)
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    if any(owners[id(weight)] > 1 for weight, _ in targets.values()):
        raise KeyeError(f"the adapter {adapter.name} changes embeddings or the head, which are one weight in this "
                        "model: load it beside the model instead of merging it")  # fmt: skip
    return {name: add for name, (_, add) in targets.items()}


def _add_product(pair: LowRank | EmbeddingLowRank, weight: Tensor) -> None:
    weight.copy_(weight.float() + pair.product())


def _add_expert_products(down: Tensor, up: Tensor, weight: Tensor) -> None:
    """To fused experts, which are stored [E, in, out], one after another."""
    for own_down, own_up, own in zip(down, up, weight, strict=True):
        own.copy_(own.float() + (own_up.float() @ own_down.float()).t())


def _plain_weight(model: nn.Module, name: str, own: str) -> Tensor:
    weight = getattr(model.get_submodule(name), own, None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise KeyeError(f"{name} is quantised: merge the adapter into the original model, and quantise that")
    return weight
