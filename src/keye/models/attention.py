"""Grouped-query attention of a decoder layer, its DSA indexer, which scores what keys are worth attending to, and the
steps that decide what it attends to.

A forward pass is ragged: tokens of several sequences are concatenated in one row [T, ...] without padding. The
layer projects and rotates; the *step* knows sequences, caches and masks. `CachedStep` serves inference here,
`keye.train.packed.TreeStep` serves training; both pass through the same layers.

Legend: T tokens of the step, H query heads, G key/value heads, D head dim, J indexer heads, I indexer dim, d model
width. Names and numerics of the indexer follow the official 2.0 code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import bfloat16 as bf16

from keye.config import TextConfig
from keye.models.layers import Layer, Linear, RMSNorm
from keye.ops import reference, registry
from keye.ops.backend import Stretch
from keye.ops.kv_blocks import BlockRows, RowFormat, RowSpec
from keye.ops.latent import Form, LatentQuery, latent_attention
from keye.ops.reference import hadamard_transform, quantize_fp8

#: `sparse`: each query attends to the indexer's top-k. `dense`: to every earlier key, indexer unused - the official
#: fallback outside Hopper GPUs, and another function once the context exceeds k.
AttentionMode = Literal["sparse", "dense"]
#: Who chooses the keys in sparse mode; `random` and `recent` are controls for measuring what the indexer is worth.
Selection = Literal["indexer", "random", "recent"]

#: `exact` keeps the dtype of the activations; `fp8` rounds queries and keys to e4m3 with power-of-two scales after the
#: Hadamard transform; `official` also rounds to bfloat16 at every point where the official code does.
Numerics = Literal["exact", "fp8", "official"]


class Rope(NamedTuple):
    """Rotary angles of a step: cos and sin float32 [T, half the rotated numbers] of the attention and [T, I/2] of the
    indexer (or None)."""

    cos: Tensor
    sin: Tensor
    indexer_cos: Tensor | None
    indexer_sin: Tensor | None


def cache_rows(config: TextConfig) -> dict[str, RowSpec]:
    """What a layer stores of each token: `k` and `v` and, in sparse models, `indexer_k`; or, shared by all heads of
    latent attention, `latent` and `rope_k`."""
    if (latent := config.latent) is not None:
        layers = config.num_hidden_layers
        return {"latent": RowSpec(layers, 1, latent.kv_lora_rank), "rope_k": RowSpec(layers, 1, config.rotary_dim)}
    kv = RowSpec(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    rows = {"k": kv, "v": kv}
    if config.sparse is not None:
        rows["indexer_k"] = RowSpec(config.num_hidden_layers, 1, config.sparse.indexer_head_dim, scanned=True)
    return rows


class IndexerOutput(NamedTuple):
    """`q` [T, J, I], `k` [T, I] (one head shared by all), `gate` float32 [T, J] including the factor I ** -0.5."""

    q: Tensor
    k: Tensor
    gate: Tensor


class Indexer(Layer):
    """Scores I[t,s] = sum_j gate[t,j] relu(q[t,j] . k[s]); this module makes q, k and gate from hidden states."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        assert config.sparse is not None
        self.heads, self.dim = config.sparse.indexer_num_heads, config.sparse.indexer_head_dim
        self.q_proj = Linear(config.hidden_size, self.heads * (self.dim + 1), bias=False)
        self.k_proj = Linear(config.hidden_size, self.dim, bias=False)
        self.q_norm = RMSNorm(self.dim, config.rms_norm_eps)
        self.k_norm = nn.LayerNorm(self.dim, eps=config.rms_norm_eps)
        self.numerics: Numerics = "exact"

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> IndexerOutput:
        """`x` [T, d] after input_layernorm; `cos`, `sin` float32 [T, I/2] of the indexer's own M-RoPE."""
        q, k, w = self.project(x, cos, sin)
        if self.numerics != "exact":
            # Scales are powers of two: multiplying them back in is exact, so the scores are those of the official code.
            q_values, q_scale = quantize_fp8(q)
            k_values, k_scale = quantize_fp8(k)
            q, k = (q_values * q_scale).to(q.dtype), (k_values * k_scale).to(k.dtype)
        return IndexerOutput(q, k, w.float() * self.dim**-0.5)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, J, I] and keys [T, I] after norm, M-RoPE and Hadamard, and raw gates [T, J]."""
        fused = self.q_proj(x)
        q, w = fused.split((self.heads * self.dim, self.heads), dim=-1)
        q = q.unflatten(-1, (self.heads, self.dim))
        # In training too by the code of inference: a last bit of difference would select other keys.
        small = registry.find_elementwise(x.device, x.shape[-1]) if self.training else self.elementwise
        if self.numerics != "official":
            q = small.index_query(q, self.q_norm.weight, self.q_norm.eps, cos, sin)
            norm, k = self.k_norm, self.k_proj(x).unsqueeze(1)
            return q, small.index_key(k, norm.weight, norm.bias, norm.eps, cos, sin).squeeze(1), w
        q = self.q_norm(q)
        k = F.layer_norm(
            self.k_proj(x).float(), (self.dim,), self.k_norm.weight.float(), self.k_norm.bias.float(), self.k_norm.eps
        ).to(x.dtype)
        q, k = _rotate_bf16(q.to(bf16), cos, sin), _rotate_bf16(k.to(bf16).unsqueeze(1), cos, sin)
        return hadamard_transform(q), hadamard_transform(k).squeeze(1), w


def _rotate_bf16(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding with every product and sum rounded to bfloat16. `x` bfloat16 [T, heads, I]."""
    cos, sin = cos.to(bf16).unsqueeze(1), sin.to(bf16).unsqueeze(1)
    a, b = x.chunk(2, dim=-1)
    return F.pad(a * cos - b * sin, (0, b.shape[-1])) + F.pad(b * cos + a * sin, (a.shape[-1], 0))


