"""Every kernel reads vLLM's blocks where they are. Run by `test_cache.py`, in a process with Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from keye.config import SparseConfig, TextConfig
from keye.models.attention import IndexerOutput
from keye.ops.registry import BackendName, backends
from keye_vllm import attention, cache
from keye_vllm.attention import SparseAttention
from keye_vllm.cache import Span, StepBlocks

H, G, D, J, I, TOPK, POOL = 4, 2, 32, 2, 16, 16, 12
TEXT = TextConfig(
    vocab_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=H,
    num_key_value_heads=G, head_dim=D, rope_theta=1e4, mrope_section=(4, 6, 6), max_position_embeddings=512,
    sparse=SparseConfig(J, I, TOPK),
)  # fmt: skip
#: Sequences of a step: tokens before it, tokens in it. One reads its prompt, one writes, one is not yet longer than k.
SEQUENCES = ((70, 100), (140, 1), (0, 12))


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> SparseAttention:
    """A layer with its caches bound, between steps of an engine that is not there."""
    config = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype="auto"), model_config=SimpleNamespace(dtype=torch.float32),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )  # fmt: skip
    for module in (attention, cache):
        monkeypatch.setattr(module, "get_current_vllm_config", lambda: config)
    layer = SparseAttention(TEXT, G, "layers.0.self_attn")
    layer.kv.bind_kv_cache(torch.full((POOL, 2, 64, G * D), float("nan")))
    layer.indexer.bind_kv_cache(torch.full((POOL, 1, 64, I), float("nan")))
    return layer


def random_rows(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor, IndexerOutput]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((H, D), (G, D), (G, D), (J, I), (I,), (J,))
    q, k, v, indexer_q, indexer_k, gate = (torch.randn(tokens, *shape, generator=generator) for shape in shapes)
    return q, k, v, IndexerOutput(indexer_q, indexer_k, gate)


def step_of(tables: list[Tensor], counts: list[tuple[int, int]]) -> StepBlocks:
    """`counts` of each sequence: tokens before the step and in it."""
    spans, slots, start = [], [], 0
    for table, (before, new) in zip(tables, counts, strict=True):
        positions = torch.arange(before, before + new)
        slots.append(table[positions // 64].long() * 64 + positions % 64)
        spans.append(Span(start, start + new, before + new, table))
        start += new
    return StepBlocks(spans, torch.cat(slots))


def run_steps(layer: SparseAttention, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What came before, then the step itself, in shuffled blocks that differ between the two caches."""
    shuffled = torch.randperm(POOL, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    tables, others = list(shuffled.split(3))[:3], list(shuffled.flip(0).split(3))[:3]
    out = torch.empty(0)
    for seed, counts in enumerate(([(0, before) for before, _ in SEQUENCES], list(SEQUENCES))):
        steps = {layer.kv.name: step_of(tables, counts), layer.indexer.name: step_of(others, counts)}
        context = SimpleNamespace(attn_metadata=steps, no_compile_layers={layer.name: layer})
        monkeypatch.setattr(attention, "get_forward_context", lambda context=context: context)
        tokens = sum(new for _, new in counts)
        q, k, v, index = random_rows(tokens + 3, seed)  # vLLM pads steps
        out = layer(q, k, v, index)
        assert not out[tokens:].any()
        out = out[:tokens]
    return out


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_kernels_read_the_blocks(backend: BackendName, layer: SparseAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    with backends.using("reference"):
        expected = run_steps(layer, monkeypatch)
    results: list[bool] = []
    kernels = backends.find(backend)
    if kernels is None:
        pytest.skip(f"{backend} kernels cannot run here")
    takes = kernels.takes
    monkeypatch.setattr(kernels, "takes", lambda q, stretch: results.append(takes(q, stretch)) or results[-1])
    with backends.using(backend):
        torch.testing.assert_close(run_steps(layer, monkeypatch), expected)
    assert results and all(results)


def test_sets_are_not_everything(layer: SparseAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    with backends.using("reference"):
        sparse = run_steps(layer, monkeypatch)
        layer.topk = 1000
        dense = run_steps(layer, monkeypatch)
    short = sum(new for _, new in SEQUENCES[:2])
    assert (sparse[:short] - dense[:short]).abs().mean() > 0.1
    torch.testing.assert_close(sparse[short:], dense[short:])
