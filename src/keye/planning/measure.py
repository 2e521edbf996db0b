"""How fast this machine runs one layer of a model: what predictions are made from.

A layer with random weights of the right shapes is timed, the very code that will run: at two chunk sizes and several
lengths of the past. No checkpoint is read. Takes seconds, and the memory of one layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import nn

from keye.cache.sequence import KVCache
from keye.cache.slabs import KVLayout, KVStore, memory_slabs
from keye.config import TextConfig, VisionConfig
from keye.engine.step import ALONE_TOKENS
from keye.models.attention import AttentionMode, CachedStep, Span
from keye.models.keye import Decoder
from keye.models.moe import lay_out_for_decoding
from keye.models.vision import VisionTower, encode_vision
from keye.ops.registry import linear

#: Every timing is the fastest of as many runs as fit into this time, at least two.
SECONDS_EACH: Final = 0.4
#: Lengths of the past at which a layer is timed, as multiples of the model's top-k (of 2,048 for dense models).
DEPTHS: Final = (2, 6)
#: Rows of the head that are timed; a larger vocabulary is scaled.
_HEAD_ROWS: Final = 16384


@dataclass(frozen=True)
class LayerRates:
    """Seconds of one decoder layer for `tokens` new tokens, at each of `depths` tokens in the past; ascending."""

    tokens: int
    depths: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, depth: float) -> float:
        """Seconds at another depth: on the straight line between the nearest two, never below zero."""
        place = next((i for i, known in enumerate(self.depths) if depth <= known), len(self.depths) - 1)
        i = max(1, place)
        (low, high), (before, after) = self.depths[i - 1 : i + 1], self.seconds[i - 1 : i + 1]
        return max(0.0, before + (after - before) * (depth - low) / (high - low))


@dataclass(frozen=True)
class Rates:
    """What was measured: a prefill chunk and a decode step of one layer, the head for one token, and for the vision
    tower the seconds of one frame of `patches` patches."""

    prefill: LayerRates
    decode: LayerRates
    head: float
    frame: float
    patches: int


def measure_layer(
    text: TextConfig, layout: KVLayout, dtype: torch.dtype, device: torch.device, mode: AttentionMode = "sparse"
) -> tuple[LayerRates, LayerRates]:
    """Times one decoder layer of the shapes of `text`: (prefill chunk, decode step)."""
    config = _single_layer(text)
    with torch.device("meta"):
        decoder = Decoder(config).to(dtype)
        lay_out_for_decoding(decoder, device, dtype)
    fill_with_noise(decoder.to_empty(device=device))
    unit = text.sparse.topk if text.sparse is not None else 2048
    depths = (0, *(factor * unit for factor in DEPTHS))
    rates = []
    for tokens in (ALONE_TOKENS, 1):
        seconds = [_time_layer(decoder, config, layout, tokens, depth, mode) for depth in depths]
        rates.append(LayerRates(tokens, depths, tuple(seconds)))
    return rates[0], rates[1]


@torch.inference_mode()
def _time_layer(
    decoder: Decoder, text: TextConfig, layout: KVLayout, tokens: int, depth: int, mode: AttentionMode
) -> float:
    weight = decoder.norm.weight
    store = KVStore(replace(layout, layers=1), make_slab=memory_slabs(weight.device))
    cache = KVCache(1, store)
    for start in range(0, depth, ALONE_TOKENS):
        n = min(ALONE_TOKENS, depth - start)
        noise = {name: torch.randn(n, rows.heads, rows.dim, device=weight.device) for name, rows in layout.rows.items()}
        cache.append(0, {name: rows.to(weight.dtype) for name, rows in noise.items()})
    x = torch.randn(tokens, text.hidden_size, device=weight.device).to(weight.dtype)
    positions = torch.arange(depth, depth + tokens, device=weight.device).expand(3, -1)

    def run() -> None:
        cache.truncate(depth)
        decoder(x, positions, CachedStep([Span(0, tokens, cache)], text, mode=mode))

    try:
        return fastest(run, weight.device)
    finally:
        cache.free()


@torch.inference_mode()
def measure_head(text: TextConfig, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of the output head for one token."""
    rows = min(text.vocab_size, _HEAD_ROWS)
    weight = torch.empty(rows, text.hidden_size, dtype=dtype, device=device)
    _fill_tensor(weight)
    x = torch.randn(1, text.hidden_size, device=device).to(dtype)
    return fastest(lambda: linear(x, weight), device) * text.vocab_size / rows


@torch.inference_mode()
def measure_frame(
    vision: VisionConfig, hidden: int, grid: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> float:
    """Seconds of the vision tower and projector for one frame of `grid` (height, width) patches: two shallow towers are
    timed and their difference taken for each further layer."""
    height, width = grid
    frames = max(1, 1024 // (height * width))
    side = vision.patch_size
    pixels = torch.rand(frames * height * width, vision.num_channels, side, side, device=device)
    grids = torch.tensor([[1, height, width]] * frames)
    seconds = []
    for layers in (1, 2):
        with torch.device("meta"):
            tower = VisionTower(replace(vision, num_hidden_layers=layers), hidden)
        fill_with_noise(tower.to_empty(device=device).to(dtype))

        def run(tower: VisionTower = tower) -> None:
            encode_vision(tower.visual, tower.mlp_AR, pixels, grids)

        seconds.append(fastest(run, device))
    layer = max(0.0, seconds[1] - seconds[0])
    return (seconds[0] + (vision.num_hidden_layers - 1) * layer) / frames


def fastest(run: Callable[[], object], device: torch.device, seconds: float = SECONDS_EACH) -> float:
    """Seconds of the fastest of the runs that fit into `seconds`, at least two, after one that does not count."""
    run()
    best, count, begin = math.inf, 0, time.perf_counter()
    while count < 2 or (time.perf_counter() - begin < seconds and count < 50):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, count = min(best, time.perf_counter() - start), count + 1
    return best


def _single_layer(text: TextConfig) -> TextConfig:
    """A decoder of one layer, with experts where the model has any."""
    return replace(text, num_hidden_layers=1, vocab_size=8, mlp_only_layers=(), decoder_sparse_step=1)


def layer_bytes(text: TextConfig, dtype: torch.dtype) -> int:
    """Bytes of the layer that `measure_layer` makes."""
    with torch.device("meta"):
        decoder = Decoder(_single_layer(text))
    return sum(p.numel() for p in decoder.parameters()) * dtype.itemsize


def fill_with_noise(module: nn.Module) -> None:
    """Small random numbers in every weight of a module."""
    for tensor in (*module.parameters(), *module.buffers()):
        _fill_tensor(tensor.detach())


def _fill_tensor(tensor: torch.Tensor) -> None:
    """Noise of a small block, again and again: drawing billions of numbers would take longer than measuring."""
    flat = (tensor if tensor.is_contiguous() else tensor.mT).view(-1)
    block = torch.randn(min(flat.numel(), 1 << 20), device=tensor.device).mul_(0.02).to(tensor.dtype)
    for start in range(0, flat.numel(), block.numel()):
        part = flat[start : start + block.numel()]
        part.copy_(block[: part.numel()])
