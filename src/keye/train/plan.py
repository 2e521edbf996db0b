"""The memory and the arithmetic of a training run, from configurations alone: nothing is loaded.

Bytes are those of one process that shards nothing. They follow the tensors that the forward pass keeps for the backward
pass (a test compares them with autograd's), and `benchmarks/qlora_memory.py` compares the sum with a run's.

Legend: T tokens of a pack, d model width, H heads, G groups, D head dim, V vocabulary, E experts, K experts a token, I
expert width, C width of the vision tower.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from keye.config import KeyeConfig, TextConfig
from keye.models.keye import KeyeModel
from keye.models.load import replace_layers, torch_dtype
from keye.models.moe import ROW_MULTIPLE
from keye.models.quant_fill import plain_state, quantize_layer, quantized_weights, stored_policy
from keye.models.vision import PATCHES_PER_CHUNK
from keye.ops.reference import SCRATCH_BYTES
from keye.ops.registry import NATIVE_WIDTH
from keye.quant.layers import TILE_NUMBERS
from keye.quant.policy import make_policy
from keye.train.config import StageConfig, TrainConfig
from keye.train.lora import add_lora
from keye.train.losses import MAX_LOGITS
from keye.train.optim import mark_trainable

#: Float32 copies of logits, and bfloat16 ones, that the loss and its gradient hold at once.
_LOGITS_COPIES: Final = 4.5
_NUMBERS: Final = 4  # bytes of a float32 number


@dataclass(frozen=True)
class TrainPlan:
    """`parts`: bytes by what they hold. `flops`: operations of one pack, forward and backward. `trained`: numbers that
    change."""

    parts: Mapping[str, int]
    flops: float
    trained: int

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    def seconds(self, packs: float, rate: float) -> float:
        """Time of so many packs at `rate` operations a second."""
        return packs * self.flops / rate

    def to_dict(self) -> dict[str, Any]:
        """As `--json` has it."""
        return {"bytes": self.total, "parts": dict(self.parts), "flops": self.flops, "trained": self.trained}


@dataclass(frozen=True)
class _Load:
    """What a pack holds, and what is done with it. `trained` are the parts whose layers change. Norms keep `norm_bytes`
    of each number: their input where the compiled core computes them, else a copy in float32 and, where their weight
    changes, another one. `mixes_at_once`: quantised experts in one call, which keeps nothing inside them."""

    tokens: int
    visual_tokens: int
    learnt: int
    itemsize: int
    trained: frozenset[str]
    is_sparse: bool
    norm_bytes: int
    mixes_at_once: bool
    dropout: float
    checkpointing: bool
    topk: int


def plan_training(
    config: KeyeConfig, run: TrainConfig, stage: StageConfig, *, tokens: int, visual_tokens: int,
    learnt: int | None = None, cached_features: bool = False,
) -> TrainPlan:  # fmt: skip
    """The plan of a stage whose packs hold `tokens`, `visual_tokens` of them of media, with `learnt` tokens to predict
    (default: those that are not visual). With `cached_features` the vision tower does not run. Errors as of starting
    the run: layers that the model does not have."""
    model = _outline(config, run)
    weights = quantized_weights(model)
    fixed = sum(tensor.nbytes for tensor in plain_state(model).values())
    fixed += sum(weight.format.nbytes(weight.shape) for weight in weights.values())
    if run.lora is not None:
        lora = add_lora(model, run.lora)
        trained = {name: (parameter, False) for name, parameter in lora.named.items()}
    else:
        trained = {each.name: (each.parameter, each.is_matrix) for each in mark_trainable(model, stage)}
    numbers = sum(parameter.numel() for parameter, _ in trained.values())
    moments = sum(parameter.numel() * (1 if is_matrix else 2) for parameter, is_matrix in trained.values())
    parts_trained = frozenset(part for name in trained for part in [_part(name)] if part is not None)
    is_packed = run.device == "cpu" and any(name.endswith("experts.gate_up_proj") for name in weights)
    load = _Load(
        tokens, visual_tokens, tokens - visual_tokens if learnt is None else learnt, torch_dtype(run.dtype).itemsize,
        parts_trained, config.text.sparse is not None and stage.attention != "dense",
        _norm_bytes(config, run), is_packed and "experts" not in parts_trained,
        0.0 if run.lora is None else run.lora.dropout, run.checkpointing,
        0 if config.text.sparse is None else config.text.sparse.topk,
    )  # fmt: skip
    gradients = sum(parameter.nbytes for parameter, _ in trained.values())
    parts = {
        "weights": fixed,
        "adapter": sum(parameter.nbytes for parameter, _ in trained.values()) if run.lora is not None else 0,
        "optimizer": _NUMBERS * (numbers + moments),
        "gradients": gradients,
        **_activations(config, load, cached=cached_features),
    }
    if run.lora is not None and not run.checkpointing:
        parts["activations"] += load.itemsize * numbers  # pairs in the dtype of the activations
    # The update holds float32 gradients when activations are gone.
    working = parts["activations"] + parts["working"] + parts["vision"]
    update = 0 if run.lora is not None else 2 * _NUMBERS * numbers
    parts["update"] = max(0, update - working)
    flops = _flops(config, model, load, cached=cached_features, has_pairs=run.lora is not None)
    return TrainPlan({name: round(size) for name, size in parts.items() if size}, flops, numbers)


def measure_rate(device: str = "cpu", dtype: str = "bfloat16", size: int = 2048) -> float:
    """Operations a second of matrix products on a device, measured for about a second."""
    a, b = (torch.randn(size, size, device=device).to(torch_dtype(dtype)) for _ in range(2))
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < 1.0 or best == float("inf"):
        start = time.perf_counter()
        float((a @ b)[0, 0])  # waits until the device is done
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _outline(config: KeyeConfig, run: TrainConfig) -> KeyeModel:
    """The model without memory, quantised as it will be."""
    policy = make_policy(run.quant) if run.quant is not None else stored_policy(config)
    with torch.device("meta"):
        model = KeyeModel(config).to(torch_dtype(run.dtype))
        if policy is not None:

            def quantise(name: str, layer: nn.Module) -> nn.Module:
                form = policy.format_of(f"{name}.weight")
                return layer if form is None else quantize_layer(layer, form)

            replace_layers(model, quantise)
    return model


def _norm_bytes(config: KeyeConfig, run: TrainConfig) -> int:
    if run.device == "cpu" and config.text.hidden_size >= NATIVE_WIDTH:
        return torch_dtype(run.dtype).itemsize
    return _NUMBERS if run.lora is not None else 2 * _NUMBERS


def _part(name: str) -> str | None:
    """The part of a trained tensor that decides what the forward pass keeps."""
    for part, sign in (("tower", "visual."), ("projector", "mlp_AR."), ("indexer", ".sa_indexer."),
                       ("attention", ".self_attn."), ("router", ".mlp.gate."), ("experts", ".mlp.experts."),
                       ("dense", ".mlp."), ("head", "lm_head.")):  # fmt: skip
        if name.startswith(sign) or sign in name:
            return part
    return None


# --------------------------------------------------------------------------------------------------------------------
# Activations


def _activations(config: KeyeConfig, load: _Load, *, cached: bool) -> dict[str, float]:
    text, T, b = config.text, load.tokens, load.itemsize
    layers = [layer_bytes(text, load, is_moe=text.is_moe_layer(i)) for i in range(text.num_hidden_layers)]
    d, V = text.hidden_size, text.vocab_size
    ends = T * (2 * d * b + _NUMBERS * text.rotary_dim + 3 * 8)  # last states before and after the norm, angles
    saved = ends + (T * d * b * len(layers) if load.checkpointing else sum(layers))
    rows = min(load.learnt, max(1, MAX_LOGITS // V))
    head = rows * V * _NUMBERS * _LOGITS_COPIES + load.learnt * d * 2 * b
    again = (max(layers) if load.checkpointing else 0) + _working_bytes(text, load)
    vision = 0.0
    if config.has_vision and load.visual_tokens and not cached:
        patches = load.visual_tokens * config.vision.spatial_merge_size**2
        vision = _vision_bytes(config, load, patches)
    return {"activations": saved, "working": max(head, again), "vision": vision}


def layer_bytes(text: TextConfig, load: _Load, *, is_moe: bool) -> float:
    """Bytes that a decoder layer keeps for its backward pass, its input included."""
    b, d, T = load.itemsize, text.hidden_size, load.tokens
    q, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    out = q if text.latent is None else text.num_attention_heads * text.latent.v_head_dim
    trains = load.trained
    # Inputs of norms: the layer's, what attention adds to it, queries and keys. Then what attention takes and makes.
    size = load.norm_bytes * (2.0 * d + q + kv) + b * (q + 2 * kv + out) + _NUMBERS * text.num_attention_heads
    if "attention" in trains:
        size += b * d + _dropped(load, 3 * d + out)
    if load.is_sparse and text.sparse is not None:
        heads, dim = text.sparse.indexer_num_heads, text.sparse.indexer_head_dim
        size += _NUMBERS * min(load.topk, T)  # the chosen keys
        if "indexer" in trains:
            size += b * d + 2 * b * (heads + 1) * (dim + 1) + _NUMBERS * heads
    size += _expert_bytes(text, load) if is_moe else _mlp_bytes(text, load)
    return size * T


def _expert_bytes(text: TextConfig, load: _Load) -> float:
    """Of a token in the router and the experts."""
    b, d = float(load.itemsize), text.hidden_size
    inner, K = text.moe_intermediate_size, text.num_experts_per_tok
    size = b * d + 5 * _NUMBERS * text.num_experts + 3 * 8 * K
    if load.mixes_at_once:
        return size
    rows = float(K)
    if load.tokens * K >= ROW_MULTIPLE * text.num_experts:  # then rows of each expert are padded
        rows += ROW_MULTIPLE / 2 * text.num_experts / load.tokens
    size += rows * 3 * b * inner + K * b * d  # gate, its activation and up; the outputs
    if "experts" in load.trained:
        size += rows * (b * d + b * inner + _dropped(load, d + inner))
    return size


def _mlp_bytes(text: TextConfig, load: _Load) -> float:
    b, d, inner = load.itemsize, text.hidden_size, text.intermediate_size
    size = 3.0 * b * inner
    if "dense" in load.trained:
        size += b * d + b * inner + _dropped(load, 2 * d + inner)
    return size


def _dropped(load: _Load, width: int) -> float:
    """Inputs of pairs with some numbers left out, and which."""
    return (load.itemsize + 1.0) * width if load.dropout else 0.0


def _working_bytes(text: TextConfig, load: _Load) -> float:
    """What the backward pass of a layer holds beside what the forward pass kept: gradients of its widest numbers, tiles
    of attention, a tile of a quantised matrix or the experts of one group."""
    b, d, T = load.itemsize, text.hidden_size, load.tokens
    wide = text.num_attention_heads * text.head_dim
    return T * (3 * b * wide + (_NUMBERS + 2 * b) * d) + SCRATCH_BYTES + TILE_NUMBERS * (2 * _NUMBERS + b)


def _vision_bytes(config: KeyeConfig, load: _Load, patches: int) -> float:
    vision, b = config.vision, float(load.itemsize)
    C, inner = vision.hidden_size, vision.intermediate_size
    pixels = patches * 3 * vision.patch_size**2 * _NUMBERS
    if not load.trained & {"tower"}:
        return pixels + min(patches, PATCHES_PER_CHUNK) * b * (6 * C + 2 * inner)
    layer = b * (8 * C + inner + (2 * C + inner + _dropped(load, 5 * C + inner) / b if load.trained else 0))
    return pixels + patches * layer * vision.num_hidden_layers


# --------------------------------------------------------------------------------------------------------------------
# Arithmetic


def _flops(config: KeyeConfig, model: nn.Module, load: _Load, *, cached: bool, has_pairs: bool) -> float:
    """Forward, backward to the activations, backward to the weights that change, and what is computed again."""
    text, T = config.text, load.tokens
    sizes = {name: tensor.numel() for name, tensor in plain_state(model).items() if tensor.ndim > 1}
    sizes |= {name: weight.numel() for name, weight in quantized_weights(model).items()}
    share = text.num_experts_per_tok / text.num_experts if text.num_experts else 1.0
    rows = {"head": float(load.learnt), "tower": 0.0 if cached else 4.0 * load.visual_tokens,
            "projector": 0.0 if cached else float(load.visual_tokens)}  # fmt: skip
    forward = weights = 0.0
    for name, size in sizes.items():
        part = _part(name)
        if part is None or ".embeddings." in name:
            continue
        cost = 2.0 * size * rows.get(part, T) * (share if part == "experts" else 1.0)
        forward += cost
        weights += cost if part in load.trained and not has_pairs else 0.0
    seen = min(load.topk, T / 2) if load.is_sparse else T / 2
    attention = 4.0 * text.num_attention_heads * text.head_dim * T * seen * text.num_hidden_layers
    if load.is_sparse and text.sparse is not None:
        attention += (
            2.0 * text.sparse.indexer_num_heads * text.sparse.indexer_head_dim * T * T / 2 * text.num_hidden_layers
        )
    again = forward + attention if load.checkpointing else 0.0
    return forward * 2 + weights + attention * 3 + again
