"""Merging: an adapter into the weights of its model, and several models into their weighted average.

Tensors are read, merged and written one after another: memory is that of the largest one, the experts of a layer, in
float32 once for the result and once for what is read, and of an adapter. Knows no data and no engine
(`keye.train.merge_search` does).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from keye.config import load_model_config, read_json
from keye.errors import KeyeError
from keye.models.adapter_files import read_adapter
from keye.models.adapters import Addition, additions
from keye.models.keye import KeyeModel
from keye.models.load import plan_model
from keye.models.quant_fill import stored_policy
from keye.weights.open import open_weights
from keye.weights.plain import PlainTensors
from keye.weights.safetensors import write_checkpoint

Progress = Callable[[int, int], None]
#: Fields of config.json that change nothing of what a model computes.
_NEUTRAL: Final = ("torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache")
_TOKENIZER: Final = "tokenizer.json"


class MergeError(KeyeError):
    """Models or adapters that cannot be merged."""


class MergedTensors(Mapping[str, Tensor]):
    """Tensors of a checkpoint that are computed when they are asked for; `items` has them without numbers."""

    def __init__(self, plain: PlainTensors, compute: Callable[[str], Tensor]) -> None:
        self._plain, self._compute = plain, compute

    def __iter__(self) -> Iterator[str]:
        return iter(self._plain)

    def __len__(self) -> int:
        return len(self._plain)

    def items(self) -> list[tuple[str, Tensor]]:  # type: ignore[override]
        return self._plain.items()

    def __getitem__(self, name: str) -> Tensor:
        return self._compute(name)


def merge_adapter(
    folder: Path, adapter: Path, output: Path, *, dtype: torch.dtype = torch.bfloat16,
    on_progress: Progress = lambda done, total: None,
) -> None:  # fmt: skip
    """Writes the weights of `folder` with those of a LoRA adapter added, as `dtype`, experts fused. `KeyeError` for a
    quantised model, for an adapter of another one, and for embeddings or a head that share their weight."""
    config, sources = load_model_config(folder), open_weights(folder)
    if stored_policy(config) is not None or any(source.format is not None for source in sources.values()):
        raise MergeError(f"{folder} is quantised: merge the adapter into the original model, and quantise that")
    model, _, _ = plan_model(sources, config, strict=True)
    added = _additions(model, adapter)
    plain = PlainTensors(sources, dtype, on_progress)
    if missing := sorted(added.keys() - set(plain)):
        raise MergeError(f"{folder} has no tensor {missing[0]}, which {adapter} changes")

    def compute(name: str) -> Tensor:
        tensor = plain[name]
        if (add := added.get(name)) is not None:
            with torch.no_grad():
                add(tensor)
        return tensor

    write_checkpoint(MergedTensors(plain, compute), output)


def _additions(model: KeyeModel, adapter: Path) -> dict[str, Addition]:
    return additions(model, read_adapter(adapter, adapter.name, model, dtype=torch.float32, device=torch.device("cpu")))


class Average:
    """Weighted averages of the tensors of checkpoints that are alike. `folders` are compared at once: `MergeError` in
    one sentence where their configurations, tokenizers or tensors differ, or one is quantised."""

    def __init__(self, folders: Sequence[Path]) -> None:
        if len(folders) < 2:
            raise MergeError("name at least two models to average, or an adapter to merge into one")
        first, *others = folders
        for other in others:
            _compare(first, other)
        sources = [open_weights(folder) for folder in folders]
        for folder, tensors in zip(folders, sources, strict=True):
            if any(tensor.format is not None for tensor in tensors.values()) or stored_policy(
                load_model_config(folder)
            ):
                raise MergeError(f"{folder} is quantised: average the original models, and quantise the result")
        self.folders = tuple(folders)
        self._plain = [PlainTensors(tensors, torch.float32) for tensors in sources]
        shapes = [{name: tuple(tensor.shape) for name, tensor in plain.items()} for plain in self._plain]
        for folder, own in zip(others, shapes[1:], strict=True):
            if odd := sorted(own.items() ^ shapes[0].items()):
                raise MergeError(f"{odd[0][0]} is not the same tensor in {first} and {folder}: average models of one "
                                 "architecture")  # fmt: skip

    @property
    def names(self) -> tuple[str, ...]:
        """Official names of the tensors, experts fused."""
        return tuple(self._plain[0])

    def tensor(self, name: str, weights: Sequence[float]) -> Tensor:
        """The sum of `weight * tensor` over the models, float32."""
        total: Tensor | None = None
        for plain, weight in zip(self._plain, weights, strict=True):
            if weight or total is None:
                part = plain[name].mul_(weight)
                total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def write(
        self, weights: Sequence[float], output: Path, *, dtype: torch.dtype = torch.bfloat16,
        on_progress: Progress = lambda done, total: None,
    ) -> None:  # fmt: skip
        """Writes the average as `dtype`."""
        described = dict(self._plain[0].items())
        total, done = sum(tensor.numel() for tensor in described.values()), 0

        def compute(name: str) -> Tensor:
            nonlocal done
            tensor = self.tensor(name, weights)
            done += tensor.numel()
            on_progress(done, total)
            return tensor

        write_checkpoint(MergedTensors(self._plain[0], compute), output, dtype=dtype)


def complete_weights(weights: Sequence[float], models: int, *, has_base: bool) -> tuple[float, ...]:
    """The weights of all models, that of the base last: it has what the others leave of 1, so that the result is the
    base plus the weighted differences from it. Without a base the weights must add up to 1. `MergeError` for others."""
    if len(weights) != models:
        raise MergeError(f"{len(weights)} weights were given for {models} models; give one for each, as 0.5,0.3,0.2")
    if any(not -10 <= weight <= 10 for weight in weights):
        raise MergeError("a weight lies between -10 and 10; give others")
    if has_base:
        return (*weights, 1.0 - sum(weights))
    if abs(sum(weights) - 1) > 0.001:
        raise MergeError(f"the weights add up to {sum(weights):g}; let them add up to 1, or name a base")
    return tuple(weights)


def _compare(first: Path, other: Path) -> None:
    """`MergeError` where two folders hold models of another configuration or tokenizer."""
    ours, theirs = read_json(first / "config.json"), read_json(other / "config.json")
    odd = next((name for name in sorted(ours.keys() | theirs.keys())
                if name not in _NEUTRAL and ours.get(name) != theirs.get(name)), None)  # fmt: skip
    if odd is not None:
        raise MergeError(f"{first} and {other} differ in {odd} of config.json: average models of one configuration")
    if _digest(first / _TOKENIZER) != _digest(other / _TOKENIZER):
        raise MergeError(f"{first} and {other} have other tokenizers: average models of one tokenizer")


def _digest(file: Path) -> bytes | None:
    return hashlib.sha256(file.read_bytes()).digest() if file.is_file() else None
