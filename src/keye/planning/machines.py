"""Which model runs on which machine: the published configurations against common GPUs, computers and Macs.

Bandwidths are the nominal ones of a common product of each size; `keye plan` takes others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Final

import torch

from keye.config import read_json
from keye.hub import PACKAGED, PUBLISHED, asset
from keye.models.outline import outline
from keye.planning.formats import WEIGHT_FORMATS
from keye.planning.measure import fastest
from keye.planning.placement import (
    CARD_RESERVE,
    CARDS,
    DDR5,
    MACS,
    REACHED,
    SYSTEM_RESERVE,
    Hardware,
    ModelSizes,
    Placement,
    largest_context,
    place,
)  # fmt: skip
from keye.process import Memory
from keye.units import GIB, format_bytes

#: Main memory beside a GPU in the table.
HOST_MEMORY: Final = 32 * GIB
#: Context that a recommended format must leave room for, and the slowest rate that is read with ease, a second.
WANTED_CONTEXT: Final = 32 * 1024
WANTED_RATE: Final = 5.0
#: Context at which rates are stated.
TABLE_CONTEXT: Final = 8 * 1024
#: Bytes that are summed to measure a bandwidth: more than a processor's caches hold.
_SUMMED: Final = 128 << 20
_PLACES: Final = {"memory": "in main memory", "disk": "on disk"}
#: Sizes in GB of the computers of the table.
_COMPUTERS: Final = (16, 24, 32, 64)


def common_machines() -> list[Hardware]:
    """The machines of the table."""
    cards = [Hardware(f"GPU {size} GB", HOST_MEMORY, DDR5, size * GIB, 1e9 * rate) for size, rate in CARDS.items()]
    computers = [Hardware(f"computer {size} GB", size * GIB, DDR5) for size in _COMPUTERS]
    macs = [Hardware(f"Mac {size} GB", size * GIB, 1e9 * rate, unified=True) for size, rate in MACS.items()]
    return [*cards, *computers, *macs]


def nominal_bandwidth(size: int, known: Mapping[int, int]) -> float:
    """Bytes a second of a common product with at most so many bytes."""
    rates = [rate for gigabytes, rate in known.items() if gigabytes * GIB <= size * 1.05]
    return 1e9 * (rates[-1] if rates else known[min(known)])


@cache
def published_sizes() -> dict[str, ModelSizes]:
    """The published models by their short names, from the configurations that ship with keye."""
    shorts = [short for short in PUBLISHED if short not in PACKAGED]
    return {short: ModelSizes.of(outline(read_json(asset(f"configs/{short}") / "config.json"))) for short in shorts}


def choose_format(model: ModelSizes, machine: Hardware) -> tuple[Placement, int] | None:
    """What to use on a machine, placed at `TABLE_CONTEXT` tokens, and the largest context that fits; None where nothing
    runs. Of the formats that lie in one memory the most exact that leaves room for 32K tokens (or all that the model
    knows) and is read with ease; else the fastest of all."""
    options = list(_options(model, machine))
    for placed, context in options:
        enough = placed.is_whole and context >= min(WANTED_CONTEXT, model.context)
        if enough and placed.tokens_per_second >= WANTED_RATE:
            return placed, context
    return max(options, key=lambda option: option[0].tokens_per_second, default=None)


def _options(model: ModelSizes, machine: Hardware) -> Iterator[tuple[Placement, int]]:
    """Each format that runs, the most exact first."""
    for weights in WEIGHT_FORMATS:
        placed = place(model, machine, weights, TABLE_CONTEXT)
        if placed.refusal is None:
            yield placed, largest_context(model, machine, weights, one_memory=placed.is_whole)


def machine_table() -> list[dict[str, Any]]:
    """A row for each machine and model: the format to use, where its weights lie, the largest context and the rate at
    8K tokens; `format` is None where nothing runs. Plain data."""
    rows = []
    for machine in common_machines():
        for name, model in published_sizes().items():
            row: dict[str, Any] = {"machine": machine.name, "model": name, "format": None}
            if (choice := choose_format(model, machine)) is not None:
                placed, context = choice
                row |= {"format": placed.weights, "whole": placed.is_whole, "largest_context": context,
                        "placement": placed.to_dict()}  # fmt: skip
            rows.append(row)
    return rows


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table as lines of Markdown: a row for each machine, a column for each model that runs on any."""
    names = [name for name in published_sizes() if any(row["format"] for row in rows if row["model"] == name)]
    yield "| | " + " | ".join(names) + " |"
    yield "|---" * (1 + len(names)) + "|"
    for machine in dict.fromkeys(row["machine"] for row in rows):
        cells = {row["model"]: _cell(row) for row in rows if row["machine"] == machine}
        yield f"| {machine} | " + " | ".join(cells[name] for name in names) + " |"


def _cell(row: Mapping[str, Any]) -> str:
    if row["format"] is None:
        return "no"
    placed = row["placement"]
    text = f"{row['format']}, {row['largest_context'] // 1024}K, {placed['tokens_per_second']:.0f}/s"
    if row["whole"]:
        return text
    others = " and ".join(f"{share:.0%} {_PLACES[where]}" for where, share in placed["experts"].items()
                          if where != ("card" if placed["card"] else "memory"))  # fmt: skip
    return f"{text}; of the experts {others}"


def recommend(model: ModelSizes, memory: Sequence[Memory], bandwidths: Mapping[str, float]) -> dict[str, Any] | None:
    """The format and device for a model on this machine, with the arithmetic in a sentence, as plain data; None where
    nothing runs. `bandwidths` are bytes a second that each device reads."""
    choices = []
    for device in memory:
        rate = bandwidths[device.device]
        if device.device == "cpu":
            machine = Hardware("cpu", device.free + SYSTEM_RESERVE, rate)
        else:
            machine = Hardware(device.device, SYSTEM_RESERVE, rate, device.free + CARD_RESERVE, rate)
        if (choice := choose_format(model, machine)) is not None:
            choices.append((choice[0].tokens_per_second, device, *choice))
    if not choices:
        return None
    rate, device, placed, context = max(choices, key=lambda choice: choice[0])
    weights, used = sum(model.parts[placed.weights].values()), model.context_bytes(TABLE_CONTEXT)
    sentence = (
        f"{placed.weights}: {format_bytes(weights)} of weights and {format_bytes(used)} for {TABLE_CONTEXT:,} tokens "
        f"in {format_bytes(device.free)}, at most {context:,} tokens; a token reads "
        f"{format_bytes(sum(placed.read.values()))}, which at {REACHED:.0%} of "
        f"{bandwidths[device.device] / 1e9:.3g} GB/s makes at most {_rounded(rate)} tokens a second"
    )
    if placed.disk:
        sentence += f", with {placed.experts['disk']:.0%} of the experts on disk"
    words = [] if placed.weights == "bf16" else ["--quant", placed.weights]
    words += ["--experts", "disk"] if placed.disk else []
    words += ["--device", device.device] if device.device != "cpu" else []
    return {"format": placed.weights, "device": device.device, "largest_context": context, "sentence": sentence,
            "options": words, "placement": placed.to_dict()}  # fmt: skip


@cache
def read_bandwidth(device: str) -> float:
    """Bytes a second that this process reads from a device's memory with all its threads: the best of a few sums over
    128 MiB. Measured once."""
    values = torch.ones(_SUMMED // 4, device=device)
    return _SUMMED / fastest(values.sum, values.device, seconds=0.03)


def _rounded(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.2g}"
