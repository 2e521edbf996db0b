"""Where the weights of a model lie on a machine, and how fast it generates there: arithmetic on bytes and bandwidths.

A token reads every weight that is at work on it once, and its keys and values; nothing else is counted. Experts are
routed evenly, which is the worst case of keeping some of them nearer than others. Nothing is measured or run here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from keye.config import KeyeConfig
from keye.engine.step import prompt_scratch
from keye.models.outline import Outline
from keye.planning.estimate import encoding_bytes
from keye.planning.formats import WEIGHT_FORMATS, WeightFormat, weight_bytes
from keye.units import GIB, format_bytes

#: Share of a memory's nominal bandwidth that generating reaches.
REACHED: Final = 0.6
#: Seconds a layer and token for the way from a GPU to experts in main memory and back.
HOP_SECONDS: Final = 5e-5
#: Slowest rate that a plan accepts, in tokens a second.
SLOWEST: Final = 1.0
#: What the driver takes of a GPU, and the system and keye's own code of main memory.
CARD_RESERVE: Final = GIB
SYSTEM_RESERVE: Final = 5 * GIB // 2


#: Nominal bandwidths in GB/s of common GPUs by their size in GB: RTX 4060, 4070, 4080, 4090, L40S, A100.
CARDS: Final = {8: 272, 12: 504, 16: 717, 24: 1008, 48: 864, 80: 2039}
#: The same of Macs: M4, from 64 GB on M4 Max; and of two channels of DDR5-5600.
MACS: Final = {16: 120, 24: 120, 32: 120, 64: 546, 128: 546}
DDR5: Final = 89.6e9


@dataclass(frozen=True)
class Hardware:
    """A machine: bytes of its memories (`card` 0 without a GPU) and their bandwidths in bytes a second. `unified`
    memory is that of a Mac, of which a program may take a part."""

    name: str
    memory: int
    memory_bandwidth: float
    card: int = 0
    card_bandwidth: float = 0.0
    disk_bandwidth: float = 3e9
    unified: bool = False

    @property
    def card_room(self) -> int:
        """Bytes of the GPU that a model may take."""
        return max(0, self.card - CARD_RESERVE)

    @property
    def memory_room(self) -> int:
        """Bytes of main memory that a model may take: of unified memory what Metal lends by default."""
        if self.unified:
            return self.memory * (3 if self.memory > 36 * GIB else 2) // (4 if self.memory > 36 * GIB else 3)
        return max(0, self.memory - SYSTEM_RESERVE)


@dataclass(frozen=True)
class Placement:
    """A model in `weights` format with `context` tokens on a machine. `card`, `memory` and `disk` are bytes of weights
    and context in each; `experts` the share of the routed experts in each of them. `read` is bytes that one token reads
    from each. `refusal` is one sentence on why the model cannot run so; None where it can."""

    hardware: str
    weights: WeightFormat
    context: int
    card: int
    memory: int
    disk: int
    experts: dict[str, float]
    read: dict[str, int]
    tokens_per_second: float
    refusal: str | None

    @property
    def is_whole(self) -> bool:
        """Whether all lies in one memory."""
        return self.refusal is None and not self.disk and not (self.card and self.experts.get("memory"))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ModelSizes:
    """What a placement asks of a model. `parts` are bytes of each part of the weights by format, `experts` is (chosen
    for a token, all), `top_k` the rows that sparse attention reads; `config` is None for a decoder that does not
    run."""

    parts: Mapping[WeightFormat, Mapping[str, int]]
    layers: int
    experts: tuple[int, int] | None
    top_k: int | None
    kv_numbers: int
    indexer_numbers: int
    context: int
    config: KeyeConfig | None

    @classmethod
    def of(cls, model: Outline) -> ModelSizes:
        sparse = model.text.get("sparse")
        return cls(
            {weights: weight_bytes(model.shapes, weights) for weights in WEIGHT_FORMATS},
            int(model.text["num_hidden_layers"]), model.experts, sparse["topk"] if sparse else None, model.kv_numbers,
            model.indexer_numbers, model.context, model.config,
        )  # fmt: skip

    def context_bytes(self, context: int) -> int:
        """Bytes of 16-bit keys, values and indexer keys of so many tokens, and of the activations beside them."""
        cached = 2 * context * (self.kv_numbers + self.indexer_numbers)
        if self.config is None:
            return cached
        return cached + prompt_scratch(self.config.text, context, 2) + encoding_bytes(self.config.vision, 2)

    def always_read(self, weights: WeightFormat, context: int) -> int:
        """Bytes that every token reads: all but the experts and what only media and look-ups use, and the keys and
        values of its context, of which sparse attention selects."""
        silent = ("embeddings", "vision tower", "projector", "experts")
        rows = context if self.top_k is None else min(context, self.top_k)
        cached = 2 * (rows * self.kv_numbers + context * self.indexer_numbers)
        return cached + sum(size for part, size in self.parts[weights].items() if part not in silent)


def place(model: ModelSizes, machine: Hardware, weights: WeightFormat, context: int) -> Placement:
    """Fills the GPU, then main memory, then the disk: first what every token reads, then experts."""
    parts, near = model.parts[weights], "card" if machine.card else "memory"
    experts = parts.get("experts", 0)
    fixed = sum(parts.values()) - experts + model.context_bytes(context)
    rooms = {"card": machine.card_room, "memory": machine.memory_room}
    room = rooms[near]
    rooms[near] = max(0, room - fixed)
    of_experts = dict[str, int]()
    for where in ("card", "memory"):
        of_experts[where] = min(experts - sum(of_experts.values()), rooms[where])
    of_experts["disk"] = experts - sum(of_experts.values())
    sizes = {**of_experts, near: fixed + of_experts[near]}
    chosen = model.experts[0] / model.experts[1] if model.experts else 0.0
    read = {where: round(size * chosen) for where, size in of_experts.items()}
    read[near] += model.always_read(weights, context)
    seconds = _seconds(model, machine, read)
    shares = {where: round(part / experts, 4) for where, part in of_experts.items() if part} if experts else {}
    refusal = _refusal(machine, weights, fixed, room, read, seconds)
    return Placement(machine.name, weights, context, sizes["card"], sizes["memory"], sizes["disk"], shares, read,
                     round(1 / seconds, 2), refusal)  # fmt: skip


def largest_context(model: ModelSizes, machine: Hardware, weights: WeightFormat, *, one_memory: bool) -> int:
    """The most tokens of context, in steps of 1,024, that the machine holds; 0 where there are none. `one_memory` wants
    all weights in one memory."""

    def holds(context: int) -> bool:
        placed = place(model, machine, weights, context)
        return placed.is_whole if one_memory else placed.refusal is None

    low, high = 0, model.context // 1024
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(1024 * middle) else (low, middle - 1)
    return 1024 * low


def _seconds(model: ModelSizes, machine: Hardware, read: Mapping[str, int]) -> float:
    seconds = read["memory"] / (REACHED * machine.memory_bandwidth) + read["disk"] / machine.disk_bandwidth
    if machine.card:
        seconds += read["card"] / (REACHED * machine.card_bandwidth)
        seconds += HOP_SECONDS * model.layers * bool(read["memory"] or read["disk"])
    return seconds


def _refusal(
    machine: Hardware, weights: WeightFormat, fixed: int, room: int, read: Mapping[str, int], seconds: float
) -> str | None:
    if fixed > room:
        where = "the GPU" if machine.card else "main memory"
        return (f"{weights} does not fit: what every token reads and its context take {format_bytes(fixed)}, and "
                f"{where} has {format_bytes(room)} for them")  # fmt: skip
    if 1 / seconds < SLOWEST:
        slow = "disk" if read["disk"] else "memory"
        return (f"{weights} is too slow: every token reads {format_bytes(read[slow])} from {slow}, which leaves "
                f"{math.floor(100 / seconds) / 100:g} tokens a second")  # fmt: skip
    return None
