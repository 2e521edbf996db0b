"""One step of the model over slices of several sequences, and the scratch memory for its activations.

Knows tensors, caches and the ledger, not requests. A smallest share of scratch is reserved as long as anything runs, so
that keys and values never take its place; more is reserved for a single step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Literal

import torch
from torch import Tensor

from keye.cache.ledger import Ledger
from keye.cache.sequence import KVCache
from keye.config import TextConfig
from keye.models.adapters import Adapter
from keye.models.attention import AttentionMode, CachedStep, GroupScores, Selection, Span
from keye.models.keye import KeyeModel
from keye.ops.reference import SCRATCH_BYTES

#: Prompt tokens of a step in which nothing is generated, and the fewest of one in which something is.
ALONE_TOKENS: Final = 1024
LEAST_TOKENS: Final = 32
#: The ledger's account of scratch.
SCRATCH: Final = "scratch"
#: Scratch of the attention kernels for a chunk: the compiled ones take a few MiB at any context.
KERNEL_BYTES: Final = 8 << 20

#: Which logits of a slice are wanted: none, those after its last token, or those after each.
Wanted = Literal["none", "last", "all"]


@dataclass(frozen=True)
class Slice:
    """New tokens of one sequence: `token_ids` int64 [n], `position_ids` int64 [3, n], and the `visual` tokens [m, d]
    that stand at its placeholders. `alone` slices are computed in a pass of their own, and `fixed` ones, which are
    alone as well, by products of one shape whatever their length. `counts`, `scored` and `experts` receive what
    `keye.models.attention.Span` counts, the indexer's scores, and the selected experts int16 [n, routed layers, experts
    per token]. `adapter` changes what is computed of it; None for the model's default."""

    cache: KVCache
    token_ids: Tensor
    position_ids: Tensor
    visual: Tensor | None = None
    wanted: Wanted = "last"
    mode: AttentionMode = "sparse"
    counts: Tensor | None = None
    alone: bool = False
    select: Selection = "indexer"
    experts: list[Tensor] | None = None
    fixed: bool = False
    scored: GroupScores | None = None
    adapter: Adapter | None = None


def scratch_bytes(config: TextConfig, rows: int, wanted: int, itemsize: int) -> int:
    """An upper estimate of what a pass over `rows` tokens takes beyond weights and cache: the activations of one layer,
    twice over for what the allocator keeps, `wanted` rows of logits, and the scratch of attention."""
    d, heads = config.hidden_size, config.num_attention_heads + 2 * config.num_key_value_heads
    kernel = KERNEL_BYTES if rows > 1 else 1 << 20
    if config.latent is not None:  # no keys and values beyond the scratch of attention, which plain torch computes
        heads, kernel = 2 * config.num_attention_heads, SCRATCH_BYTES
    experts = max(1, (config.num_experts_per_tok + config.n_shared_experts) if config.num_experts else 1)
    inner = config.moe_intermediate_size if config.num_experts else config.intermediate_size
    per_row = itemsize * (4 * d + 2 * heads * config.head_dim + experts * (3 * inner + 2 * d)) + 4 * (2 + experts) * d
    return 2 * rows * per_row + 4 * wanted * config.vocab_size + kernel


def least_scratch(config: TextConfig, itemsize: int) -> int:
    """Bytes of the smallest share: enough for a few rows with the logits of each."""
    return scratch_bytes(config, LEAST_TOKENS, LEAST_TOKENS, itemsize)


def prompt_scratch(config: TextConfig, tokens: int, itemsize: int) -> int:
    """Most bytes that the engine reserves for a request with a prompt of so many tokens which runs alone."""
    last = tokens % ALONE_TOKENS or min(tokens, ALONE_TOKENS)
    steps = [scratch_bytes(config, last, 1, itemsize), least_scratch(config, itemsize)]
    if tokens > last:
        steps.append(scratch_bytes(config, ALONE_TOKENS, 0, itemsize))
    return max(steps)


