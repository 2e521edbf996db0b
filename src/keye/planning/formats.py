"""Bytes of a model's weights in each number format, from the shapes of its tensors: what `keye quantize` makes of them.

Knows shapes and formats, no files and no machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final, Literal, get_args

from keye.models.outline import PARTS
from keye.weights.names import IGNORED

#: 16-bit weights, or the two formats that `keye.load(quant=...)` makes of them.
WeightFormat = Literal["bf16", "int8", "int4"]
WEIGHT_FORMATS: Final[tuple[WeightFormat, ...]] = get_args(WeightFormat)
#: Columns that share a scale of int4, and bytes of a scale.
GROUP: Final = 64
_SCALE_BYTES: Final = 2
#: Parts whose matrices keep 8 bits in an int4 model, and parts that are never quantised.
_CAREFUL: Final = ("indexer", "vision tower", "projector")
_PLAIN: Final = ("router", "norms", "other")
#: Matrices that are no products of rows: in the vision tower the look-up of positions and the convolution of patches,
#: in latent attention the weight that is used from both sides.
_NOT_ROWS: Final = re.compile(r"\.embeddings\.|\.kv_b_proj\.")
#: A fused tensor holds [experts, inputs, outputs]; the columns of a quantised row are its inputs.
_FUSED: Final = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")


def part_of(name: str) -> str:
    """The part of `keye.models.outline.PARTS` that a tensor belongs to."""
    return next(part for part, pattern in PARTS if pattern.search(name))


def weight_bytes(shapes: Mapping[str, tuple[int, ...]], weights: WeightFormat) -> dict[str, int]:
    """Bytes of each part in `weights`, scales included; tensors that no forward pass reads are left out."""
    total: dict[str, int] = {}
    for name, shape in shapes.items():
        if not IGNORED.search(name):
            part = part_of(name)
            total[part] = total.get(part, 0) + tensor_bytes(name, shape, weights)
    return total


def tensor_bytes(name: str, shape: tuple[int, ...], weights: WeightFormat) -> int:
    """Bytes of one tensor: int8 has a scale for each row, int4 one for each 64 columns."""
    part, numbers = part_of(name), math.prod(shape)
    if weights == "bf16" or len(shape) < 2 or part in _PLAIN or _NOT_ROWS.search(name):
        return 2 * numbers
    columns = shape[-2] if _FUSED.search(name) else shape[-1]
    rows = numbers // columns
    if weights == "int8" or part in _CAREFUL:
        return numbers + _SCALE_BYTES * rows
    return rows * (math.ceil(columns / 2) + _SCALE_BYTES * math.ceil(columns / GROUP))
