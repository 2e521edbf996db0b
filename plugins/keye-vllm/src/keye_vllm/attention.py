"""Sparse attention of one layer over vLLM's blocks, by the same functions as everywhere in keye.

keye chooses what computes it: Triton kernels on GPUs of compute capability 8.0 and newer, the compiled
core or plain torch elsewhere. A sequence of more than k tokens is never attended densely.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from keye.spi import IndexerOutput, Stretch, TextConfig, cache_rows, dense_attention, sparse_attention
from keye_vllm.cache import Cache, Span, StepBlocks
from keye_vllm.config import ATTENTION_OP


class SparseAttention(nn.Module):
    """The caches of a layer, and attention of each query over the k keys that the indexer scores highest."""

    def __init__(self, config: TextConfig, kv_heads: int, prefix: str) -> None:
        super().__init__()
        assert config.sparse is not None
        self.topk, self.name = config.sparse.topk, f"{prefix}.sparse_attn"
        specs = cache_rows(config)
        kv = {name: replace(spec, heads=kv_heads) for name, spec in specs.items() if not spec.scanned}
        self.kv = Cache(kv, f"{prefix}.attn")
        self.indexer = Cache({name: specs[name] for name in specs.keys() - kv}, f"{prefix}.sa_indexer.cache")
        get_current_vllm_config().compilation_config.static_forward_context[self.name] = self

    def forward(self, q: Tensor, k: Tensor, v: Tensor, index: IndexerOutput) -> Tensor:
        """Rotated `q` [T, H, D], `k`, `v` [T, G, D] -> [T, H, D]."""
        out = torch.empty_like(q)
        torch.ops.vllm.keye_dsa(q, k, v, index.q, index.k, index.gate, out, self.name)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, index: IndexerOutput, out: Tensor) -> None:
        """Stores the step's rows and writes attention of its tokens to `out`."""
        steps = get_forward_context().attn_metadata
        if not isinstance(steps, dict):  # memory is measured before there are caches
            out.zero_()
            return
        step, indexer_step = steps[self.kv.name], steps[self.indexer.name]
        assert isinstance(step, StepBlocks) and isinstance(indexer_step, StepBlocks)
        n = step.tokens
        self.kv.write("k", step.slots, k[:n])
        self.kv.write("v", step.slots, v[:n])
        self.indexer.write("indexer_k", indexer_step.slots, index.k[:n].unsqueeze(1))
        stretches = [self._stretch(*pair) for pair in zip(step.spans, indexer_step.spans, strict=True)]
        # Up to k tokens the top-k is everything: dense attention is then the same function.
        short = [stretch for stretch in stretches if stretch.length <= self.topk]
        long = [stretch for stretch in stretches if stretch.length > self.topk]
        if short:
            dense_attention(q, short, out)
        if long:
            sparse_attention(q, index.q, index.gate, long, self.topk, out)
        out[n:].zero_()

    def _stretch(self, span: Span, indexer_span: Span) -> Stretch:
        kv, indexer, table, indexer_table = self.kv, self.indexer, span.table, indexer_span.table

        def key_tiles(start: int, stop: int) -> Tensor:
            positions = torch.arange(start, stop, device=indexer_table.device)
            return indexer.read("indexer_k", indexer_table, positions).squeeze(1)

        return Stretch(
            span.start,
            span.stop,
            span.length - (span.stop - span.start),
            rows=lambda positions: (kv.read("k", table, positions), kv.read("v", table, positions)),
            key_tiles=key_tiles,
            blocks={**kv.blocks(table), **indexer.blocks(indexer_table)},
        )


def _attend(
    q: Tensor, k: Tensor, v: Tensor, indexer_q: Tensor, indexer_k: Tensor, gate: Tensor, out: Tensor, name: str
) -> None:
    get_forward_context().no_compile_layers[name].attend(q, k, v, IndexerOutput(indexer_q, indexer_k, gate), out)


def _attend_fake(
    q: Tensor, k: Tensor, v: Tensor, indexer_q: Tensor, indexer_k: Tensor, gate: Tensor, out: Tensor, name: str
) -> None:
    """Shapes only."""


# One operation for torch.compile, which does not look into it.
direct_register_custom_op(ATTENTION_OP, _attend, mutates_args=["out"], fake_impl=_attend_fake)