class SequenceCache(Protocol):
    """What a layer needs of the stored past of one sequence. Block-wise, quantised or on-disk stores implement it."""

    def length(self, layer: int) -> int:
        """Tokens stored for `layer`."""

    @property
    def formats(self) -> Mapping[str, RowFormat] | None:
        """How rows are stored, by name; None where that follows from what is appended first."""

    def append(self, layer: int, rows: Mapping[str, Tensor]) -> None:
        """Adds n tokens: rows [n, heads, dim] by name."""

    def append_encoded(self, layer: int, rows: Mapping[str, Tensor]) -> None:
        """The same for rows that are encoded already, uint8 [n, row_bytes]."""

    def read(self, layer: int, name: str, positions: Tensor) -> Tensor:
        """The rows of a name at `positions` (int64 [N]): [N, heads, dim]."""

    def read_range(self, layer: int, name: str, start: int, stop: int) -> Tensor:
        """The rows of a name at positions start .. stop: [stop - start, heads, dim]."""

    def layer_blocks(self, layer: int) -> Mapping[str, BlockRows] | None:
        """The same by address, for the fast kernels; None where rows are not in KV blocks."""

    @property
    def check(self) -> ReadCheck | None:
        """What compares stored rows that are read with their checksums, where there are any."""


class ReadCheck(Protocol):
    """Is called after rows were read."""

    def is_complete(self, layer: int) -> bool:
        """Whether all rows of a layer have been compared."""

    def compare_reads(self, layer: int, names: Sequence[str], counts: Tensor | None = None) -> None:
        """Compares the rows at positions whose `counts` (int64 [positions]) are not 0, or all."""


class Step(Protocol):
    """One forward pass: what each token may attend to, and who watches."""

    sparse: bool

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, index: IndexerOutput | None) -> Tensor:
        """Rotated `q` [T, H, D], `k`, `v` [T, G, D] -> attention output [T, H, D]."""

    def attend_latent(self, layer: int, query: LatentQuery, latent: Tensor, rope_k: Tensor) -> Tensor:
        """Queries, `latent` [T, C] and rotated `rope_k` [T, R] -> attention output [T, H, V]."""

    def observe_layer(self, layer: int, hidden: Tensor) -> None:
        """Sees the residual stream [T, d] after each layer."""

    def observe_router(self, layer: int, logits: Tensor, chosen: Tensor) -> None:
        """Sees router logits [T, E] and chosen experts [T, K] of each routed layer."""


