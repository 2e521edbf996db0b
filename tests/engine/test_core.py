"""The engine against one sequence at a time: together, cut up, preempted or cached, requests get the same tokens."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import keye
from keye import Frames, Keye, KeyeError
from keye.cache.ledger import OutOfMemory
from keye.chat.messages import Medium, Message
from keye.engine.async_engine import AsyncEngine, Overloaded
from keye.engine.generate import Decoding, generate
from keye.engine.request import (
    Delta,
    Ended,
    Finished,
    Generating,
    Inbox,
    LoadingMedia,
    Prefilled,
    Prefilling,
    Progress,
    Ready,
    Running,
    Task,
    Waiting,
)
from keye.engine.scheduler import StepTimer, split_budget
from keye.engine.step import LEAST_TOKENS, run_slices
from keye.media.processor import Processor
from keye.models.keye import KeyeModel
from tests.support.tiny import tiny_folder

WORDS = ("what", "red circle", "when is it visible", "how many", "blue", "the left square and the right one")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def load(folder: Path) -> Callable[..., Keye]:
    return lambda **options: keye.load(folder, dtype="float32", **options)


@pytest.fixture
def model(load: Callable[..., Keye]) -> Keye:
    return load()


def clip(seed: int, frames: int = 6) -> Frames:
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, 56, 56, 3), dtype=np.uint8)
    return Frames(pixels, tuple(i / 2 for i in range(frames)))


def conversation(seed: int) -> list[Message]:
    """A question of some length, about a clip of some length or about nothing."""
    rng = random.Random(seed)
    question = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 30)))
    media = (Medium("video", clip(seed, rng.randint(2, 12))),) if seed % 3 else ()
    return [Message("user", (*media, question))]


def alone(model: Keye, messages: list[Message], max_tokens: int) -> list[int]:
    """Greedy tokens of the reference: one sequence, nothing cached."""
    request = model.request(messages, max_tokens=max_tokens, ignore_eos=True)
    decoding = Decoding(model.model)
    decoding.prefill(model.runtime.prompts.lay_out(request.prompt))  # type: ignore[arg-type]
    return list(generate(decoding, request.params, ()))


def together(model: Keye, requests: list[Any]) -> tuple[list[list[int]], list[Finished]]:
    """Tokens of the first choice of requests that run at once, and how each finished."""
    inboxes = [Inbox() for _ in requests]
    for request, inbox in zip(requests, inboxes, strict=True):
        model.core.add(request, inbox)
    while not model.core.is_idle():
        if not model.core.step():
            model.core.wait_for_work()
    events = [list(inbox.events) for inbox in inboxes]
    tokens = [[t for e in told if isinstance(e, Delta) and e.index == 0 for t in e.tokens] for told in events]
    ends = [told[-1] for told in events]
    assert all(isinstance(end, Finished) for end in ends), ends
    return tokens, ends  # type: ignore[return-value]


def greedy(model: Keye, messages: list[Message], max_tokens: int = 12, **options: Any) -> Any:
    return model.request(messages, max_tokens=max_tokens, ignore_eos=True, **options)


def tokens_of(inbox: Inbox) -> list[int]:
    return [token for event in inbox.events if isinstance(event, Delta) for token in event.tokens]


def budget(model: Keye, slabs: int) -> int:
    """Memory for so many slabs, and for the smallest step."""
    return slabs * model.runtime.store.slab_bytes + model.core.scheduler.scratch.least


def test_a_mixed_batch_writes_what_each_would_alone(model: Keye) -> None:
    asked = [conversation(seed) for seed in range(8)]
    got, ends = together(model, [greedy(model, messages) for messages in asked])
    assert got == [alone(model, messages, 12) for messages in asked]
    assert [end.completion_tokens for end in ends] == [12] * 8
    model.clear_caches()
    assert model.runtime.ledger.used() == 0


@pytest.mark.parametrize("alone_tokens", [1, 7, 64])
def test_prompts_may_be_cut_anywhere(model: Keye, monkeypatch: pytest.MonkeyPatch, alone_tokens: int) -> None:
    monkeypatch.setattr(StepTimer, "token_budget", lambda *_: alone_tokens)
    asked = [conversation(seed) for seed in (1, 2, 3)]
    got, _ = together(model, [greedy(model, messages, 4) for messages in asked])
    assert got == [alone(model, messages, 4) for messages in asked]


def test_too_little_memory_delays_and_loses_nothing(load: Callable[..., Keye]) -> None:
    model = load()
    model.runtime.ledger.budget = budget(model, 3)
    long = [[Message("user", ("word " * 700 + str(i),))] for i in range(4)]
    sampled = [greedy(model, messages, 8, temperature=1.0, seed=3) for messages in long]
    got, _ = together(model, sampled)
    model.runtime.ledger.budget = None
    model.clear_caches()
    free, _ = together(load(), sampled)
    assert got == free
    assert model.runtime.ledger.used() == 0


def test_preempted_requests_go_on_where_they_were(model: Keye) -> None:
    asked = [conversation(seed) for seed in range(4)]
    inboxes = [Inbox() for _ in asked]
    tasks = [model.core.add(greedy(model, messages, 10), inbox) for messages, inbox in zip(asked, inboxes, strict=True)]
    steps = 0
    while not model.core.is_idle():
        if not model.core.step():
            model.core.wait_for_work()
        steps += 1
        writing = [task for task in tasks if isinstance(task.state, Generating)]
        if steps % 3 == 0 and writing:
            model.core.scheduler.preempt(writing[steps % len(writing)])
    got = [[t for e in inbox.events if isinstance(e, Delta) for t in e.tokens] for inbox in inboxes]
    assert got == [alone(model, messages, 10) for messages in asked]
    assert model.core.scheduler.preemptions > 3


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
def test_settings_hold_through_company_and_preemptions(model: Keye, options: dict[str, Any]) -> None:
    """The same tokens, text, ends and probabilities as alone."""

    def run(preempt: bool) -> list[Any]:
        requests = [greedy(model, conversation(seed), 12, **options) for seed in range(3 if preempt else 1)]
        inboxes = [Inbox() for _ in requests]
        tasks = [model.core.add(one, inbox) for one, inbox in zip(requests, inboxes, strict=True)]
        steps = 0
        while not model.core.is_idle():
            if not model.core.step():
                model.core.wait_for_work()
            steps += 1
            writing = [task for task in tasks if isinstance(task.state, Generating)]
            if preempt and steps % 3 == 0 and writing:
                model.core.scheduler.preempt(writing[steps % len(writing)])
        model.clear_caches()
        return list(inboxes[0].events)

    told, expected = run(preempt=True), run(preempt=False)
    for kind in (Delta, Ended, Prefilled):
        got, wanted = ([event for event in events if isinstance(event, kind)] for events in (told, expected))
        assert len(got) == len(wanted) > 0
        for one, other in zip(sorted(got, key=index_of), sorted(wanted, key=index_of), strict=True):
            assert near(one) == near(other)
    assert isinstance(told[-1], Finished) and told[-1].completion_tokens == expected[-1].completion_tokens


def index_of(event: Any) -> int:
    return getattr(event, "index", 0)


def near(event: Any) -> Any:
    """An event whose probabilities are rounded, since company moves their last bits."""
    found = dict(vars(event))
    for name in ("probs", "prompt_probs"):
        found[name] = [(one.token, round(one.logprob, 3), one.rank) for one in found.get(name) or ()]
    return found


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


def test_what_never_fits_is_refused_with_what_would(model: Keye, monkeypatch: pytest.MonkeyPatch) -> None:
    model.runtime.ledger.budget = budget(model, 1)

    def fail(*_: Any) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(KeyeModel, "encode_vision", fail)
    with pytest.raises(
        OutOfMemory, match=r"memory budget leaves [\d.]+ [KM]iB, enough for 1,024 tokens.*max_frames.*kv=int4"
    ):
        model.chat([Message("user", ("word " * 3000,))], max_tokens=4)
    assert model.runtime.ledger.used() == 0


def test_draws_depend_on_the_seed_alone(model: Keye) -> None:
    messages = conversation(1)
    drawn = greedy(model, messages, 12, temperature=1.5, seed=11)
    (first,), _ = together(model, [drawn])
    company, _ = together(model, [greedy(model, conversation(s), 12, temperature=1.0) for s in (2, 3)] + [drawn])
    assert company[-1] == first


def test_choices_differ_and_the_first_is_that_of_one(model: Keye) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 1.5, "seed": 5}
    answer = model.chat(conversation(1), n=3, **options)
    one = model.chat(conversation(1), **options)
    told = [answer.text, *(other.text for other in answer.alternatives)]
    assert answer.text == one.text and len(set(told)) == 3
    assert answer.usage.completion_tokens > one.usage.completion_tokens


def test_probabilities_are_those_of_the_model(model: Keye) -> None:
    messages = conversation(1)
    answer = model.chat(messages, max_tokens=3, logprobs=2, prompt_logprobs=True, ignore_eos=True)
    prompt = model.runtime.prompts.lay_out(model.request(messages).prompt)  # type: ignore[arg-type]
    decoding = Decoding(model.model)
    decoding.prefill(prompt)
    assert answer.logprobs is not None and answer.prompt_logprobs is not None
    for one in answer.logprobs:
        logs = decoding.logits.log_softmax(-1)
        assert one.logprob == pytest.approx(float(logs[one.token]), abs=1e-4)
        assert [other.token for other in one.top] == logs.topk(2).indices.tolist()
        decoding.feed(one.token)
    assert [one.token for one in answer.prompt_logprobs] == prompt.token_ids[1:].tolist()
    first = Decoding(model.model)
    first.prefill(
        keye.engine.prompt.Prompt(prompt.token_ids[:1], prompt.position_ids[:, :1], prompt.is_visual[:1], 1, ())
    )
    expected = first.logits.log_softmax(-1)[int(prompt.token_ids[1])]
    assert answer.prompt_logprobs[0].logprob == pytest.approx(float(expected), abs=1e-4)
    assert "logprobs" in answer.to_dict()


# Prefixes


def test_the_same_video_is_computed_once(model: Keye, monkeypatch: pytest.MonkeyPatch) -> None:
    video = clip(1, 10)
    first = model.ask(video, "what is it?", max_tokens=4)
    calls: list[int] = []
    encode = KeyeModel.encode_vision
    monkeypatch.setattr(KeyeModel, "encode_vision", lambda *given: calls.append(1) or encode(*given))  # type: ignore[func-returns-value]
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
    from dataclasses import replace

    _, (end,) = together(model, [replace(request, salt=b"someone else")])
    assert end.cached_tokens == 0


def test_prefixes_are_given_up_for_those_who_need_the_room(model: Keye) -> None:
    for seed in range(12):
        model.chat([Message("user", ("word " * 300 + str(seed),))], max_tokens=1)
    assert len(model.runtime.prefixes) == 12
    slabs = model.runtime.store.nbytes() // model.runtime.store.slab_bytes
    model.runtime.ledger.budget = budget(model, slabs)
    model.chat([Message("user", ("other " * 300,))], max_tokens=1)
    assert len(model.runtime.prefixes) < 13 and model.runtime.store.nbytes() <= slabs * model.runtime.store.slab_bytes


# Determinism


def test_deterministic_tokens_do_not_depend_on_company(folder: Path) -> None:
    """In bfloat16, where the shape of a product decides its last bits."""
    model = keye.load(folder)
    fixed = [greedy(model, conversation(s), 24, deterministic=True, logprobs=0) for s in (1, 2)]

    def probabilities(company: list[Any]) -> list[list[float]]:
        inboxes = [Inbox() for _ in fixed]
        for request in company:
            model.core.add(request, Inbox())
        for request, inbox in zip(fixed, inboxes, strict=True):
            model.core.add(request, inbox)
        while not model.core.is_idle():
            if not model.core.step():
                model.core.wait_for_work()
        return [[p.logprob for e in i.events if isinstance(e, Delta) for p in e.probs] for i in inboxes]

    by_themselves = probabilities([])
    in_company = probabilities([greedy(model, conversation(s), 30) for s in range(3, 9)])
    assert by_themselves == in_company


# Going away


def test_requests_dropped_at_any_stage_leave_nothing(model: Keye) -> None:
    rng, open_tasks = random.Random(0), list[Any]()
    for number in range(1000):
        messages = conversation(1 + number % 2) if number % 50 == 0 else [Message("user", (f"q {number % 7}",))]
        open_tasks.append(model.core.add(greedy(model, messages, 6), Inbox()))
        for _ in range(rng.randint(0, 1)):
            model.core.step()
        if rng.random() < 0.9:
            model.core.abort(open_tasks.pop(rng.randrange(len(open_tasks))))
    for task in open_tasks:
        model.core.abort(task)
    model.core.step()
    assert model.core.is_idle()
    model.clear_caches()
    assert model.runtime.ledger.used() == 0 and model.runtime.ledger.accounts() == {}


def test_a_stream_that_is_let_go_ends_its_request(model: Keye) -> None:
    stream = model.stream(conversation(1), max_tokens=50, ignore_eos=True)
    next(stream)
    assert not model.core.is_idle()
    stream.close()
    assert model.core.is_idle()


def test_one_that_fails_leaves_the_others_alone(model: Keye, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = Inbox(), Inbox()
    model.core.add(greedy(model, conversation(3), 4), good)
    frames = Processor.frames

    def broken(self: Processor, *given: Any) -> Any:
        if threading.current_thread().name.startswith("keye-media"):
            raise KeyeError("the decode worker died; try the file again")
        return frames(self, *given)

    monkeypatch.setattr(Processor, "frames", broken)
    model.core.add(greedy(model, conversation(1), 4), bad)
    while not model.core.is_idle():
        if not model.core.step():
            model.core.wait_for_work()
    assert isinstance(good.events[-1], Finished)
    assert "decode worker died" in str(bad.events[-1].error)  # type: ignore[union-attr]


def test_a_device_that_fails_ends_what_was_on_it(model: Keye) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory on the device")

    run_slices, model.core.run_slices = model.core.run_slices, fail
    with pytest.raises(RuntimeError, match="out of memory on the device"):
        model.chat(conversation(3), max_tokens=2)
    model.core.run_slices = run_slices
    assert model.chat(conversation(3), max_tokens=2).usage.completion_tokens > 0


def test_a_request_out_of_time_says_so(model: Keye) -> None:
    from dataclasses import replace

    request = replace(greedy(model, conversation(3), 500), seconds=0.0)
    inbox = Inbox()
    model.core.add(request, inbox)
    model.core.run_until(inbox)
    assert "took longer than 0 s" in str(inbox.events[-1].error)  # type: ignore[union-attr]


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
    asked = [conversation(s) for s in range(5)]
    answers = model.batch(asked, max_tokens=5)
    assert [a.text for a in answers] == [model.chat(messages, max_tokens=5).text for messages in asked]


# The asynchronous front


def run_async(model: Keye, work: Callable[[AsyncEngine], Any]) -> Any:
    engine = AsyncEngine(model.engine)
    engine.start()
    try:
        return asyncio.run(work(engine))
    finally:
        engine.close()


def test_many_clients_at_once(model: Keye) -> None:
    asked = [conversation(s) for s in range(6)]

    async def client(engine: AsyncEngine, messages: list[Message]) -> list[int]:
        tokens: list[int] = []
        async for event in engine.run(greedy(model, messages, 8)):
            if isinstance(event, Delta):
                tokens += event.tokens
        return tokens

    async def all_clients(engine: AsyncEngine) -> list[list[int]]:
        return await asyncio.gather(*(client(engine, messages) for messages in asked))

    assert run_async(model, all_clients) == [alone(model, messages, 8) for messages in asked]
    assert model.chat(asked[0], max_tokens=2).usage.completion_tokens > 0, "the model outlives the engine"
    assert run_async(model, all_clients) == [alone(model, messages, 8) for messages in asked]


def test_a_client_that_goes_gives_everything_back(model: Keye) -> None:
    async def leave(engine: AsyncEngine) -> None:
        events = engine.run(greedy(model, conversation(1), 400))
        async for event in events:
            if isinstance(event, Delta):
                break
        await events.aclose()
        task = asyncio.create_task(anext(engine.run(greedy(model, conversation(2), 400))))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await engine.drain(5.0)
        with pytest.raises(Overloaded, match="is ending and takes no more"):
            await anext(engine.run(greedy(model, conversation(2), 4)))

    run_async(model, leave)
    model.clear_caches()
    assert model.runtime.ledger.used() == 0


def test_what_is_submitted_can_be_aborted_and_let_go(model: Keye) -> None:
    async def submit(engine: AsyncEngine) -> None:
        running = engine.submit(greedy(model, conversation(1), 400))
        await anext(running)
        running.abort()
        running.abort()
        with pytest.raises(StopAsyncIteration):
            await anext(running)
        del running
        engine.submit(greedy(model, conversation(2), 400))  # let go at once
        assert await engine.drain(5.0)

    run_async(model, submit)
    model.clear_caches()
    assert model.runtime.ledger.used() == 0


def ready(model: Keye, asked: list[list[Message]]) -> tuple[list[Inbox], list[Task]]:
    """Requests that are laid out and not started."""
    most_running, model.core.scheduler.most_running = model.core.scheduler.most_running, 0
    inboxes = [Inbox() for _ in asked]
    tasks = [model.core.add(greedy(model, messages), inbox) for messages, inbox in zip(asked, inboxes, strict=True)]
    while any(isinstance(task.state, Waiting | LoadingMedia) for task in tasks):
        model.core.step()
        model.core.wait_for_work()
    model.core.scheduler.most_running = most_running
    assert all(isinstance(task.state, Ready) for task in tasks)
    return inboxes, tasks


def finish_all(model: Keye) -> None:
    while not model.core.is_idle():
        if not model.core.step():
            model.core.wait_for_work()


@pytest.mark.parametrize("cache", [1 << 20, 0])
def test_a_video_that_several_ask_about_at_once_is_encoded_once(
    model: Keye, monkeypatch: pytest.MonkeyPatch, cache: int
) -> None:
    """But for where the cache has no place for it: then nobody waits, and each encodes its own."""
    encoded: list[int] = []
    monkeypatch.setattr(StepTimer, "record_patches", lambda self, seconds, patches: encoded.append(patches))
    model.runtime.vision_cache.budget = cache
    # What stands before the video differs, so that stored prefixes are of no use.
    asked = [[Message("user", (f"the {word}", Medium("video", clip(77, 12)), "?"))] for word in WORDS[:4]]
    expected = [alone(model, messages, 12) for messages in asked]
    inboxes, _ = ready(model, asked)
    finish_all(model)
    assert [tokens_of(inbox) for inbox in inboxes] == expected
    patches = 12 * 4 * 4
    assert sum(encoded) == (patches if cache else 4 * patches)


def test_who_waits_for_anothers_video_goes_on_when_that_one_leaves(model: Keye) -> None:
    asked = [[Message("user", (f"the {word}", Medium("video", clip(78, 12)), "?"))] for word in WORDS[:2]]
    (_, second), (leaving, waiting) = ready(model, asked)
    model.core.scheduler.admit()
    assert isinstance(leaving.state, Prefilling) and isinstance(waiting.state, Ready)
    model.core.abort(leaving)
    finish_all(model)
    assert tokens_of(second) == alone(model, asked[1], 12)


def test_too_many_are_refused_and_progress_is_told(model: Keye) -> None:
    async def crowd(engine: AsyncEngine) -> list[Any]:
        engine.most_requests = 1
        first = engine.run(greedy(model, conversation(1), 4))
        told = [await anext(first)]
        with pytest.raises(Overloaded, match="1 requests are waiting or running"):
            await anext(engine.run(greedy(model, conversation(2), 4)))
        told += [event async for event in first]
        assert engine.gauges()["computed_reply_tokens_total"] >= 3
        return told

    phases = [event.phase for event in run_async(model, crowd) if isinstance(event, Progress)]
    assert phases[0] == "media" and "encode" in phases and phases[-1] == "prefill"


# The scheduler


def test_shares_are_equal_and_nothing_is_wasted() -> None:
    assert split_budget([(1, 1000), (2, 10), (3, 1000)], 100) == {1: 45, 2: 10, 3: 45}
    assert split_budget([(1, 5), (2, 5)], 100) == {1: 5, 2: 5}
    assert split_budget([(1, 50), (2, 50)], 1) == {1: 1}
    rng = random.Random(0)
    for _ in range(200):
        waiting = [(i, rng.randint(1, 300)) for i in range(rng.randint(1, 9))]
        budget = rng.randint(1, 400)
        shares = split_budget(waiting, budget)
        assert sum(shares.values()) == min(budget, sum(need for _, need in waiting))
        assert all(shares.get(i, 0) <= need for i, need in waiting)
        if budget >= len(waiting):
            assert set(shares) == {i for i, _ in waiting}, "everyone gets on"


def test_prompts_get_what_those_who_write_can_spare() -> None:
    timer = StepTimer()
    assert timer.token_budget(0) > timer.token_budget(4)
    timer.record_step(0.010, 4, 0)
    timer.record_step(0.110, 4, 100)
    assert LEAST_TOKENS <= timer.token_budget(4) < 100
    timer.record_step(5.0, 4, 100)
    assert timer.token_budget(4) == LEAST_TOKENS


def test_nan_fails_only_its_request(model: Keye) -> None:

    good, bad = Inbox(), Inbox()
    model.core.add(greedy(model, conversation(3), 4), good)
    spoiled = model.core.add(greedy(model, conversation(6), 4), bad)

    def poisoned(network: KeyeModel, slices: Any) -> Any:
        mine = spoiled.state.caches if isinstance(spoiled.state, Running) else []
        return [
            torch.full_like(logits, torch.nan) if logits is not None and item.cache in mine else logits
            for item, logits in zip(slices, run_slices(network, slices), strict=True)
        ]

    model.core.run_slices = poisoned
    while not model.core.is_idle():
        if not model.core.step():
            model.core.wait_for_work()
    assert isinstance(good.events[-1], Finished)
    assert "computes NaN" in str(bad.events[-1].error)  # type: ignore[union-attr]


def test_tokens_that_were_computed_are_those_that_are_counted(model: Keye) -> None:
    """Also of deterministic prompts, whose slices are what they are, whatever share a step has for them."""
    writer = greedy(model, conversation(3), 20)
    for deterministic in (False, True):
        before = dict(model.core.computed)
        prompt = greedy(model, [Message("user", ("word " * 200,))], 1, deterministic=deterministic)
        _, ends = together(model, [writer, prompt])
        fresh = sum(end.prompt_tokens - end.cached_tokens for end in ends)
        assert model.core.computed["prompt"] - before["prompt"] == fresh
