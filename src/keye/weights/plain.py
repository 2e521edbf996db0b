"""A checkpoint of any file format as safetensors with plain floating-point numbers, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from keye.weights.names import ROUTER_BIAS, file_tensors, per_expert_modules
from keye.weights.safetensors import write_checkpoint
from keye.weights.source import TensorSource, WeightsError, copy_all


def write_plain(
    sources: Mapping[str, TensorSource], folder: Path, dtype: torch.dtype,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:  # fmt: skip
    """Writes every tensor as `dtype` into `folder`, experts fused; what is stored as integers with scales is
    de-quantised. `on_progress` gets the numbers that are written and those of all. Returns the path of the file or
    index; errors as in `write_checkpoint`, and `WeightsError` for numbers that are not finite."""
    return write_checkpoint(PlainTensors(sources, dtype, on_progress), folder)


class PlainTensors(Mapping[str, Tensor]):
    """Tensors under official names, experts fused, as `dtype`. They are read when they are asked for; `items` has them
    without numbers."""

    def __init__(
        self, sources: Mapping[str, TensorSource], dtype: torch.dtype,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:  # fmt: skip
        self._sources, self._dtype, self._on_progress = sources, dtype, on_progress
        self._per_expert = per_expert_modules(sources)
        self._shapes = dict(_fused_shapes(sources, self._per_expert))
        self._done, self._total = 0, sum(map(math.prod, self._shapes.values()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def items(self) -> list[tuple[str, Tensor]]:  # type: ignore[override]
        return [(n, torch.empty(shape, dtype=self._dtype_of(n), device="meta")) for n, shape in self._shapes.items()]

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        tensor = torch.empty(shape, dtype=self._dtype_of(name))
        copy_all(work for stored, view in file_tensors(name, shape, self._per_expert)
                 for work in self._source(stored).pieces(view(tensor)))  # fmt: skip
        if tensor.numel() and not bool(tensor.abs().max().isfinite()):
            raise WeightsError(f"{name} holds NaN or infinite numbers, or ones that {str(self._dtype)[6:]} cannot: "
                               "fetch the checkpoint again, or choose bfloat16")  # fmt: skip
        self._done += tensor.numel()
        self._on_progress(self._done, self._total)
        return tensor

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if ROUTER_BIAS.search(name) else self._dtype

    def _source(self, name: str) -> TensorSource:
        if name not in self._sources:
            raise WeightsError(f"the checkpoint lacks {name}; fetch it again")
        if not self._sources[name].is_readable:
            raise WeightsError(f"{name} is {self._sources[name].dtype}, which keye does not read; use another file")
        return self._sources[name]


def _fused_shapes(
    sources: Mapping[str, TensorSource], per_expert: set[str]
) -> Iterator[tuple[str, tuple[int, ...]]]:  # fmt: skip
    """Official names and shapes, experts fused."""
    for name in sorted(sources, key=lambda name: sources[name].place):
        module = next((module for module in per_expert if name.startswith(f"{module}.")), None)
        if module is None:
            yield name, sources[name].shape
        elif name == f"{module}.0.down_proj.weight":
            count = sum(name.startswith(f"{module}.") and name.endswith(".down_proj.weight") for name in sources)
            rows, inner = sources[name].shape
            yield f"{module}.gate_up_proj", (count, rows, 2 * inner)
            yield f"{module}.down_proj", (count, inner, rows)
