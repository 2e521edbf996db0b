"""How many large GPUs together hold a model that a single one does not. keye itself runs a model on one device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from keye.models.outline import Outline
from keye.planning.formats import part_of, weight_bytes
from keye.planning.placement import CARD_RESERVE, ModelSizes
from keye.weights.names import IGNORED

#: Bytes of a card, and the context that each must have room for: latents are not split among cards.
CARD: Final = 80 * 10**9
CONTEXT: Final = 32 * 1024
#: Rows and columns of a float8 weight that share a float32 scale, as DeepSeek-V3's files have it.
BLOCK: Final = 128
#: Parts whose matrices are float8 in such files.
_FLOAT8: Final = ("attention", "experts", "shared experts", "dense layers")
NAMES: Final = {"bf16": "16-bit", "fp8": "float8", "int8": "int8", "int4": "int4"}


@dataclass(frozen=True)
class Cards:
    """Bytes of weights in a format and the fewest cards that hold them, a power of two as tensor parallelism takes."""

    weights: str
    nbytes: int
    cards: int


def count_cards(model: Outline) -> list[Cards]:
    """For each format, the largest first; none where one card holds the model in int4."""
    sizes = {name: sum(weight_bytes(model.shapes, name).values()) for name in ("bf16", "int8", "int4")}
    sizes["fp8"] = float8_bytes(model)
    extra = ModelSizes.of(model).context_bytes(CONTEXT) + CARD_RESERVE
    counted = [Cards(name, sizes[name], _fewest(sizes[name], CARD - extra)) for name in NAMES]
    return counted if counted[-1].cards > 1 else []


def float8_bytes(model: Outline) -> int:
    """Bytes of the weights as official float8 files have them, without the draft layer."""
    total = 0
    for name, shape in model.shapes.items():
        if not IGNORED.search(name):
            is_float8 = len(shape) > 1 and part_of(name) in _FLOAT8
            blocks = math.prod(shape[:-2]) * math.prod(-(-size // BLOCK) for size in shape[-2:])
            total += math.prod(shape) + 4 * blocks if is_float8 else 2 * math.prod(shape)
    return total


def cards_sentence(counted: list[Cards]) -> str:
    """What `count_cards` found, in a sentence."""
    listed = ", ".join(f"{c.cards} in {NAMES[c.weights]} ({c.nbytes / 1e9:,.0f} GB of weights)" for c in counted)
    return f"GPUs of 80 GB that hold it together: at least {listed}; keye runs a model on one device"


def cards_to_dict(counted: list[Cards]) -> dict[str, Any] | None:
    """Plain data for JSON: cards by format; None where a single one holds the model."""
    return {c.weights: c.cards for c in counted} or None


def _fewest(nbytes: int, room: int) -> int:
    return 1 << max(0, math.ceil(math.log2(nbytes / room)))
