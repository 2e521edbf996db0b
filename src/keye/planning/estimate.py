"""What a request will take: bytes by part, and seconds by phase from rates measured on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from keye.cache.slabs import KVFormat, KVLayout, KVStore
from keye.config import KeyeConfig, VisionConfig
from keye.engine.step import prompt_scratch
from keye.errors import KeyeError
from keye.models.attention import AttentionMode, cache_rows
from keye.models.outline import outline, read_parameters
from keye.models.vision import PATCHES_PER_CHUNK
from keye.ops.kv_blocks import KV_BLOCK
from keye.planning.measure import LayerRates, Rates, layer_bytes, measure_frame, measure_head, measure_layer
from keye.units import format_bytes


@dataclass(frozen=True)
class CostQuery:
    """What is asked: `frames` frames (or images) of `grid` (height, width) patches, `prompt` tokens in all, `reply`
    tokens; `media_seconds` is what opening and decoding the media takes, None where that is not known."""

    frames: int
    grid: tuple[int, int]
    prompt: int
    reply: int
    media_seconds: float | None = None


@dataclass(frozen=True)
class Estimate:
    """`bytes` by part (weights, kv, vision, scratch) and their sum in `total`; `seconds` by phase, without those that
    are not known; `generate_tokens_per_second` of this request alone. `context` is the prompt and the reply."""

    device: str
    kv: str
    context: int
    bytes: Mapping[str, int]
    seconds: Mapping[str, float]
    generate_tokens_per_second: float | None

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "total_bytes": self.total}


def memory_of(
    config: KeyeConfig, request: CostQuery, dtype: torch.dtype, kv: KVFormat, weights: int | None = None
) -> dict[str, int]:
    """Bytes by part while the request runs; `weights` are those of the weights where they are not all in `dtype`."""
    layout = KVLayout.of(cache_rows(config.text), dtype, kv)
    tokens = request.prompt + request.reply
    parts = outline(dict(config.raw))
    patches = request.frames * request.grid[0] * request.grid[1]
    visual_tokens = patches // config.vision.spatial_merge_size**2
    encoding = encoding_bytes(config.vision, dtype.itemsize, patches)
    return {
        "weights": read_parameters(parts.shapes) * dtype.itemsize if weights is None else weights,
        "kv": KVStore(layout).slabs_for(tokens) * KVStore(layout).slab_bytes,
        "vision": encoding + visual_tokens * config.text.hidden_size * dtype.itemsize,
        "scratch": prompt_scratch(config.text, request.prompt, dtype.itemsize),
    }


def encoding_bytes(vision: VisionConfig, itemsize: int, patches: int = PATCHES_PER_CHUNK) -> int:
    """Bytes of pixels and activations while so many patches are encoded, a chunk of them at a time."""
    pixels = 3 * vision.patch_size**2
    activations = vision.intermediate_size + 6 * vision.hidden_size
    return min(PATCHES_PER_CHUNK, patches) * (4 * pixels + activations * itemsize)


def measure_rates(
    config: KeyeConfig, grid: tuple[int, int], *, dtype: torch.dtype, device: torch.device, kv: KVFormat = "auto",
    mode: AttentionMode = "sparse", free: int | None = None,
) -> Rates:  # fmt: skip
    """Measures one layer of everything; `KeyeError` when `free` bytes are too few for that."""
    need = layer_bytes(config.text, dtype)
    if free is not None and 1.5 * need > free:
        raise KeyeError(f"timing one layer takes {format_bytes(int(1.5 * need))}, but {format_bytes(free)} are free")
    layout = KVLayout.of(cache_rows(config.text), dtype, kv)
    prefill, decode = measure_layer(config.text, layout, dtype, device, mode)
    frame = measure_frame(config.vision, config.text.hidden_size, grid, dtype, device)
    return Rates(prefill, decode, measure_head(config.text, dtype, device), frame, grid[0] * grid[1])


def estimate(
    config: KeyeConfig, request: CostQuery, rates: Rates | None, *, dtype: torch.dtype, device: str,
    kv: KVFormat = "auto", weights: int | None = None,
) -> Estimate:  # fmt: skip
    """The prediction; without rates that of memory alone. `weights` as in `memory_of`."""
    seconds: dict[str, float] = {}
    rate = None
    if request.media_seconds is not None:
        seconds["media"] = request.media_seconds
    if rates is not None:
        layers = config.text.num_hidden_layers
        patches = request.grid[0] * request.grid[1]
        seconds["vision"] = request.frames * rates.frame * patches / max(1, rates.patches)
        seconds["prefill"] = layers * prefill_seconds(rates.prefill, request.prompt) + rates.head
        step = layers * rates.decode.at(request.prompt + request.reply / 2) + rates.head
        seconds["generate"] = step * max(0, request.reply - 1)
        rate = 1 / step
    rounded = {name: round(value, 4) for name, value in seconds.items()}
    memory = memory_of(config, request, dtype, kv, weights)
    context = request.prompt + request.reply
    return Estimate(device, kv, context, memory, rounded, None if rate is None else round(rate, 2))


def prefill_seconds(rates: LayerRates, tokens: int) -> float:
    """One layer over a prompt of `tokens`, chunk by chunk; the last chunk counts by its share."""
    full, rest = divmod(tokens, rates.tokens)
    total = sum(rates.at(chunk * rates.tokens) for chunk in range(full))
    return total + rates.at(full * rates.tokens) * rest / rates.tokens


def what_fits(
    config: KeyeConfig, request: CostQuery, dtype: torch.dtype, free: int, weights: int | None = None
) -> str | None:
    """A sentence on how the request could be made to fit into `free` bytes; None where it does."""
    if sum(memory_of(config, request, dtype, "auto", weights).values()) <= free:
        return None
    if sum(memory_of(config, request, dtype, "int8", weights).values()) <= free:
        return "it fits with --kv int8"
    if sum(memory_of(config, request, dtype, "int4", weights).values()) <= free:
        return "it fits with --kv int4"
    parts = memory_of(config, request, dtype, "int4", weights)
    fixed = parts["weights"] + parts["scratch"]
    if fixed > free:
        return f"weights and scratch alone take {format_bytes(fixed)}"
    each = KVLayout.of(cache_rows(config.text), dtype, "int4").token_bytes
    per_frame = max(1, request.prompt // max(1, request.frames))
    tokens = (free - fixed - parts["vision"]) // each // KV_BLOCK * KV_BLOCK - request.reply
    frames = max(0, tokens // per_frame)
    return f"with --kv int4 about {frames:,} of its {request.frames:,} frames fit: --max-frames {frames}"
