"""The whole network through cached steps: chunked prompts, ragged batches, controls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from keye.cache.sequence import KVCache
from keye.errors import KeyeError
from keye.models.attention import CachedStep, Span

MODES = ["sparse", "dense"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_any_chunking_gives_the_same_logits(
    seed: int, mode: str, make_model: Any, make_prompt: Any, make_chunks: Any, run_chunks: Any
) -> None:
    model, prompt = make_model(seed), make_prompt(seed, 75)
    total = run_chunks(model, prompt, [75], mode)
    for chunks in ([1] * 75, [8, 1, 66], make_chunks(seed, 75), make_chunks(seed + 100, 75)):
        torch.testing.assert_close(run_chunks(model, prompt, chunks, mode), total, rtol=0, atol=1e-4)


def test_sparse_is_dense_up_to_k_keys_and_not_beyond(make_model: Any, make_prompt: Any, run_chunks: Any) -> None:
    model, prompt = make_model(), make_prompt(0, 40)
    sparse, dense = (run_chunks(model, prompt, [40], mode) for mode in MODES)
    k = model.config.text.sparse.topk
    torch.testing.assert_close(sparse[:k], dense[:k], rtol=0, atol=1e-5)
    assert (sparse[k:] - dense[k:]).abs().max() > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_ragged_batch_equals_one_by_one(mode: Any, make_model: Any, make_prompt: Any, run_chunks: Any) -> None:
    """Sequences of different lengths and pasts share steps without padding; a step may hold prefill and decode."""
    model = make_model()
    prompts = [make_prompt(seed, length) for seed, length in enumerate((30, 9, 51))]
    plan = [[20, 9, 1], [10, 0, 1], [0, 0, 49]]
    caches = [KVCache(2) for _ in prompts]
    logits: list[list[torch.Tensor]] = [[], [], []]
    done = [0, 0, 0]
    with torch.no_grad():
        for lengths in plan:
            spans, ids, positions, start = [], [], [], 0
            for i, n in enumerate(lengths):
                if n:
                    spans.append(Span(start, start + n, caches[i]))
                    ids.append(prompts[i].ids[done[i] : done[i] + n])
                    positions.append(prompts[i].positions[:, done[i] : done[i] + n])
                    start, done[i] = start + n, done[i] + n
            step = CachedStep(spans, model.config.text, mode=mode)
            out = model.logits(model(model.embed(torch.cat(ids)), torch.cat(positions, dim=1), step))
            for span in spans:
                logits[caches.index(span.cache)].append(out[span.start : span.stop])
    for prompt, parts in zip(prompts, logits, strict=True):
        alone = run_chunks(model, prompt, [len(prompt)], mode)
        torch.testing.assert_close(torch.cat(parts), alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("select", ["recent", "random"])
def test_controls_replace_the_indexer(select: Any, make_model: Any, make_prompt: Any, run_chunks: Any) -> None:
    model, prompt = make_model(), make_prompt(0, 40)

    def run() -> torch.Tensor:
        step = CachedStep([Span(0, 40, KVCache(2))], model.config.text, select=select)
        with torch.no_grad():
            return model.logits(model(model.embed(prompt.ids), prompt.positions, step))

    assert torch.equal(run(), run())
    assert (run() - run_chunks(model, prompt, [40])).abs().max() > 1e-2


def test_observers_see_every_layer(make_model: Any, make_prompt: Any) -> None:
    model, prompt = make_model(mlp_only_layers=[1]), make_prompt(0, 12)
    layers: dict[int, torch.Tensor] = {}
    routed: dict[int, torch.Tensor] = {}
    step = CachedStep(
        [Span(0, 12, KVCache(2))], model.config.text,
        on_layer=layers.__setitem__, on_router=lambda i, logits, chosen: routed.__setitem__(i, chosen),
    )  # fmt: skip
    with torch.no_grad():
        hidden = model(model.embed(prompt.ids), prompt.positions, step)
        torch.testing.assert_close(model.model.norm(layers[1]), hidden)
    assert list(layers) == [0, 1]
    assert list(routed) == [0], "layer 1 has a dense MLP"
    assert routed[0].shape == (12, 2)


def test_visual_tokens_replace_their_placeholders(make_model: Any) -> None:
    model = make_model()
    ids = torch.tensor([1, 90, 90, 5, 91, 2])
    visual = torch.randn(3, 48)
    with torch.no_grad():
        x = model.embed(ids, visual)
    assert torch.equal(x[[1, 2, 4]], visual)
    assert torch.equal(x[[0, 3, 5]], model.model.embed_tokens.weight[[1, 5, 2]])
    with pytest.raises(KeyeError, match="3 visual placeholders but the media have 2"):
        model.embed(ids, visual[:2])
    with pytest.raises(KeyeError, match="3 visual placeholders but the media have 0"):
        model.embed(ids)