class Attention(Layer):
    """Projections, per-head norms, rotary embedding, attention by the step, output projection."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        d, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.layer, self.head_dim, self.eps = layer, D, config.rms_norm_eps
        self.q_proj = Linear(d, config.num_attention_heads * D, bias=bias)
        self.k_proj = Linear(d, config.num_key_value_heads * D, bias=bias)
        self.v_proj = Linear(d, config.num_key_value_heads * D, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * D, d, bias=bias)
        self.q_norm = RMSNorm(D, config.rms_norm_eps)
        self.k_norm = RMSNorm(D, config.rms_norm_eps)
        if config.sparse is not None:
            self.sa_indexer = Indexer(config)

    def forward(self, x: Tensor, rope: Rope, step: Step) -> Tensor:
        """[T, d] -> [T, d]."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = self.elementwise.norm_rotate(q, self.q_norm.weight, self.eps, rope.cos, rope.sin)
        k = self.elementwise.norm_rotate(k, self.k_norm.weight, self.eps, rope.cos, rope.sin)
        index = None
        if step.sparse:
            # The indexer never trains the trunk: its input is detached (2.0 report, sparse adaptation).
            index = self.sa_indexer(x.detach(), rope.indexer_cos, rope.indexer_sin)
        return self.o_proj(step.attend(self.layer, q, k, v, index).flatten(1))


#: Scores of single heads that are held at once: 16 MiB of them.
_GROUP_SCORES: Final = 1 << 22


