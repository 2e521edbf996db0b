"""Which number format each tensor of a GGUF file gets: llama.cpp's rules for its file types, so that a file has the
size and quality that people expect of the name.

Knows names and shapes in GGUF files; the rules are those of `llama-quant.cpp` (release v0.5.0) and of its converter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from keye.weights.gguf.types import BY_NAME

#: File types that are written, with the format that a matrix has unless a rule says otherwise; for language models, and
#: for vision parts, whose rows fit no K format.
TEXT_TYPES: Final = {
    "F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0", "Q4_K_M": "Q4_K", "Q3_K_M": "Q3_K",
}  # fmt: skip
VISION_TYPES: Final = ("F16", "BF16", "Q8_0")
#: What takes the place of a format whose blocks do not divide a row.
_SMALLER_BLOCKS: Final = {"Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
#: Mixtral had this many experts, and llama.cpp treats every model that has as many like it.
_MIXTRAL: Final = 8
_LAYER: Final = re.compile(r"blk\.(\d+)\.")
#: Matrices of the indexer that llama.cpp leaves as the checkpoint has them.
_INDEXER: Final = re.compile(r"indexer\.[qk]_proj\.weight$")
_FLOAT32: Final = re.compile(r"_norm\.weight$|ffn_gate_inp\.weight$|indexer\.proj\.weight$")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """What the rules depend on beside a tensor's name and shape."""

    layers: int
    experts: int
    is_tied: bool


def text_types(shapes: Mapping[str, Shape], file_type: str, *, layers: int, experts: int) -> dict[str, str]:
    """The format of every tensor of a language model by its name in the file; shapes as in torch."""
    model = Model(layers, experts, "output.weight" not in shapes)
    return {name: _text_type(name, shape, file_type, model) for name, shape in shapes.items()}


def vision_types(shapes: Mapping[str, Shape], file_type: str) -> dict[str, str]:
    """The same for the tensors of an mmproj file."""
    return {name: _vision_type(name, shape, file_type) for name, shape in shapes.items()}


def _text_type(name: str, shape: Shape, file_type: str, model: Model) -> str:
    base = TEXT_TYPES[file_type]
    if len(shape) < 2 or _FLOAT32.search(name):
        return "F32"
    if _INDEXER.search(name) and base not in ("F32", "F16"):
        return "BF16"
    if base in ("F32", "F16", "BF16"):
        return base
    return _fitting(_raised(name, shape, file_type, model), shape[-1])


def _raised(name: str, shape: Shape, file_type: str, model: Model) -> str:
    """The format of a matrix before its rows are looked at."""
    base, mixtral = TEXT_TYPES[file_type], model.experts == _MIXTRAL
    if name == "output.weight" or (name == "token_embd.weight" and model.is_tied):
        return "Q8_0" if base == "Q8_0" or shape[-1] % BY_NAME[base].block else "Q6_K"
    if mixtral and name.endswith(("attn_v.weight", "attn_k.weight")):
        return "Q8_0"
    if base == "Q8_0" or (match := _LAYER.match(name)) is None:
        return base
    layer = int(match[1])
    if name.endswith(("attn_v.weight", "attn_kv_b.weight")):
        if file_type == "Q3_K_M":
            return "Q5_K" if layer < 2 else "Q4_K"
        return "Q6_K" if _takes_more(layer, model.layers) else base
    if "ffn_down" in name:
        if file_type == "Q3_K_M":
            return "Q5_K" if layer < model.layers // 16 else "Q4_K"
        return "Q6_K" if _takes_more(layer, model.layers) else base
    if name.endswith("attn_output.weight"):
        return "Q5_K" if mixtral else "Q4_K"
    return base


def _takes_more(layer: int, layers: int) -> bool:
    """Layers whose most sensitive matrices get more bits: the first and last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _fitting(kind: str, columns: int) -> str:
    if columns % BY_NAME[kind].block:
        kind = _SMALLER_BLOCKS.get(kind, kind)
    return kind if columns % BY_NAME[kind].block == 0 else "F16"


def _vision_type(name: str, shape: Shape, file_type: str) -> str:
    if len(shape) < 2 or name == "v.position_embd.weight":
        return "F32"
    if name == "v.patch_embd.weight":
        return "F16" if file_type == "F16" else "F32"
    return _fitting(file_type, shape[-1])
