"""A checkpoint's tensors to those of a GGUF file: put together, cut into pieces, and written by several threads.

Memory is bounded by the pieces that are under way, whatever the size of a tensor. Knows names and bytes; metadata come
from the caller.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor

from keye.process import available_cores
from keye.weights.gguf.mixes import text_types, vision_types
from keye.weights.gguf.names import Part, Recipe, Sizes, take_part, write_recipe
from keye.weights.gguf.reader import GGUFError, Value
from keye.weights.gguf.types import FILE_TYPES
from keye.weights.gguf.write import encode_rows, gguf_draft, lay_out
from keye.weights.names import IGNORED, INDEXER, VISION
from keye.weights.source import TensorSource

#: Numbers of a piece: a few of them, as float32 and in what becomes of them, are in memory for each core.
PIECE: Final = 1 << 22
#: Version of the block formats, as llama.cpp counts them.
_QUANTIZATION_VERSION: Final = 2
_EXPERT: Final = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
#: The table that official vision parts hold, though no forward pass reads it.
_PACKING: Final = ".packing_position_embedding."

Shape = tuple[int, ...]
What = Literal["text", "vision"]


@dataclass(frozen=True)
class Piece:
    """Rows begin .. end of the first dimension of an official tensor."""

    name: str
    begin: int
    end: int
    numbers: int


@dataclass(frozen=True)
class Conversion:
    """Everything that is decided before a number is read: official name -> source and recipe, in the order of reading,
    and types and shapes of the tensors of the file."""

    sources: Mapping[str, TensorSource]
    recipes: Mapping[str, Recipe]
    tensors: Mapping[str, tuple[str, Shape]]
    file_type: str


def plan_conversion(
    sources: Mapping[str, TensorSource], what: What, file_type: str, sizes: Sizes, *, layers: int, experts: int,
    indexer: bool = True,
) -> Conversion:  # fmt: skip
    """What becomes of the tensors of a checkpoint in a file of its language model or its vision part, without the
    indexer unless `indexer`. `GGUFError` names tensors that GGUF has no place for."""
    recipes, unknown = {}, []
    for name in sorted(sources, key=lambda name: sources[name].place):
        if not _belongs(name, what, indexer) or _is_draft(name, layers):
            continue
        recipe = _recipe(name, sources[name].shape, sizes)
        if recipe is None:
            unknown.append(name)
        else:
            recipes[name] = recipe
    if unknown:
        raise GGUFError(f"the checkpoint has tensors that GGUF has no place for: {', '.join(sorted(unknown)[:20])}")
    shapes = dict(sorted(_shapes(recipes).items(), key=lambda item: _order(item[0])))
    if what == "text":
        types = text_types(shapes, file_type, layers=layers, experts=experts)
    else:
        types = vision_types(shapes, file_type)
    return Conversion(sources, recipes, {name: (types[name], shape) for name, shape in shapes.items()}, file_type)


def _belongs(name: str, what: What, indexer: bool) -> bool:
    if IGNORED.search(name) and not (_PACKING in name and what == "vision"):
        return False
    return name.startswith(VISION) == (what == "vision") and (indexer or INDEXER not in name)


def _is_draft(name: str, layers: int) -> bool:
    """Whether a tensor is of the layers behind the last one, which draft tokens and are not run."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return match is not None and int(match[1]) >= layers


def _recipe(name: str, shape: Shape, sizes: Sizes) -> Recipe | None:
    """As `write_recipe`, also of the matrices of single experts."""
    if match := _EXPERT.fullmatch(name):
        return Recipe(
            shape, shape, (Part(f"blk.{match[1]}.ffn_{match[3]}_exps.weight", shape[0], expert=int(match[2])),)
        )
    return write_recipe(name, shape, sizes)


def _shapes(recipes: Mapping[str, Recipe]) -> dict[str, Shape]:
    """The tensors of the file."""
    shapes: dict[str, Shape] = {}
    for recipe in recipes.values():
        for part in recipe.parts:
            shape = _part_shape(recipe, part)
            if part.expert is not None:
                shape = (max(part.expert + 1, shapes.get(part.tensor, (0,))[0]), *shape)
            shapes[part.tensor] = shape
    return shapes


