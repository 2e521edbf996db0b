"""The engine against one sequence at a time: together, cut up or cached, requests get the same tokens."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import keye
from keye import Keye, KeyeError
from keye.chat.messages import Medium, Message
from keye.engine.prompt import Prompt
from keye.engine.request import (
    Delta,
    Ended,
    Finished,
    Generating,
    LoadingMedia,
    Prefilled,
    Prefilling,
    Ready,
    Task,
    Waiting,
)
from keye.engine.scheduler import PROBED_TOKENS, StepTimer
from keye.models import moe
from keye.models.keye import KeyeModel
from keye.ops.cpu import gemv
from tests.support.engine import (
    WORDS,
    Inbox,
    clip,
    conversation,
    generate_alone,
    greedy,
    run,
    run_together,
    step,
    tokens_of,
)
from tests.support.reference import PlainSequence


def test_a_mixed_batch_generates_what_each_request_does_alone(model: Keye) -> None:
    questions = [conversation(seed) for seed in range(8)]
    got, ends = run_together(model, [greedy(model, messages, 12) for messages in questions])
    assert got == [generate_alone(model, messages, 12) for messages in questions]
    assert [end.completion_tokens for end in ends] == [12] * 8
    model.clear_caches()
    assert model.runtime.ledger.used() == 0


@pytest.mark.parametrize("alone_tokens", [1, 7, 64])
def test_prompts_may_be_cut_anywhere(model: Keye, monkeypatch: pytest.MonkeyPatch, alone_tokens: int) -> None:
    monkeypatch.setattr(StepTimer, "token_budget", lambda *_: alone_tokens)
    questions = [conversation(seed) for seed in (1, 2, 3)]
    got, _ = run_together(model, [greedy(model, messages, 4) for messages in questions])
    assert got == [generate_alone(model, messages, 4) for messages in questions]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "seed": 3, "n": 2},
        {"frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.3},
        {"logit_bias": {40: 4.0, 41: 4.0}, "frequency_penalty": 0.5},
        {"allowed_token_ids": (40, 41, 42, 43), "temperature": 1.0, "seed": 1},
        {"bad_words": ("a", "e"), "min_tokens": 12, "stop": ("i",)},
        {"min_tokens": 5, "stop_token_ids": (40, 41), "logit_bias": {40: 3.0}},
        {"thinking": True, "thinking_token_budget": 4},
        {"prompt_logprobs": 2, "logprobs": 2},
    ],
)
def test_options_hold_in_batches_and_through_preemptions(model: Keye, options: dict[str, Any]) -> None:
    """The same tokens, text, ends and probabilities as alone."""

    def run(preempt: bool) -> list[Any]:
        requests = [greedy(model, conversation(seed), 12, **options) for seed in range(3 if preempt else 1)]
        inboxes = [Inbox() for _ in requests]
        tasks = [model.core.add(item, inbox) for item, inbox in zip(requests, inboxes, strict=True)]
        steps = 0
        while not model.core.is_idle():
            step(model)
            steps += 1
            writing = [task for task in tasks if isinstance(task.state, Generating)]
            if preempt and steps % 3 == 0 and writing:
                model.core.scheduler.preempt(writing[steps % len(writing)])
        model.clear_caches()
        return list(inboxes[0].events)

    outcome, expected = run(preempt=True), run(preempt=False)
    for kind in (Delta, Ended, Prefilled):
        got, wanted = ([event for event in events if isinstance(event, kind)] for events in (outcome, expected))
        assert len(got) == len(wanted) > 0
        for item, other in zip(sorted(got, key=index_of), sorted(wanted, key=index_of), strict=True):
            assert near(item) == near(other)
    assert isinstance(outcome[-1], Finished) and outcome[-1].completion_tokens == expected[-1].completion_tokens


def index_of(event: Any) -> int:
    return getattr(event, "index", 0)


def near(event: Any) -> Any:
    """An event whose probabilities are rounded, since company moves their last bits."""
    fields = dict(vars(event))
    for name in ("probs", "prompt_probs"):
        fields[name] = [(item.token, round(item.logprob, 3), item.rank) for item in fields.get(name) or ()]
    return fields


def test_probabilities_of_a_prompt_are_built_once_while_it_is_computed(model: Keye) -> None:
    inbox = Inbox()
    task = model.core.add(greedy(model, [Message("user", ("word " * 500,))], prompt_logprobs=1), inbox)
    sizes = [0]
    while not model.core.is_idle():
        step(model)
        sizes.append(len(task.prompt_probs))
    assert max(after - before for before, after in pairwise(sizes)) == PROBED_TOKENS
    prefilled, finished = (event for event in inbox.events if isinstance(event, Prefilled | Finished))
    assert prefilled.prompt_probs is not None and finished.prompt_probs is not None
    assert len(prefilled.prompt_probs) == prefilled.prompt_tokens - 1 > 3 * PROBED_TOKENS
    pairs = zip(prefilled.prompt_probs, finished.prompt_probs, strict=True)
    assert all(first is second for first, second in pairs)
    assert not task.prompt_scores, "kept only where they are handed over"


def test_token_ids_are_those_of_the_model(model: Keye) -> None:
    size = model.config.text.vocab_size
    for options in ({"logit_bias": {size: 1}}, {"stop_token_ids": [size]}, {"allowed_token_ids": [0, size]}):
        with pytest.raises(KeyeError, match=f"has the token {size}; this model's tokens are numbered 0 to {size - 1}"):
            model.chat(conversation(0), **options)


def test_a_reply_may_be_continued(model: Keye) -> None:
    messages = [*conversation(0), Message("assistant", ("It is",))]
    answer = model.chat(messages, continue_final_message=True, max_tokens=4, ignore_eos=True)
    again = model.chat(messages, max_tokens=4, ignore_eos=True)
    assert answer.usage.prompt_tokens < again.usage.prompt_tokens and answer.usage.completion_tokens == 4
    with pytest.raises(KeyeError, match="continue_final_message needs a text of the assistant"):
        model.chat(conversation(0), continue_final_message=True)


def test_draws_depend_on_the_seed_alone(model: Keye) -> None:
    messages = conversation(1)
    drawn = greedy(model, messages, 12, temperature=1.5, seed=11)
    (first,), _ = run_together(model, [drawn])
    company, _ = run_together(model, [greedy(model, conversation(s), 12, temperature=1.0) for s in (2, 3)] + [drawn])
    assert company[-1] == first


def test_choices_differ_and_the_first_is_that_of_a_single_choice(model: Keye) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 1.5, "seed": 5}
    answer = model.chat(conversation(1), n=3, **options)
    item = model.chat(conversation(1), **options)
    outcome = [answer.text, *(other.text for other in answer.alternatives)]
    assert answer.text == item.text and len(set(outcome)) == 3
    assert answer.usage.completion_tokens > item.usage.completion_tokens


def test_probabilities_are_those_of_the_model(model: Keye) -> None:
    messages = conversation(1)
    answer = model.chat(messages, max_tokens=3, logprobs=2, prompt_logprobs=True, ignore_eos=True)
    prompt = model.runtime.prompts.lay_out(model.request(messages).prompt)  # type: ignore[arg-type]
    reference = PlainSequence(model.model).prefill(prompt)
    assert answer.logprobs is not None and answer.prompt_logprobs is not None
    for item in answer.logprobs:
        logs = reference.logits.log_softmax(-1)
        assert item.logprob == pytest.approx(float(logs[item.token]), abs=1e-4)
        assert [other.token for other in item.top] == logs.topk(2).indices.tolist()
        reference.append([item.token])
    assert [item.token for item in answer.prompt_logprobs] == prompt.token_ids[1:].tolist()
    beginning = Prompt(prompt.token_ids[:1], prompt.position_ids[:, :1], prompt.is_visual[:1], 1, ())
    first = PlainSequence(model.model).prefill(beginning)
    expected = first.logits.log_softmax(-1)[int(prompt.token_ids[1])]
    assert answer.prompt_logprobs[0].logprob == pytest.approx(float(expected), abs=1e-4)
    assert "logprobs" in answer.to_dict()


# Prefixes


def test_the_same_video_is_computed_once(model: Keye, monkeypatch: pytest.MonkeyPatch) -> None:
    video = clip(1, 10)
    first = model.ask(video, "what is it?", max_tokens=4)
    calls: list[int] = []
    encode = KeyeModel.encode_vision
    monkeypatch.setattr(KeyeModel, "encode_vision", lambda *args: calls.append(1) or encode(*args))  # type: ignore[func-returns-value]
    second = model.ask(video, "when does it end, and how?", max_tokens=4)
    assert (first.usage.cached_tokens, calls) == (0, [])
    assert second.usage.media_tokens < second.usage.cached_tokens < second.usage.prompt_tokens
    model.clear_caches()
    assert model.ask(video, "when does it end, and how?", max_tokens=4).text == second.text


def test_another_video_or_owner_or_mode_shares_nothing(model: Keye) -> None:
    model.ask(clip(1), "what?", max_tokens=1)
    for video, options in ((clip(2), {}), (clip(1), {"attention": "dense"})):
        assert model.ask(video, "what?", max_tokens=1, **options).usage.cached_tokens < 20
    request = model.request([Message("user", (Medium("video", clip(1)), "what?"))], max_tokens=1)

    _, (end,) = run_together(model, [replace(request, salt=b"someone else")])
    assert end.cached_tokens == 0


# Determinism


@pytest.mark.parametrize("weights", ["plain", "few rows", "int4"])
def test_deterministic_tokens_do_not_depend_on_company(
    folder: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    """In bfloat16, where the shape of a product decides its last bits; also with the kernels for few rows, which
    matrices of this size are otherwise too small for."""
    if weights == "few rows":
        for name in ("LEAST_COLUMNS", "LEAST_NUMBERS", "LEAST_EXPERT_NUMBERS"):
            monkeypatch.setattr(gemv, name, 1)
        monkeypatch.setattr(moe, "LEAST_EXPERT_NUMBERS", 1)
    model = keye.load(folder, quant="int4" if weights == "int4" else None)
    fixed = [greedy(model, conversation(s), 24, deterministic=True, logprobs=0) for s in (1, 2)]

    def probabilities(company: list[Any]) -> list[list[float]]:
        inboxes = [Inbox() for _ in fixed]
        for request in company:
            model.core.add(request, Inbox())
        for request, inbox in zip(fixed, inboxes, strict=True):
            model.core.add(request, inbox)
        run(model)
        return [[p.logprob for e in i.events if isinstance(e, Delta) for p in e.probs] for i in inboxes]

    by_themselves = probabilities([])
    in_company = probabilities([greedy(model, conversation(s), 30) for s in range(3, 9)])
    assert by_themselves == in_company


# Concurrency


def test_threads_share_the_engine(model: Keye) -> None:
    expected = [model.chat(conversation(s), max_tokens=6).text for s in range(4)]
    got: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda s=s: got.update({s: model.chat(conversation(s), max_tokens=6).text}))  # type: ignore[misc]
        for s in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[s] for s in range(4)] == expected


def test_a_batch_is_answered_in_order(model: Keye) -> None:
    questions = [conversation(s) for s in range(5)]
    answers = model.batch(questions, max_tokens=5)
    assert [a.text for a in answers] == [model.chat(messages, max_tokens=5).text for messages in questions]


def ready(model: Keye, questions: list[list[Message]]) -> tuple[list[Inbox], list[Task]]:
    """Requests that are laid out and not started."""
    most_running, model.core.scheduler.most_running = model.core.scheduler.most_running, 0
    inboxes = [Inbox() for _ in questions]
    tasks = [
        model.core.add(greedy(model, messages, 12), inbox) for messages, inbox in zip(questions, inboxes, strict=True)
    ]
    while any(isinstance(task.state, Waiting | LoadingMedia) for task in tasks):
        model.core.step()
        model.core.wait_for_work()
    model.core.scheduler.most_running = most_running
    assert all(isinstance(task.state, Ready) for task in tasks)
    return inboxes, tasks


@pytest.mark.parametrize("cache", [1 << 20, 0])
def test_a_video_in_several_requests_at_once_is_encoded_once(
    model: Keye, monkeypatch: pytest.MonkeyPatch, cache: int
) -> None:
    """But for where the cache has no place for it: then no request waits, and each encodes its own."""
    encoded: list[int] = []
    monkeypatch.setattr(StepTimer, "record_patches", lambda self, seconds, patches: encoded.append(patches))
    model.runtime.vision_cache.budget = cache
    # What stands before the video differs, so that stored prefixes are of no use.
    questions = [[Message("user", (f"the {word}", Medium("video", clip(77, 12)), "?"))] for word in WORDS[:4]]
    expected = [generate_alone(model, messages, 12) for messages in questions]
    inboxes, _ = ready(model, questions)
    run(model)
    assert [tokens_of(inbox) for inbox in inboxes] == expected
    patches = 12 * 4 * 4
    assert sum(encoded) == (patches if cache else 4 * patches)


def test_a_request_that_waits_for_the_video_of_another_goes_on_when_that_is_aborted(model: Keye) -> None:
    questions = [[Message("user", (f"the {word}", Medium("video", clip(78, 12)), "?"))] for word in WORDS[:2]]
    (_, second), (leaving, waiting) = ready(model, questions)
    model.core.scheduler.admit()
    assert isinstance(leaving.state, Prefilling) and isinstance(waiting.state, Ready)
    model.core.abort(leaving)
    run(model)
    assert tokens_of(second) == generate_alone(model, questions[1], 12)


def test_every_computed_token_is_counted_once(model: Keye) -> None:
    """Also of deterministic prompts, whose slices are what they are, whatever share a step has for them."""
    writer = greedy(model, conversation(3), 20)
    for deterministic in (False, True):
        before = dict(model.core.computed)
        prompt = greedy(model, [Message("user", ("word " * 200,))], 1, deterministic=deterministic)
        _, ends = run_together(model, [writer, prompt])
        fresh = sum(end.prompt_tokens - end.cached_tokens for end in ends)
        assert model.core.computed["prompt"] - before["prompt"] == fresh