@dataclass(eq=False)
class GroupScores:
    """What an indexer thinks of groups of stored keys, such as the frames of a video: for each token n of a span and
    each group the greatest score I[t,s] of its keys in `layer`. `groups` int64 [F, 2] are the first and one past the
    last position of each; `scores` float32 [n, F] when the layer was computed."""

    layer: int
    groups: Tensor
    scores: Tensor | None = None

    def take(self, q: Tensor, gate: Tensor, keys: Tensor) -> None:
        """Scores of queries [n, J, I] with gates [n, J] for keys [N, I], as many heads at once as memory is granted."""
        n, N = q.shape[0], keys.shape[0]
        total, keys, heads = torch.zeros(n, N, device=q.device), keys.float(), max(1, _GROUP_SCORES // (n * N))
        for some, gates in zip(q.float().split(heads, dim=1), gate.float().split(heads, dim=1), strict=True):
            total += torch.einsum("njs,nj->ns", F.relu_(some @ keys.T), gates)
        starts, sizes = self.groups[:, 0], (self.groups[:, 1] - self.groups[:, 0])
        if len(sizes.unique()) == 1:
            places = starts.unsqueeze(1) + torch.arange(int(sizes[0]))
            self.scores = total[:, places.to(total.device)].amax(2).cpu()
        else:
            parts = [total[:, start:stop].amax(1) for start, stop in self.groups.tolist()]
            self.scores = torch.stack(parts, dim=1).cpu()


@dataclass(frozen=True)
class Span:
    """Tokens start .. stop of the step belong to the sequence whose past is in `cache`. `counts` int64, if given, tells
    how often the key of each position was selected: [positions] over all layers, or [layers, positions]. `scored`, if
    given, receives the indexer's scores."""

    start: int
    stop: int
    cache: SequenceCache
    counts: Tensor | None = None
    scored: GroupScores | None = None


class CachedStep:
    """Inference: every span attends causally to its own cache, which grows by the span. `fixed` asks for results that
    do not depend on what else is in the step."""

    def __init__(
        self, spans: Sequence[Span], config: TextConfig, *, mode: AttentionMode = "sparse",
        select: Selection = "indexer", fixed: bool = False, on_layer: Callable[[int, Tensor], None] | None = None,
        on_router: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> None:  # fmt: skip
        self.spans = spans
        self.sparse = mode == "sparse" and config.sparse is not None
        self.topk = config.sparse.topk if config.sparse is not None else 0
        self.select, self.fixed = select, fixed
        # One form whatever the length of a span, where results must not depend on it.
        self.latent_form: Form = "absorbed" if fixed else "auto"
        self._on_layer, self._on_router = on_layer, on_router

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, index: IndexerOutput | None) -> Tensor:
        self._append(layer, {"k": k, "v": v} if index is None else {"k": k, "v": v, "indexer_k": index.k.unsqueeze(1)})
        stretches = [self._stretch(span, layer, counted=index is not None) for span in self.spans]
        # Up to k tokens the top-k is everything: dense attention is then the same function.
        dense = [stretch for stretch in stretches if index is None or stretch.length <= self.topk]
        sparse = [stretch for stretch in stretches if index is not None and stretch.length > self.topk]
        out = torch.empty_like(q)
        if dense:
            registry.dense_attention(q, dense, out)
        if sparse and self.select == "indexer":
            assert index is not None
            registry.sparse_attention(q, index.q, index.gate, sparse, self.topk, out)
        else:
            for stretch in sparse:
                registry.attend_selected(q, self._select_without_indexer(layer, stretch, q.device), stretch, out)
        for span, stretch in zip(self.spans, stretches, strict=True):
            if span.scored is not None and index is not None and span.scored.layer == layer:
                self._score(span, index, stretch)
            check = span.cache.check
            if check is not None and not check.is_complete(layer):
                selected = index is not None and stretch.length > self.topk
                if selected and self.select == "indexer":
                    check.compare_reads(layer, ("indexer_k",))
                check.compare_reads(layer, ("k", "v"), stretch.counts if selected else None)
        return out

    def attend_latent(self, layer: int, query: LatentQuery, latent: Tensor, rope_k: Tensor) -> Tensor:
        self._append(layer, {"latent": latent.unsqueeze(1), "rope_k": rope_k.unsqueeze(1)})
        outs = []
        for span in self.spans:
            cache = span.cache

            def rows(start: int, stop: int, cache: SequenceCache = cache) -> tuple[Tensor, Tensor]:
                latent, rope_k = (cache.read_range(layer, name, start, stop) for name in ("latent", "rope_k"))
                return latent.squeeze(1), rope_k.squeeze(1)

            first = cache.length(layer) - (span.stop - span.start)
            outs.append(latent_attention(query.part(span.start, span.stop), rows, first, self.latent_form))
            if cache.check is not None and not cache.check.is_complete(layer):
                cache.check.compare_reads(layer, ("latent", "rope_k"))
        return torch.cat(outs)

    def _score(self, span: Span, index: IndexerOutput, stretch: Stretch) -> None:
        """The indexer's scores of groups of keys that were stored before the span."""
        assert span.scored is not None and stretch.key_tiles is not None
        part, check = slice(span.start, span.stop), span.cache.check
        span.scored.take(index.q[part], index.gate[part], stretch.key_tiles(0, stretch.first))
        if check is not None:
            check.compare_reads(span.scored.layer, ("indexer_k",))

    def _append(self, layer: int, rows: Mapping[str, Tensor]) -> None:
        """Adds the rows [T, heads, dim] of a step to the caches; encoded at once where all store them alike, since many
        short spans would take most of their time there."""
        formats = self.spans[0].cache.formats
        if formats is None or len(self.spans) == 1 or any(span.cache.formats != formats for span in self.spans):
            for span in self.spans:
                span.cache.append(layer, {name: part[span.start : span.stop] for name, part in rows.items()})
            return
        encoded = {name: registry.encode_rows(form, rows[name]) for name, form in formats.items() if name in rows}
        for span in self.spans:
            span.cache.append_encoded(layer, {name: part[span.start : span.stop] for name, part in encoded.items()})

    def _select_without_indexer(
        self, layer: int, stretch: Stretch, device: torch.device
    ) -> Iterable[tuple[int, Tensor]]:
        total = stretch.stop - stretch.start
        if self.select == "recent":
            return reference.select_recent(total, stretch.first, self.topk, device)
        # Seeded by place and layer: the same in any batch.
        generator = torch.Generator(device).manual_seed((stretch.first << 8) + layer)
        return reference.select_random(total, stretch.first, self.topk, generator)

    def _stretch(self, span: Span, layer: int, *, counted: bool) -> Stretch:
        """The span as the kernels see it; its own keys have been stored. What it reads is `counted` for a cache that
        wants to know."""
        cache, counts = span.cache, span.counts
        if counts is not None and counts.ndim == 2:
            counts = counts[layer]
        elif counts is None and counted and cache.check is not None and not cache.check.is_complete(layer):
            counts = torch.zeros(cache.length(layer), dtype=torch.int64)
        return Stretch(
            span.start, span.stop, cache.length(layer) - (span.stop - span.start),
            rows=lambda positions: (cache.read(layer, "k", positions), cache.read(layer, "v", positions)),
            key_tiles=lambda start, stop: cache.read_range(layer, "indexer_k", start, stop).squeeze(1),
            blocks=cache.layer_blocks(layer), counts=counts, fixed=self.fixed,
        )  # fmt: skip

    def observe_layer(self, layer: int, hidden: Tensor) -> None:
        if self._on_layer is not None:
            self._on_layer(layer, hidden)

    def observe_router(self, layer: int, logits: Tensor, chosen: Tensor) -> None:
        if self._on_router is not None:
            self._on_router(layer, logits, chosen)
