"""How cached rows are stored in vLLM's memory, and where those of a step's sequences are.

vLLM allocates, shares and frees blocks of 64 tokens, keye's KV blocks, so that every kernel of keye reads them where
they are. Rows of one shape share a cache, their blocks one after another: keys and values, and in a cache of their own
indexer keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MLAAttentionSpec, SparseCacheRole
from vllm.v1.kv_cache_layout import KVCacheLayout

from keye.spi import KV_BLOCK, BlockRows, RowFormat, RowKind, RowSpec

_KINDS: dict[torch.dtype, RowKind] = {
    torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"
}  # fmt: skip


@dataclass(frozen=True)
class Span:
    """Tokens start .. stop of a step are the last of a sequence of `length`, with its blocks in `table` int32 [n]."""

    start: int
    stop: int
    length: int
    table: Tensor


@dataclass
class StepBlocks(AttentionMetadata):
    """One cache in one step: its sequences, and the `slots` int64 [tokens] that the new tokens are written to."""

    spans: list[Span]
    slots: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of the step without padding."""
        return self.slots.shape[0]


class StepBlocksBuilder(AttentionMetadataBuilder[StepBlocks]):
    """Makes `StepBlocks` of what vLLM scheduled."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepBlocks:
        step = common_attn_metadata
        starts = step.query_start_loc_cpu.tolist()
        # Exact without speculative decoding, which `config` refuses; the other waits for the device.
        known = step.seq_lens_cpu_upper_bound
        lengths = (step.seq_lens if known is None else known).tolist()
        tables = step.block_table_tensor
        spans = [
            Span(starts[row], starts[row + 1], lengths[row], tables[row, : -(-lengths[row] // KV_BLOCK)])
            for row in range(step.num_reqs)
            if starts[row + 1] > starts[row]  # the others are padding
        ]
        return StepBlocks(spans, step.slot_mapping[: step.num_actual_tokens].long())


class KeyeBackend(AttentionBackend):
    """What vLLM asks about the caches; the layers compute by themselves (`keye_vllm.attention`)."""

    supported_dtypes: ClassVar[list[torch.dtype]] = list(_KINDS)
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "KEYE_DSA"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("sparse attention is computed by keye_vllm.attention.SparseAttention")

    @staticmethod
    def get_builder_cls() -> type[StepBlocksBuilder]:
        return StepBlocksBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[Any]:
        return [KV_BLOCK]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def is_sparse(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False


class Cache(nn.Module, AttentionLayerBase):
    """Rows of one layer that have one shape, in blocks of vLLM's: a block for each name of `specs`."""

    def __init__(self, specs: Mapping[str, RowSpec], name: str) -> None:
        super().__init__()
        config = get_current_vllm_config()
        self.dtype = kv_cache_dtype_str_to_dtype(config.cache_config.cache_dtype, config.model_config)
        (spec,) = set(specs.values())
        self.format, self.scanned = RowFormat(_KINDS[self.dtype], spec.heads, spec.dim), spec.scanned
        self.planes, self.name = {row: plane for plane, row in enumerate(specs)}, name
        self.kv_cache = torch.tensor([])
        layers = config.compilation_config.static_forward_context
        if name in layers:
            raise ValueError(f"there are two layers of the name {name}")
        layers[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return KeyeBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        form = self.format
        shape: dict[str, Any] = {"block_size": KV_BLOCK, "num_kv_heads": form.heads, "head_size": form.dim,
                                 "dtype": self.dtype}  # fmt: skip
        if self.scanned:
            return MLAAttentionSpec(**shape, cache_role=SparseCacheRole.INDEXER)
        return FullAttentionSpec(**shape, num_head_slots=len(self.planes), state_content_bytes=form.row_bytes)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Takes the memory: [blocks, names, 64, heads * dim]."""
        assert kv_cache.is_contiguous(), "vLLM allocated blocks in another layout than was asked for"
        assert kv_cache.shape[1:] == (len(self.planes), KV_BLOCK, self.format.heads * self.format.dim)
        self.kv_cache = kv_cache

    def forward(self) -> None:
        """A cache computes nothing."""

    def write(self, name: str, slots: Tensor, rows: Tensor) -> None:
        """Stores `rows` [tokens, heads, dim] at `slots` int64 [tokens]."""
        self.kv_cache[slots // KV_BLOCK, self.planes[name], slots % KV_BLOCK] = rows.flatten(1).to(self.dtype)

    def read(self, name: str, table: Tensor, positions: Tensor) -> Tensor:
        """The rows of `positions` int64 [n] of a sequence: [n, heads, dim]."""
        rows = self.kv_cache[table[positions // KV_BLOCK].long(), self.planes[name], positions % KV_BLOCK]
        return rows.unflatten(1, (self.format.heads, self.format.dim))

    def blocks(self, table: Tensor) -> dict[str, BlockRows]:
        """The same for the kernels, by name; `table` int32 [blocks] of a sequence."""
        pool = self.kv_cache.view(torch.uint8).view(-1, KV_BLOCK, self.format.row_bytes)
        rows = {}
        for name, plane in self.planes.items():
            numbers = table * len(self.planes) + plane if len(self.planes) > 1 else table
            addresses = None
            if pool.device.type == "cpu":
                addresses = numbers.long() * self.format.block_bytes + pool.data_ptr()
            rows[name] = BlockRows(self.format, addresses, pool, numbers)
        return rows
