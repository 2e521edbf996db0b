"""Bytes of a model's weights in each number format, from the shapes of its tensors: what `keye quantize` makes of them.

Knows shapes and the rules of `keye.quant.policy`, no files and no machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final, Literal, get_args

from keye.models.outline import PARTS
from keye.quant.policy import Policy, make_policy
from keye.weights.names import IGNORED

#: 16-bit weights, or the two formats that `keye.load(quant=...)` makes of them.
WeightFormat = Literal["bf16", "int8", "int4"]
WEIGHT_FORMATS: Final[tuple[WeightFormat, ...]] = get_args(WeightFormat)
#: A fused tensor holds [experts, inputs, outputs]; a quantised one [experts, outputs, inputs].
_FUSED: Final = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")


def part_of(name: str) -> str:
    """The part of `keye.models.outline.PARTS` that a tensor belongs to."""
    return next(part for part, pattern in PARTS if pattern.search(name))


def weight_bytes(shapes: Mapping[str, tuple[int, ...]], weights: WeightFormat) -> dict[str, int]:
    """Bytes of each part in `weights`, scales included; tensors that no forward pass reads are left out."""
    policy = None if weights == "bf16" else make_policy(weights)
    total: dict[str, int] = {}
    for name, shape in shapes.items():
        if not IGNORED.search(name):
            part = part_of(name)
            total[part] = total.get(part, 0) + tensor_bytes(name, shape, policy)
    return total


def tensor_bytes(name: str, shape: tuple[int, ...], policy: Policy | None) -> int:
    """Bytes of one tensor under a policy; without one, and where it stays as it is, 2 for each number."""
    form = None if policy is None or len(shape) < 2 else policy.format_of(name)
    if form is None:
        return 2 * math.prod(shape)
    return form.nbytes((*shape[:-2], shape[-1], shape[-2]) if _FUSED.search(name) else shape)
