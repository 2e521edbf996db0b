"""One text behind many stored sequences: the same numbers as a request behind each, within the memory that there is."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import keye
from keye import Keye, SamplingParams
from keye.cache.ledger import OutOfMemory
from keye.cache.sequence import KVCache
from keye.engine.continuations import Continuation, StoredSequence, continue_sequences
from keye.engine.step import run_slices
from keye.models.attention import GroupScores

TAIL = list(range(40, 60))


@pytest.fixture(scope="module")
def model(folder: Path) -> Keye:
    return keye.load(folder, dtype="float32")


def stored(model: Keye, lengths: list[int]) -> list[StoredSequence]:
    """Sequences of random tokens, computed one by one."""
    out = []
    for seed, length in enumerate(lengths):
        ids = torch.randint(0, 1000, (length,), generator=torch.Generator().manual_seed(seed))
        prompt = model.runtime.prompts.of_tokens(ids.tolist())
        cache, _ = model.engine.prefill(prompt)
        out.append(StoredSequence(cache, prompt.next_position))
    return out


def compute(model: Keye, sequences: list[StoredSequence], **options: Any) -> list[Continuation]:
    return list(
        continue_sequences(
            model.engine, lambda a, b: sequences[a:b], len(sequences), TAIL, attention="sparse", **options
        )
    )


def test_each_is_what_a_request_behind_it_sees(model: Keye) -> None:
    """Also in several passes: 60 sequences with 20 more tokens each are more than one."""
    lengths = [5, 64, 200, 63, 130, *[30] * 55]
    sequences = stored(model, lengths)
    results = compute(model, sequences, count=True)
    assert [result.number for result in results] == list(range(60))
    for result, item in list(zip(results, sequences, strict=True))[:6]:
        ids = [0] * item.cache.length(0) + TAIL
        cache = item.cache.fork()
        (alone,) = run_alone(model, cache, item.next_position)
        assert torch.allclose(result.logits, alone, atol=1e-4)
        assert result.counts is not None and result.counts.shape == (2, len(ids))
        topk = model.config.text.sparse.topk  # type: ignore[union-attr]
        queries = torch.arange(item.cache.length(0) + 1, len(ids) + 1).clamp(max=topk)
        assert (result.counts.sum(1) == queries.sum()).all() or item.cache.length(0) < topk
    assert [item.cache.length(0) for item in sequences] == lengths
    for item in sequences:
        item.cache.free()


def run_alone(model: Keye, cache: KVCache, position: int) -> torch.Tensor:
    from keye.engine.step import Slice

    positions = torch.arange(position, position + len(TAIL)).expand(3, len(TAIL))
    logits = run_slices(model.model, [Slice(cache, torch.tensor(TAIL), positions)])[0]
    assert logits is not None
    return logits


def test_memory_is_reserved_and_given_back(model: Keye) -> None:
    ledger = model.runtime.ledger
    before = dict(ledger.accounts())
    sequences = stored(model, [100, 100, 100])
    compute(model, sequences)
    for item in sequences:
        item.cache.free()
    assert {k: v for k, v in ledger.accounts().items() if v} == {k: v for k, v in before.items() if v}


def test_short_memory_makes_short_passes(folder: Path) -> None:
    """Room for few sequences at a time: all are computed; without room for one it is an error that loses nothing."""
    model = keye.load(folder, dtype="float32", memory=64 << 20)
    sequences, passes = stored(model, [60] * 12), list[int]()
    core, ledger = model.core, model.runtime.ledger
    plain = core.run_slices

    def count(owner: Any, slices: Any) -> Any:
        passes.append(len(slices))
        return plain(owner, slices)

    core.run_slices = count
    ample = [result.logits for result in compute(model, sequences)]
    assert passes == [12]
    free = ledger.free("kv")
    assert free is not None
    room = core.scheduler.scratch.count_bytes(60, 3) + 2 * model.runtime.store.slab_bytes
    ledger.reserve("scratch", free - room)
    passes.clear()
    short = [result.logits for result in compute(model, sequences)]
    assert len(passes) > 1 and sum(passes) == 12
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ample, short, strict=True))
    ledger.reserve("scratch", ledger.free("kv") or 0)
    with pytest.raises(OutOfMemory):
        compute(model, sequences)
    assert all(item.cache.length(0) == 60 for item in sequences)


def test_requests_go_on_in_between(model: Keye) -> None:
    """A reply that is being generated gets its steps between passes, and neither changes the other."""
    sequences = stored(model, [50] * 40)
    quiet = [result.logits for result in compute(model, sequences)]
    params = SamplingParams(max_tokens=40, temperature=0.0)
    (alone,) = model.engine.generate([[1, 2, 3]], params, ignore_eos=True)
    request, events = model.engine.generate_request([1, 2, 3], params, ignore_eos=True), list[Any]()
    task = model.core.add(request, events.append)
    for _ in range(4):
        model.core.step()
    seen = len(events)
    loud = list(continue_sequences(
        model.engine, lambda a, b: sequences[a:b], 40, TAIL, attention="sparse"
    ))  # fmt: skip
    assert len(events) > seen
    assert all(torch.allclose(a, b.logits, atol=1e-4) for a, b in zip(quiet, loud, strict=True))
    while not task.has_ended:
        model.core.step()
    tokens = [token for event in events for token in getattr(event, "tokens", ())]
    assert tokens == list(alone.completions[0].token_ids)


def test_those_who_read_results_may_ask_in_between(model: Keye) -> None:
    sequences = stored(model, [30, 30])
    results = continue_sequences(model.engine, lambda a, b: sequences[a:b], 2, TAIL, attention="sparse")
    next(results)
    (result,) = model.engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
    assert result.completions[0].token_ids
    assert next(results).number == 1


def test_a_check_ends_it_and_frees_everything(model: Keye) -> None:
    sequences, calls = stored(model, [30] * 120), list[int]()

    def check() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute(model, sequences, check=check)
    assert model.core.is_idle() and threading.active_count() < 50
    blocks = sum(item.cache.blocks for item in sequences)
    for item in sequences:
        item.cache.free()
    assert blocks == 120


def test_scores_of_groups_are_those_of_the_indexer(model: Keye) -> None:
    """The definition, I[t,s] = sum of gate relu(q . k) over the heads, and the same alone as in company."""
    generator = torch.Generator().manual_seed(0)
    q, gate, keys = (torch.randn(shape, generator=generator) for shape in ((5, 2, 16), (5, 2), (40, 16)))
    watch = GroupScores(0, torch.tensor([[3, 7], [7, 8], [20, 40]]))
    watch.take(q, gate, keys)
    exact = torch.einsum("tj,tjs->ts", gate, torch.relu(torch.einsum("tji,si->tjs", q, keys)))
    expected = torch.stack([exact[:, a:b].amax(1) for a, b in ((3, 7), (7, 8), (20, 40))], dim=1)
    assert watch.scores is not None and torch.allclose(watch.scores, expected, atol=1e-4)
    groups = torch.tensor([[2, 9], [9, 30]])
    sequences = [replace(item, groups=groups) for item in stored(model, [50, 8 + 30, 200])]
    together = compute(model, sequences, count=True)
    for item, result in zip(sequences, together, strict=True):
        (alone,) = compute(model, [item], count=True)
        assert result.scores is not None and alone.scores is not None and result.scores.shape == (len(TAIL), 2)
        assert torch.allclose(result.scores, alone.scores, atol=1e-4)
    assert all(result.scores is None for result in compute(model, sequences))
    for item in sequences:
        item.cache.free()
