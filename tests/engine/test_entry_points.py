"""The lowest entry points: token ids and media in; tokens, log-probabilities and routing out; weights replaced."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import keye
from keye import Frames, Keye, KeyeError
from keye.cache.sequence import KVCache
from keye.engine.async_engine import AsyncEngine
from keye.engine.engine import Completion, Engine, ResultBuilder, TokenPrompt
from keye.engine.request import Generating
from keye.engine.runtime import Runtime
from keye.engine.sampling import SamplingParams, filtered_probabilities
from keye.models.attention import CachedStep, Span
from keye.models.keye import KeyeModel
from tests.support.tiny import tiny_folder, tiny_model

TEXTS = ([3, 5, 7, 11, 13], list(range(20, 50)), [100, 101, 102, 103] * 30)
GREEDY = SamplingParams(max_tokens=6)


@pytest.fixture
def runtime() -> Runtime:
    return tiny_model()


@pytest.fixture
def engine(runtime: Runtime) -> Engine:
    return Engine(runtime)


@torch.inference_mode()
def plain_logits(model: KeyeModel, ids: Sequence[int], experts: list[Tensor] | None = None) -> Tensor:
    """Logits after each token, float32 [T, V], in one pass over all."""
    cache = KVCache(model.config.text.num_hidden_layers)
    on_router = None if experts is None else lambda _layer, _logits, chosen: experts.append(chosen)
    step = CachedStep([Span(0, len(ids), cache)], model.config.text, on_router=on_router)
    positions = torch.arange(len(ids)).expand(3, -1)
    return model.logits(model(model.embed(torch.tensor(ids)), positions, step))


def all_ids(prompt: Sequence[int], completion: Completion) -> list[int]:
    return [*prompt, *completion.token_ids]


def test_greedy_tokens_and_raw_probabilities_are_those_of_a_plain_pass(runtime: Runtime, engine: Engine) -> None:
    for prompt, result in zip(TEXTS, engine.generate(TEXTS, GREEDY, ignore_eos=True), strict=True):
        (completion,) = result.completions
        assert result.prompt_token_ids == tuple(prompt) and len(completion.token_ids) == 6
        assert completion.finish_reason == "length" and result.weights_version == 0
        logits = plain_logits(runtime.model, all_ids(prompt, completion))[len(prompt) - 1 : -1]
        assert tuple(logits.argmax(-1).tolist()) == completion.token_ids
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)
        assert torch.allclose(completion.raw_logprobs, expected, atol=1e-4)
        assert completion.logprobs.tolist() == [0.0] * 6, "a greedy token has probability 1"


def test_the_end_token_is_among_the_tokens(engine: Engine) -> None:
    (free,) = engine.generate([TEXTS[1]], GREEDY, ignore_eos=True)
    tokens = free.completions[0].token_ids
    stopping = SamplingParams(max_tokens=6, stop_token_ids=(tokens[2],))
    (stopped,) = engine.generate([TEXTS[1]], stopping, ignore_eos=True)
    (completion,) = stopped.completions
    end = tokens.index(tokens[2]) + 1
    assert completion.token_ids == tokens[:end] and completion.finish_reason == "stop"
    assert torch.equal(completion.raw_logprobs, free.completions[0].raw_logprobs[:end])


def test_sampled_probabilities_are_those_of_the_filtered_distribution(runtime: Runtime, engine: Engine) -> None:
    params = SamplingParams(max_tokens=5, temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.3, seed=3)
    (result,) = engine.generate([TEXTS[1]], params, n=3, ignore_eos=True)
    assert len({completion.token_ids for completion in result.completions}) == 3
    for completion in result.completions:
        logits = plain_logits(runtime.model, all_ids(TEXTS[1], completion))[len(TEXTS[1]) - 1 : -1]
        for i, token in enumerate(completion.token_ids):
            row = logits[i].clone()
            for seen in set(completion.token_ids[:i]):
                row[seen] = row[seen] / 1.3 if row[seen] > 0 else row[seen] * 1.3
            expected = float(filtered_probabilities(row, params)[token].log())
            assert float(completion.logprobs[i]) == pytest.approx(expected, abs=1e-3)
            assert float(completion.raw_logprobs[i]) == pytest.approx(float(logits[i].log_softmax(-1)[token]), abs=1e-3)


def test_together_is_as_alone(engine: Engine) -> None:
    together = engine.generate(TEXTS, [GREEDY, SamplingParams(max_tokens=3, temperature=1.0, seed=1), GREEDY])
    for prompt, params, result in zip(TEXTS, (GREEDY, None, GREEDY), together, strict=True):
        if params is not None:
            assert engine.generate([prompt], params)[0].completions[0].token_ids == result.completions[0].token_ids


def test_media_are_given_as_patches(runtime: Runtime, engine: Engine) -> None:
    frames = Frames(np.random.default_rng(0).integers(0, 256, (6, 56, 56, 3), dtype=np.uint8), tuple(range(6)))
    model = Keye(runtime)
    laid_out = runtime.prompts.lay_out(model.render([{"role": "user", "content": [
        {"type": "video", "video": frames}, {"type": "text", "text": "what?"}]}]))  # fmt: skip
    prompt = TokenPrompt(laid_out.token_ids.tolist(), laid_out.media)
    (by_ids,) = engine.generate([prompt], GREEDY)
    (as_laid_out,) = engine.generate([laid_out], GREEDY)
    assert by_ids.completions[0].token_ids == as_laid_out.completions[0].token_ids
    (scores,) = engine.score([prompt])
    assert scores.logprobs.shape == (len(prompt.token_ids) - 1,)
    with pytest.raises(KeyeError, match="the prompt's placeholders are not those of its media"):
        engine.generate([TokenPrompt(TEXTS[0], laid_out.media)], GREEDY)


def test_scores_are_those_of_a_plain_pass(runtime: Runtime, engine: Engine) -> None:
    long = [int(token) for token in np.random.default_rng(1).integers(20, 300, 700)]
    for ids, result in zip((*TEXTS, long), engine.score((*TEXTS, long), top_logprobs=4), strict=True):
        logs = plain_logits(runtime.model, ids).log_softmax(-1)[:-1]
        assert torch.allclose(result.logprobs, logs.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1), atol=1e-3)
        assert torch.allclose(result.top_logprobs, logs.topk(4).values, atol=1e-3)
        assert result.top_ids.shape == result.top_logprobs.shape == (len(ids) - 1, 4)
        assert result.token_ids == tuple(ids) and result.experts is None
    assert runtime.ledger.used("scratch") == 0


def test_a_long_sequence_is_scored_in_less_memory_than_its_logits_take(runtime: Runtime, engine: Engine) -> None:
    length = 8192
    ids = [int(token) for token in np.random.default_rng(2).integers(20, 300, length)]
    runtime.ledger.budget = 20 << 20
    assert 4 * length * runtime.config.text.vocab_size > 2 * runtime.ledger.budget
    assert engine.score([ids])[0].logprobs.shape == (length - 1,)
    assert runtime.ledger.peak <= runtime.ledger.budget


def test_experts_are_those_of_the_pass(runtime: Runtime, engine: Engine) -> None:
    engine.generate([TEXTS[2]], GREEDY)  # the prefix cache holds its beginning, whose experts are not known
    (result,) = engine.generate([TEXTS[2]], GREEDY, experts=True, ignore_eos=True)
    (completion,) = result.completions
    expected: list[Tensor] = []
    plain_logits(runtime.model, all_ids(TEXTS[2], completion)[:-1], expected)
    stacked = torch.stack(expected, dim=1).to(torch.int16)
    n = len(TEXTS[2])
    assert result.prompt_experts is not None and completion.experts is not None
    assert torch.equal(result.prompt_experts, stacked[:n]) and torch.equal(completion.experts, stacked[n - 1 :])
    (scores,) = engine.score([TEXTS[2]], experts=True)
    assert scores.experts is not None and torch.equal(scores.experts, stacked[:n])


def test_indexer_sets_are_the_positions_that_a_step_read(runtime: Runtime, engine: Engine) -> None:
    sparse = runtime.config.text.sparse
    assert sparse is not None and sparse.topk == 16
    (result,) = engine.generate([TEXTS[0]], SamplingParams(max_tokens=20), indexer_sets=True, ignore_eos=True)
    sets = result.completions[0].indexer_sets
    assert sets is not None and sets.shape == (20, 2, 16) and sets.dtype == torch.int32
    for i, layers in enumerate(sets):
        context = len(TEXTS[0]) + i
        for row in layers:
            chosen = row[row >= 0].tolist()
            assert len(chosen) == min(16, context) and chosen == sorted(set(chosen)) and chosen[-1] < context
    (dense,) = engine.generate([TEXTS[0]], GREEDY, indexer_sets=True, attention="dense")
    assert dense.completions[0].indexer_sets is None


def test_a_stored_sequence_is_continued(runtime: Runtime, engine: Engine) -> None:
    """By several prompts, behind which nothing is left."""
    trunk = runtime.prompts.of_tokens(TEXTS[2])
    sequence, finished = engine.prefill(trunk)
    assert sequence.length(0) == len(TEXTS[2]) == finished.prompt_tokens
    tails = ([7, 8], [9], [10, 11, 12])
    prompts = [replace(runtime.prompts.of_tokens([*TEXTS[2], *tail]), past=sequence) for tail in tails]
    together = engine.generate(prompts, GREEDY)
    alone = engine.generate([[*TEXTS[2], *tail] for tail in tails], GREEDY)
    assert [r.completions[0].token_ids for r in together] == [r.completions[0].token_ids for r in alone]
    sequence.free()
    runtime.prefixes.clear()
    assert runtime.ledger.used() == 0


def test_weights_are_replaced_in_place(runtime: Runtime, engine: Engine) -> None:
    other = tiny_model(seed=5)
    expected = Engine(other).generate(TEXTS, GREEDY)
    before, fingerprint = engine.generate(TEXTS, GREEDY), runtime.fingerprint
    assert engine.update_weights(dict(other.model.state_dict())) == 1
    after = engine.generate(TEXTS, GREEDY)
    tokens = [[r.completions[0].token_ids for r in results] for results in (before, after, expected)]
    assert tokens[0] != tokens[1] == tokens[2], "also where a prompt is in the prefix cache"
    assert {r.weights_version for r in after} == {1}
    assert all(r.completions[0].weights_versions.tolist() == [1] * len(r.completions[0].token_ids) for r in after)
    assert runtime.fingerprint.weights == other.fingerprint.weights != fingerprint.weights


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"model.norm.weight": torch.ones(64), "model.nothing": torch.ones(1)}, "no tensor model.nothing"),
        (
            {"model.norm.weight": torch.ones(64), "model.embed_tokens.weight": torch.ones(3, 64)},
            "embed_tokens.weight is",
        ),
        ({"model.norm.weight": torch.ones(64, dtype=torch.int32)}, "model.norm.weight is torch.int32"),
        ({"model.norm.weight": [1.0] * 64}, "model.norm.weight is a list"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    runtime: Runtime, engine: Engine, tensors: dict[str, Tensor], sentence: str
) -> None:
    before = {name: tensor.clone() for name, tensor in runtime.model.state_dict().items()}
    with pytest.raises(KeyeError, match=sentence):
        engine.update_weights(tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in runtime.model.state_dict().items())
    assert runtime.model.weights_version == 0


def test_official_names_of_single_experts_are_weights_too(runtime: Runtime, engine: Engine) -> None:
    layer = runtime.model.model.layers[1]
    engine.update_weights({"model.layers.1.mlp.experts.2.down_proj.weight": torch.full((64, 32), 0.5)})
    assert bool((layer.mlp.experts.down_proj[2] == 0.5).all()) and not bool(
        (layer.mlp.experts.down_proj[1] == 0.5).any()
    )


def test_running_requests_go_on_with_the_new_weights(runtime: Runtime, engine: Engine) -> None:
    """Each token says by which weights it was computed; a prompt that was being computed begins again."""
    request = engine.generate_request(TEXTS[1], SamplingParams(max_tokens=8), ignore_eos=True)
    events = engine.run([request])
    seen = [next(events) for _ in range(8)]
    assert any(isinstance(task.state, Generating) for task in engine.core.tasks)
    engine.update_weights(dict(tiny_model(seed=5).model.state_dict()))
    records = [record for _, event in [*seen, *events] for record in getattr(event, "records", ())]
    versions = [record.weights_version for record in records]
    assert len(records) == 8 and versions == sorted(versions) and {0, 1} == set(versions)
    fresh = Engine(tiny_model(seed=5)).generate([TEXTS[1]], GREEDY)
    assert engine.generate([TEXTS[1]], GREEDY)[0].completions[0].token_ids == fresh[0].completions[0].token_ids


def test_text_options_are_rejected(engine: Engine) -> None:
    with pytest.raises(KeyeError, match="use stop_token_ids"):
        engine.generate([TEXTS[0]], SamplingParams(stop=("x",)))
    with pytest.raises(KeyeError, match="sampling has 2 entries for 1 prompts"):
        engine.generate([TEXTS[0]], [GREEDY, GREEDY])
    with pytest.raises(KeyeError, match="top_logprobs is -1"):
        engine.score([TEXTS[0]], top_logprobs=-1)
    for token in ("a", 1.5, None):
        with pytest.raises(KeyeError, match="a token that is not a whole number; give token ids"):
            engine.generate([[1, token]], SamplingParams(max_tokens=1))


def test_scores_are_bounded_before_any_work(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keye.engine.engine.MAX_SCORES", 8)
    with pytest.raises(KeyeError, match="top_logprobs of 9 tokens, 1 with each, are more than 8 numbers"):
        engine.score([[1] * 9], top_logprobs=1)
    assert engine.score([[1] * 8], top_logprobs=1)[0].top_ids.shape == (7, 1)
    with pytest.raises(KeyeError, match="the prompt has no tokens"):
        engine.score([[]])


def test_the_same_asynchronously(tmp_path: Path) -> None:
    model = keye.load(tiny_folder(tmp_path / "tiny"), dtype="float32")
    expected = model.engine.generate(TEXTS, GREEDY)

    async def compute() -> None:
        engine = AsyncEngine(model.engine)
        engine.start()
        try:
            results = await asyncio.gather(*(engine.generate(prompt, GREEDY) for prompt in TEXTS))
            assert [r.completions[0].token_ids for r in results] == [r.completions[0].token_ids for r in expected]
            scores = await engine.score(TEXTS[1], top_logprobs=2)
            assert torch.allclose(scores.logprobs, model.engine.score([TEXTS[1]])[0].logprobs, atol=1e-4)
            assert await engine.update_weights({"model.norm.weight": torch.ones(64)}) == 1
            assert (await engine.generate(TEXTS[0], GREEDY)).weights_version == 1
        finally:
            engine.close()

    asyncio.run(compute())


@pytest.mark.parametrize("saves", [True, False], ids=["saved", "computed again"])
def test_a_preempted_request_records_the_same(
    runtime: Runtime, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: bool
) -> None:
    """At any step, whether what it had stored waits in a file or is computed again."""
    if not saves:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=1)
    request = engine.generate_request(TEXTS[2], params, n=2, ignore_eos=True, experts=True, indexer_sets=True)
    (expected,) = engine.generate([TEXTS[2]], params, n=2, ignore_eos=True, experts=True, indexer_sets=True)
    builder = ResultBuilder(request)
    task = engine.core.add(request, builder.add)
    steps = 0
    while not task.has_ended:
        steps += engine.core.step()
        if steps in (1, 4, 9) and task.is_running:
            engine.core.scheduler.preempt(task)
            steps += 1
    result = builder.build_result()
    assert engine.core.scheduler.preemptions > 1
    assert torch.equal(_tensor(result.prompt_experts), _tensor(expected.prompt_experts))
    for completion, other in zip(result.completions, expected.completions, strict=True):
        assert completion.token_ids == other.token_ids
        assert torch.allclose(completion.logprobs, other.logprobs, atol=1e-4)
        assert torch.equal(_tensor(completion.experts), _tensor(other.experts))
        assert torch.equal(_tensor(completion.indexer_sets), _tensor(other.indexer_sets))


def _tensor(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