def _part_shape(recipe: Recipe, part: Part) -> Shape:
    if len(recipe.parts) == 1 and not recipe.is_transposed and not part.is_transposed:
        return recipe.shape
    *leading, _, columns = recipe.layout
    return (*leading, columns, part.rows) if part.is_transposed else (*leading, part.rows, columns)


def _order(name: str) -> tuple[int, str]:
    """As llama.cpp sorts: what belongs to no layer, then layer by layer."""
    match = re.match(r"(?:v\.)?blk\.(\d+)\.", name)
    return (int(match[1]) if match else -1, name)


def write_conversion(
    path: Path, conversion: Conversion, metadata: Mapping[str, Value],
    on_progress: Callable[[int, int], None] = lambda done, total: None, *, fingerprint: str = "",
) -> None:  # fmt: skip
    """Writes the file. `on_progress` gets the numbers that are written and those of the whole checkpoint, on the thread
    that called. `fingerprint` stands for the checkpoint: with an equal one an interrupted conversion is continued.

    `KeyeError` with one sentence for NaN or infinite numbers, numbers beyond half precision, a full disk, and a
    checkpoint that is cut short; then nothing is left behind.
    """
    number = next(number for number, name in FILE_TYPES.items() if name == conversion.file_type)
    values = {**metadata, "general.file_type": number, "general.quantization_version": _QUANTIZATION_VERSION}
    layout = lay_out(values, conversion.tensors)
    pieces = list(_cut(conversion))
    total = sum(piece.numbers for piece in pieces)
    with gguf_draft(path, layout, fingerprint) as draft, ThreadPoolExecutor(available_cores()) as pool:
        done = sum(piece.numbers for piece in pieces[: draft.steps])
        on_progress(done, total)

        def convert(step: int) -> int:
            for tensor, row, rows in _rows(conversion, pieces[step]):
                draft.write(
                    tensor, row, encode_rows(rows, layout.tensors[tensor].type.name, pieces[step].name).view(-1)
                )
            draft.finish(step)
            return pieces[step].numbers

        waiting = iter(range(draft.steps, len(pieces)))
        running = {pool.submit(convert, step) for step in islice(waiting, 2 * available_cores())}
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                done += future.result()
                if (step := next(waiting, None)) is not None:
                    running.add(pool.submit(convert, step))
            on_progress(done, total)
        assert draft.steps == len(pieces)


def _cut(conversion: Conversion) -> Iterator[Piece]:
    for name, recipe in conversion.recipes.items():
        shape = conversion.sources[name].shape
        if not shape:
            raise GGUFError(f"{name} is a single number; the checkpoint is damaged: fetch it again")
        numbers = 1
        for size in shape[1:]:
            numbers *= size
        separable = len(shape) == 3 or (len(shape) == 2 and len(recipe.parts) == 1 and recipe.layout == shape)
        step = max(1, PIECE // numbers) if separable else shape[0]
        for begin in range(0, shape[0], step):
            end = min(begin + step, shape[0])
            yield Piece(name, begin, end, (end - begin) * numbers)


def _rows(conversion: Conversion, piece: Piece) -> Iterator[tuple[str, int, Tensor]]:
    """Reads a piece: tensors of the file, the row that each begins at, and its rows float32 [rows, columns]."""
    source, recipe = conversion.sources[piece.name], conversion.recipes[piece.name]
    numbers = torch.empty(piece.end - piece.begin, *source.shape[1:])
    if (piece.begin, piece.end) != (0, source.shape[0]):
        source = source.part(piece.begin, piece.end)
    for work in source.pieces(numbers):
        work()
    for part in recipe.parts:
        values = numbers if len(recipe.parts) == 1 and not recipe.is_transposed else take_part(recipe, part, numbers)
        rows = values.reshape(-1, values.shape[-1])
        each = len(rows) // (piece.end - piece.begin) if len(source.shape) == 3 else 1
        begin = piece.begin * each + (part.expert or 0) * recipe.shape[0]
        yield part.tensor, begin, rows
