"""Weights as plain numbers, for writing them in another form: those of a folder that keye quantised are de-quantised
where they are read, as those of other files are by themselves."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from torch import Tensor

from keye.config import read_json
from keye.ops.quantized import QuantFormat, QuantTensor
from keye.quant.policy import Policy
from keye.weights.open import open_weights
from keye.weights.safetensors import StoredTensor
from keye.weights.source import TensorSource, WeightsError

_EXPERTS: Final = re.compile(r"(.+\.mlp\.experts)\.(gate_up|down)_proj")


@dataclass(frozen=True)
class CodedTensor:
    """Rows begin .. end of a matrix [M, K], or of that of one expert, out of its codes, scales and minima."""

    parts: tuple[StoredTensor, ...]
    stored_format: QuantFormat
    columns: int
    begin: int
    end: int
    expert: int | None = None
    format: None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.end - self.begin, self.columns

    @property
    def dtype(self) -> str:
        return str(self.stored_format)

    @property
    def nbytes(self) -> int:
        """Bytes of its codes and scales in the files."""
        matrix = math.prod(self.parts[0].shape[:-1])
        return sum(part.nbytes for part in self.parts) * (self.end - self.begin) // matrix

    @property
    def is_readable(self) -> bool:
        return True

    @property
    def place(self) -> tuple[str, int]:
        return self.parts[0].place

    def part(self, begin: int, end: int) -> CodedTensor:
        return replace(self, begin=self.begin + begin, end=self.begin + end)

    def quantized(self) -> QuantTensor:
        raise AssertionError("de-quantised where it is read")

    def pieces(self, target: Tensor) -> Iterator[Callable[[], object]]:
        yield lambda: target.copy_(self._numbers())

    def _numbers(self) -> Tensor:
        rows = slice(self.begin, self.end)
        if self.expert is None:
            tensors = [stored.part(self.begin, self.end).read() for stored in self.parts]
        else:
            tensors = [stored.part(self.expert, self.expert + 1).read()[0, rows] for stored in self.parts]
        return QuantTensor(self.stored_format, self.shape, *tensors).dequantize()


def open_plain(folder: Path) -> Mapping[str, TensorSource]:
    """As `open_weights`, under official names also where keye quantised the folder."""
    tensors, section = open_weights(folder), read_json(folder / "config.json").get("quantization_config")
    if not isinstance(section, Mapping) or section.get("quant_method") != "keye":
        return tensors
    stored = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, StoredTensor)}
    return join_codes(stored, Policy.from_dict(section))


def join_codes(tensors: Mapping[str, StoredTensor], policy: Policy) -> dict[str, TensorSource]:
    """The tensors of a folder under official names, experts one by one. `WeightsError` where they are not in the
    formats of `policy`, that of the folder."""
    sources: dict[str, TensorSource] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "codes":
            sources |= _join(module, tensor, tensors, policy)
        elif f"{module}.codes" not in tensors:
            sources[name] = tensor
    return sources


def _join(
    name: str, codes: StoredTensor, tensors: Mapping[str, StoredTensor], policy: Policy
) -> Iterator[tuple[str, TensorSource]]:
    form = policy.format_of(name)
    leaves = ("codes", "scales", "minima") if form is not None and form.has_minimum else ("codes", "scales")
    if form is None or any(f"{name}.{leaf}" not in tensors for leaf in leaves):
        raise WeightsError(f"{name} is not stored as quantization_config says; quantise the model again")
    columns = codes.shape[-1] * (2 if form.kind == "int4" else 1)
    rows, match = codes.shape[-2], _EXPERTS.fullmatch(name)
    coded = CodedTensor(tuple(tensors[f"{name}.{leaf}"] for leaf in leaves), form, columns, 0, rows)
    if match is None:
        yield name, coded
        return
    projections = ("gate", "up") if match[2] == "gate_up" else ("down",)
    each = rows // len(projections)
    for expert in range(codes.shape[0]):
        for i, projection in enumerate(projections):
            part = replace(coded, expert=expert, begin=i * each, end=(i + 1) * each)
            yield f"{match[1]}.{expert}.{projection}_proj.weight", part