class Scratch:
    """The scratch of one engine: `least` bytes as long as anything runs, and more during a step."""

    def __init__(self, model: KeyeModel, ledger: Ledger) -> None:
        self._config, self._itemsize, self._ledger = model.config.text, model.dtype.itemsize, ledger
        self.least = least_scratch(self._config, self._itemsize)
        self._reserved = 0

    def reserve(self, slices: Sequence[Slice] = ()) -> bool:
        """Reserves what a step over the slices needs; `OutOfMemory` where it is not free."""
        nbytes = self.count_bytes(*_count_rows(slices))
        if nbytes > self._reserved:
            self._ledger.reserve(SCRATCH, nbytes - self._reserved)
            self._reserved = nbytes
        return True

    def release(self, *, least: bool = True) -> None:
        """Releases what was reserved, but with `least` as many bytes."""
        remaining = min(self._reserved, self.least if least else 0)
        self._ledger.release(SCRATCH, self._reserved - remaining)
        self._reserved = remaining

    def limit_tokens(self, tokens: int, replies: int = 0, *, probes: bool = False) -> int:
        """Prompt tokens for which a step beside so many replies has scratch, at most `tokens`; `probes` wants the
        logits of every one. Fewer where memory is short, but some where there are no replies."""
        while tokens and not self._has_room(tokens + replies, (tokens if probes else 1) + replies):
            tokens //= 2
        return tokens

    def count_fitting(self, slices: Sequence[Slice]) -> int:
        """How many of the slices, from the first on, there is scratch for when caches are evicted; 0 where not even for
        the first."""
        while slices and not self._has_room(*_count_rows(slices)):
            if not self._ledger.reclaim(SCRATCH):
                return next(n for n in range(len(slices)) if not self._has_room(*_count_rows(slices[: n + 1])))
        return len(slices)

    def count_bytes(self, rows: int, wanted: int) -> int:
        """Bytes that a step over so many rows needs, at least the smallest share."""
        return max(self.least, scratch_bytes(self._config, rows, wanted, self._itemsize))

    def _has_room(self, rows: int, wanted: int) -> bool:
        return self._ledger.has_room(SCRATCH, self.count_bytes(rows, wanted) - self._reserved)


def _count_rows(slices: Sequence[Slice]) -> tuple[int, int]:
    """Rows of a step over slices, and those whose logits are wanted."""
    rows = [piece.token_ids.shape[0] for piece in slices]
    return sum(rows), sum(n if s.wanted == "all" else s.wanted == "last" for n, s in zip(rows, slices, strict=True))


@torch.inference_mode()
def run_slices(model: KeyeModel, slices: Sequence[Slice]) -> list[Tensor | None]:
    """Computes all slices; returns the wanted logits of each, float32 [1 or n, V] on the model's device."""
    groups: dict[object, list[int]] = {}  # slices of one kind of attention share a pass, but for those to be alone
    for i, piece in enumerate(slices):
        groups.setdefault(("alone", i) if piece.alone else (piece.mode, piece.select), []).append(i)
    out: list[Tensor | None] = [None] * len(slices)
    for group in groups.values():
        for place, logits in zip(group, _run_group(model, [slices[i] for i in group]), strict=True):
            out[place] = logits
    return out


def _run_group(model: KeyeModel, slices: Sequence[Slice]) -> list[Tensor | None]:
    device = model.device
    ids = torch.cat([piece.token_ids for piece in slices]).to(device)
    positions = torch.cat([piece.position_ids for piece in slices], dim=1).to(device)
    adapted, spans, start = model.adapter_rows, list[Span](), 0
    places = _consecutive([piece.token_ids.shape[0] for piece in slices])
    rows_of = [(piece.adapter, rows) for piece, rows in zip(slices, places, strict=True)]
    with adapted.use(rows_of, device):
        x = model.model.embed_tokens(ids)
    for piece in slices:
        spans.append(Span(start, start + piece.token_ids.shape[0], piece.cache, piece.counts, piece.scored))
        part, start = slice(start, spans[-1].stop), spans[-1].stop
        if piece.visual is not None:  # a placeholder elsewhere is a token that a model has drawn, and stands for itself
            with adapted.use_for_all(piece.adapter):
                x[part] = model.embed(ids[part], piece.visual)
    routed: list[Tensor] = []
    is_traced = any(piece.experts is not None for piece in slices)
    step = CachedStep(
        spans, model.config.text, mode=slices[0].mode, select=slices[0].select, fixed=slices[0].fixed,
        on_router=(lambda _layer, _logits, experts: routed.append(experts)) if is_traced else None,
    )  # fmt: skip
    with adapted.use(rows_of, device):
        hidden = model(x, positions, step)
    if routed:
        experts = torch.stack(routed, dim=1).to("cpu", torch.int16)
        for span, piece in zip(spans, slices, strict=True):
            if piece.experts is not None:
                piece.experts.append(experts[span.start : span.stop])
    firsts = [
        {"none": span.stop, "last": span.stop - 1, "all": span.start}[piece.wanted]
        for span, piece in zip(spans, slices, strict=True)
    ]
    rows = [range(first, span.stop) for first, span in zip(firsts, spans, strict=True)]
    chosen = [i for wanted in rows for i in wanted]
    if not chosen:
        return [None] * len(slices)
    if slices[0].fixed and slices[0].wanted == "last":
        hidden, chosen = hidden[-1:], [0]  # the head sees one row, whatever the slice was
    counts = [len(wanted) for wanted in rows]
    with adapted.use([(piece.adapter, row) for piece, row in zip(slices, _consecutive(counts), strict=True)], device):
        logits = model.logits(hidden if len(chosen) == hidden.shape[0] else hidden[chosen])
    parts = logits.split(counts)
    return [part if wanted else None for part, wanted in zip(parts, rows, strict=True)]


def _consecutive(counts: Sequence[int]) -> list[range]:
    """Ranges of so many rows each, one behind another."""
    return [range(end - count, end) for count, end in zip(counts, accumulate(counts), strict=True)]
