"""Tensors of GGUF files under official names, as sources of weights: de-quantised on the way into a plain model, or as
the same integers and scales that the file holds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from keye.ops.quantized import QuantFormat, QuantTensor, pack_int4
from keye.weights.gguf.dequantize import Codes, dequantize, unpack, unpack_pairs
from keye.weights.gguf.metadata import check_vision, read_sizes
from keye.weights.gguf.names import Part, Recipe, read_recipes, read_vision_recipes
from keye.weights.gguf.reader import GGUF, GGUFError, TensorInfo, read_gguf
from keye.weights.source import MemoryTensor, WeightsError

#: Bytes of a file that are turned into numbers at once; the numbers take up to 30 times as much.
PIECE_BYTES = 1 << 18
#: Formats that keep the codes and scales of a type as they are: kind, inputs that share a scale, whether it has minima.
_FORMATS = {
    "Q4_0": ("int4", 32, False), "Q4_1": ("int4", 32, True), "Q5_0": ("int8", 32, False), "Q5_1": ("int8", 32, True),
    "Q8_0": ("int8", 32, False), "Q2_K": ("int4", 16, True), "Q3_K": ("int4", 16, False), "Q4_K": ("int4", 32, True),
    "Q5_K": ("int8", 32, True), "Q6_K": ("int8", 16, False), "Q8_K": ("int8", 256, False),
}  # fmt: skip
FORMATS = {
    name: QuantFormat(kind, group, has_minimum=minimum, scale_dtype=torch.float32)  # type: ignore[arg-type]
    for name, (kind, group, minimum) in _FORMATS.items()
}


@dataclass(frozen=True)
class GGUFTensor:
    """An official tensor out of the tensors of a file; see `Recipe`. `infos` belong to the recipe's parts.

    With `is_compact` scales are float16. Those of K-quants are products of a float16 number and a small integer, which
    float32 holds exactly; in float16 they are still as fine as that number, and a weight takes a bit less.
    """

    name: str
    recipe: Recipe
    infos: tuple[TensorInfo, ...]
    is_compact: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.recipe.shape

    @property
    def dtype(self) -> str:
        return "+".join(dict.fromkeys(info.type.name for info in self.infos))

    @property
    def is_readable(self) -> bool:
        return all(info.type.is_readable for info in self.infos)

    @property
    def place(self) -> tuple[str, int]:
        return str(self.infos[0].file), self.infos[0].start

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return sum(info.nbytes for info in self.infos)

    @property
    def format(self) -> QuantFormat | None:
        """The format of `quantized()`; None where the file holds plain numbers, or parts in several types."""
        kinds = {info.type.name for info in self.infos}
        if len(kinds) > 1 or len(self.shape) != 2 or any(part.is_transposed for part in self.recipe.parts):
            return None
        form = FORMATS.get(kinds.pop())
        return replace(form, scale_dtype=torch.float16) if form is not None and self.is_compact else form

    def pieces(self, target: Tensor) -> Iterator[Callable[[], object]]:
        assert tuple(target.shape) == self.shape
        layout = target.transpose(-1, -2) if self.recipe.is_transposed else target.view(self.recipe.layout)
        for part, info in zip(self.recipe.parts, self.infos, strict=True):
            place = layout[..., part.at : part.at + part.rows, :]
            if part.is_transposed:
                place = place.transpose(-1, -2)
            for run in _cut(part, info, tuple(place.shape)):
                yield functools.partial(_fill, place[run.index], info, run)

    def quantized(self) -> QuantTensor:
        """The same numbers as integers with scales. Extra memory: a piece. `WeightsError` for scales that are not
        finite."""
        form = self.format
        assert form is not None
        result = QuantTensor.empty(form, self.recipe.layout)
        for part, info in zip(self.recipe.parts, self.infos, strict=True):
            rows = slice(part.at, part.at + part.rows)
            tensors = (result.codes, result.scales, result.minima)
            codes, scales, minima = (None if t is None else t[..., rows, :] for t in tensors)
            assert codes is not None and scales is not None
            for run in _cut(part, info, (*codes.shape[:-1], result.shape[-1])):
                data, at = _read(info, run), run.index
                with np.errstate(all="ignore"):
                    pairs = unpack_pairs(info.type, data)
                    numbers = pairs or unpack(info.type, data)
                stored = torch.from_numpy(numbers.codes) if pairs else _as_stored(numbers, form)
                codes[at] = stored.reshape(codes[at].shape)
                scales[at] = torch.from_numpy(numbers.scales).reshape(scales[at].shape)
                if minima is not None:
                    assert numbers.minima is not None
                    minima[at] = torch.from_numpy(-numbers.minima).reshape(minima[at].shape)
        numbers_to_check = (result.scales, *(() if result.minima is None else (result.minima,)))
        if not all(bool(tensor.isfinite().all()) for tensor in numbers_to_check):
            where = f"{self.infos[0].file} has scales in {self.infos[0].name}"
            raise WeightsError(f"{where} that are NaN or infinite; fetch it again")
        return result

    def part(self, begin: int, end: int) -> GGUFTensor | MemoryTensor:
        """Rows along the first dimension. Of tensors that are put together otherwise, the whole is read for them."""
        if len(self.shape) < 2 or self.recipe.layout != self.shape or self.recipe.is_transposed:
            return MemoryTensor(self.read()[begin:end])
        parts, infos = list[Part](), list[TensorInfo]()
        for part, info in zip(self.recipe.parts, self.infos, strict=True):
            first, last = max(part.at, begin), min(part.at + part.rows, end)
            if first < last:
                parts.append(replace(part, rows=last - first, begin=part.begin + first - part.at, at=first - begin))
                infos.append(info)
        shape = (end - begin, *self.shape[1:])
        return replace(self, recipe=Recipe(shape, shape, tuple(parts)), infos=tuple(infos))

    def read(self) -> Tensor:
        """The whole tensor as float32."""
        target = torch.empty(self.shape)
        for piece in self.pieces(target):
            piece()
        return target


@dataclass(frozen=True)
class _Run:
    """Neighbouring rows in a file, `nbytes` from byte `start` on, and their place in a tensor."""

    index: tuple[int | slice, ...]
    start: int
    nbytes: int


def _cut(part: Part, info: TensorInfo, shape: tuple[int, ...]) -> Iterator[_Run]:
    """The rows of a part [..., rows, columns] in runs of about `PIECE_BYTES`."""
    *leading, rows, columns = shape
    row_bytes = info.type.count_bytes(columns)
    rows_in_file = info.nbytes // row_bytes // math.prod(leading)
    step = max(1, PIECE_BYTES // row_bytes)
    for number, index in enumerate(np.ndindex(*leading)):
        first = info.start + (number * rows_in_file + part.begin) * row_bytes
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            yield _Run((*index, slice(begin, end)), first + begin * row_bytes, (end - begin) * row_bytes)


def _fill(place: Tensor, info: TensorInfo, run: _Run) -> None:
    with np.errstate(all="ignore"):  # a file may hold NaN
        numbers = dequantize(info.type, _read(info, run))
    place.copy_(torch.from_numpy(numbers).view(place.shape))


def _as_stored(numbers: Codes, form: QuantFormat) -> Tensor:
    codes = torch.from_numpy(numbers.codes)
    if form.kind == "int8":
        return codes.view(torch.int8)
    halves = codes if form.has_minimum else codes + 8
    return pack_int4(halves)


def _read(info: TensorInfo, run: _Run) -> np.ndarray:
    """The bytes of a run, uint8."""
    data = np.empty(run.nbytes, np.uint8)
    view = memoryview(data)  # type: ignore[arg-type]
    try:
        with open(info.file, "rb", buffering=0) as file:
            file.seek(run.start)
            while len(view):
                if not (count := file.readinto(view)):
                    raise WeightsError(f"{info.file} ends inside {info.name}; fetch it again")
                view = view[count:]
    except OSError as error:
        raise WeightsError(f"{info.file} cannot be read: {error}") from None
    return data


def open_gguf(
    model: Path, mmproj: Path | None = None, wanted: Callable[[str], bool] | None = None, *, compact: bool = False
) -> dict[str, GGUFTensor]:
    """The tensors of a language model and of its vision part under official names, `compact` or not; only headers
    are read.

    `GGUFError` for files that are not what they should be, and one that names tensors whose place is not known.
    """
    file = read_gguf(model)
    tensors = _tensors(
        file, read_recipes({t.name: t.shape for t in file.tensors.values()}, read_sizes(file), str(model))
    )
    if mmproj is not None:
        vision = read_gguf(mmproj)
        check_vision(vision)
        shapes = {t.name: t.shape for t in vision.tensors.values()}
        tensors |= _tensors(vision, read_vision_recipes(shapes, str(mmproj)))
    return {
        name: replace(tensor, is_compact=compact) for name, tensor in tensors.items() if wanted is None or wanted(name)
    }


def _tensors(file: GGUF, recipes: Mapping[str, Recipe]) -> dict[str, GGUFTensor]:
    tensors = {}
    for name, recipe in recipes.items():
        infos = tuple(_info(file.tensors[part.tensor], part) for part in recipe.parts)
        for part, info in zip(recipe.parts, infos, strict=True):
            columns = part.rows if part.is_transposed else recipe.layout[-1]
            if columns % info.type.block:
                raise GGUFError(f"{info.file} stores {info.name} as {info.type.name}, whose blocks do not fit its rows")
        tensors[name] = GGUFTensor(name, recipe, infos)
    return tensors


def _info(info: TensorInfo, part: Part) -> TensorInfo:
    """The tensor of a part: one matrix of stacked ones where it is an expert's."""
    if part.expert is None:
        return info
    nbytes = info.nbytes // info.shape[0]
    return replace(info, shape=info.shape[1:], start=info.start + part.expert * nbytes, nbytes=nbytes)
