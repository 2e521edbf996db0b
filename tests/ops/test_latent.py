"""Latent attention: both forms are the same function, of any length in bounded scratch; YaRN's frequencies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keye.ops import latent
from keye.ops.latent import Form, LatentQuery, LatentRows, latent_attention
from keye.ops.reference import inverse_frequencies, yarn_frequencies

H, N, R, V, C = 4, 6, 4, 5, 16
FORMS: list[Form] = ["absorbed", "expanded"]


def make_query(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> LatentQuery:
    generator = torch.Generator().manual_seed(seed)
    nope, rope = (torch.randn(tokens, H, dim, generator=generator).to(dtype) for dim in (N, R))
    weight = (torch.randn(H, N + V, C, generator=generator) * C**-0.5).to(dtype)
    return LatentQuery(nope, rope, weight, 1.3 * (N + R) ** -0.5)


def make_rows(length: int, size: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, LatentRows]:
    generator = torch.Generator().manual_seed(length)
    c, k = (size * torch.randn(length, dim, generator=generator).to(dtype) for dim in (C, R))
    return c, k, lambda start, stop: (c[start:stop], k[start:stop])


def naive(query: LatentQuery, c: Tensor, k: Tensor, first: int) -> Tensor:
    """Query by query and head by head, in float64."""
    out = torch.empty(*query.nope.shape[:2], V, dtype=torch.float64)
    for t in range(out.shape[0]):
        past = first + t + 1
        for h in range(H):
            expanded = c[:past].double() @ query.weight[h].double().T
            scores = expanded[:, :N] @ query.nope[t, h].double() + k[:past].double() @ query.rope[t, h].double()
            out[t, h] = (scores * query.scale).softmax(0) @ expanded[:, N:]
    return out


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25)
@given(
    queries=st.integers(1, 30), first=st.integers(0, 50), budget=st.sampled_from([1, 20_000, 96 << 20]),
    block=st.sampled_from([1, 7, 1024]), size=st.sampled_from([0.1, 1.0, 20.0]),
)  # fmt: skip
def test_both_forms_are_the_function_at_any_blocks_and_tiles(
    form: Form, queries: int, first: int, budget: int, block: int, size: float
) -> None:
    query, (c, k, rows) = make_query(queries), make_rows(first + queries, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent, "SCRATCH_BYTES", budget)
        patch.setattr(latent, "EXPANDED_BLOCK", block)
        got = latent_attention(query, rows, first, form)
    torch.testing.assert_close(got.double(), naive(query, c, k, first), rtol=1e-3, atol=1e-3 * size)


@pytest.mark.parametrize("form", FORMS)
def test_forms_keep_the_dtype(form: Form) -> None:
    query, (c, k, rows) = make_query(9, dtype=torch.bfloat16), make_rows(40, dtype=torch.bfloat16)
    got = latent_attention(query, rows, 31, form)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), naive(query, c, k, 31), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("queries", "length"), [(1, 2500), (40, 2500), (300, 2500), (700, 700)])
@pytest.mark.parametrize("form", FORMS)
def test_scratch_does_not_grow_with_the_context(
    form: Form, queries: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read at once, and the largest tensor that is made, keep to the budget."""
    budget, reads, largest = 1 << 20, [], []
    monkeypatch.setattr(latent, "SCRATCH_BYTES", budget)
    monkeypatch.setattr(latent, "EXPANDED_BLOCK", 64)
    _, _, plain = make_rows(length)

    def rows(start: int, stop: int) -> tuple[Tensor, Tensor]:
        reads.append(stop - start)
        return plain(start, stop)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out._base is None:
                largest.append(out.nbytes)
            return out

    query = make_query(queries)
    with Watch():
        latent_attention(query, rows, length - queries, form)
    assert 1 < max(reads) < length
    assert max(largest) <= max(budget // 2, 4 * queries * H * V)


def test_few_queries_take_latents_as_they_are_and_many_expand_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the sizes of 671B the two cost the same at about 170 queries over a long past."""
    weight = torch.empty(128, 256, 512, device="meta")
    chosen: list[str] = []
    monkeypatch.setattr(latent, "_absorbed", lambda *_: chosen.append("absorbed"))
    monkeypatch.setattr(latent, "_expanded", lambda *_: chosen.append("expanded"))
    for tokens, first in ((1, 100_000), (160, 10**7), (180, 10**7), (1024, 0), (200, 0)):
        query = LatentQuery(torch.empty(tokens, 128, 128, device="meta"), torch.empty(tokens, 128, 64), weight, 1.0)
        latent_attention(query, lambda start, stop: (weight, weight), first)
    assert chosen == ["absorbed", "absorbed", "expanded", "expanded", "absorbed"]


def test_yarn_leaves_fast_frequencies_and_divides_slow_ones() -> None:
    plain, got = inverse_frequencies(64, 10000.0), yarn_frequencies(64, 10000.0, 40, 4096, 32, 1)
    turns = 4096 * plain / (2 * math.pi)
    assert torch.equal(got[turns > 40], plain[turns > 40])
    torch.testing.assert_close(got[turns < 0.9], plain[turns < 0.9] / 40)
    assert ((got <= plain * 1.00001) & (got >= plain / 40.001)).all() and (got.diff() < 0).all()
