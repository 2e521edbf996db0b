"""Preempted requests finish with the tokens and probabilities of undisturbed ones, and give everything back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import keye
from keye import Frames, Keye
from keye.cache.ledger import OutOfMemory
from keye.cache.saved import ACCOUNT
from keye.chat.messages import Medium, Message
from keye.engine.request import Delta, Failed, Finished, Generating, GenerationRequest, Prefilling, Ready, Task
from tests.support.engine import Inbox


def clip(seed: int, frames: int = 30) -> Frames:
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, 56, 56, 3), dtype=np.uint8)
    return Frames(pixels, tuple(i / 2 for i in range(frames)))


def about_clip(model: Keye, number: int = 1, **options: Any) -> GenerationRequest:
    messages = [Message("user", (Medium("video", clip(number)), "what is red?"))]
    return model.request(messages, **{"max_tokens": 40, "ignore_eos": True, "logprobs": 2, **options})


def about_words(model: Keye, words: int, **options: Any) -> GenerationRequest:
    messages = [Message("user", ("word " * words,))]
    return model.request(messages, **{"max_tokens": 8, "ignore_eos": True, "logprobs": 2, **options})


def tokens_computed(task: Task) -> int:
    """Tokens of the prompt and of the replies."""
    done = task.state.done if isinstance(task.state, Prefilling) else 0
    done = task.state.prompt.length if isinstance(task.state, Generating) else done
    return done + sum(len(choice.reply) for choice in task.choices)


def run(model: Keye, *requests: GenerationRequest, preempt_at: Mapping[int, int] | None = None) -> list[Inbox]:
    """Runs requests together. `preempt_at`: after how many tokens computed the request of a number is preempted."""
    inboxes, left = [Inbox() for _ in requests], dict(preempt_at or {})
    pairs = zip(requests, inboxes, strict=True)
    tasks = [model.core.add(item, inbox) for item, inbox in pairs]
    while not model.core.is_idle():
        if not model.core.step():
            model.core.wait_for_work()
        for number, tokens in list(left.items()):
            task = tasks[number]
            computed = tokens_computed(task)
            if task.is_running and computed >= tokens:
                model.core.scheduler.preempt(task)
                assert model.runtime.ledger.used(ACCOUNT) > 0
                del left[number]
    assert not left, "no request was preempted"
    return inboxes


def exact(inbox: Inbox) -> dict[int, list[tuple[int, float]]]:
    """Token and log-probability of everything that was generated, by choice."""
    assert isinstance(inbox.events[-1], Finished), inbox.events[-1]
    outcome: dict[int, list[tuple[int, float]]] = {}
    for event in inbox.events:
        if isinstance(event, Delta):
            outcome.setdefault(event.choice_index, []).extend((p.token, p.logprob) for p in event.probs)
    return outcome


def nothing_held(model: Keye) -> bool:
    model.clear_caches()
    return model.runtime.ledger.accounts() == {}


@pytest.mark.parametrize(
    ("loading", "asking"),
    [
        ({}, {}),
        ({}, {"temperature": 1.2, "seed": 7, "top_p": 0.9, "repetition_penalty": 1.1}),
        ({}, {"n": 3, "temperature": 1.0, "seed": 3}),
        ({"kv": "int8"}, {}),
        ({"kv": "int4", "indexer_kv": "int8"}, {"temperature": 1.0, "seed": 1}),
        ({"kv_tier": "file"}, {}),
        ({}, {"evidence": True}),
        ({}, {"attention": "dense"}),
    ],
)
def test_a_preempted_reply_is_the_same_to_the_last_bit(folder: Path, loading: Any, asking: Any) -> None:
    """In bfloat16 or less, where computing it again would give other last bits."""
    model = keye.load(folder, **loading)
    (plain,) = run(model, about_clip(model, **asking))
    assert nothing_held(model)
    generated = 25 * asking.get("n", 1)
    prompt = plain.events[-1].prompt_tokens  # type: ignore[union-attr]
    (again,) = run(model, about_clip(model, **asking), preempt_at={0: prompt + generated})
    assert model.core.scheduler.preemptions == 1
    assert exact(again) == exact(plain)
    if asking.get("evidence"):
        assert again.events[-1].evidence.to_dict() == plain.events[-1].evidence.to_dict()  # type: ignore[union-attr]
    assert nothing_held(model)


def test_a_prompt_preempted_halfway_goes_on_there(folder: Path) -> None:
    model = keye.load(folder)
    (plain,) = run(model, about_words(model, 1500, prompt_logprobs=0))
    computed = model.core.computed["prompt"]
    (again,) = run(model, about_words(model, 1500, prompt_logprobs=0), preempt_at={0: 600})
    assert exact(again) == exact(plain)
    assert again.events[-1].prompt_probs == plain.events[-1].prompt_probs  # type: ignore[union-attr]
    assert model.core.computed["prompt"] == 2 * computed, "nothing was computed twice"
    assert nothing_held(model)


class Stairs:
    """A form in which token number i of a reply leaves the remainder i when it is divided by 100."""

    def __init__(self, vocab_size: int, count: int = 0) -> None:
        self.vocab_size, self.count = vocab_size, count

    def mask(self) -> torch.Tensor:
        return torch.arange(self.vocab_size) % 100 == self.count % 100

    def settle(self, token: int) -> int:
        return token

    def advance(self, token: int) -> None:
        self.count += 1

    def fork(self) -> Stairs:
        return Stairs(self.vocab_size, self.count)


def test_a_reply_that_keeps_to_a_form_goes_on_in_it(folder: Path) -> None:
    model = keye.load(folder)
    guide = Stairs(model.config.text.vocab_size)
    build_request = replace(about_words(model, 30, max_tokens=30, temperature=1.0, seed=2), guide=guide)
    (plain,) = run(model, build_request)
    (again,) = run(model, build_request, preempt_at={0: 10 + plain.events[-1].prompt_tokens})  # type: ignore[union-attr]
    assert exact(again) == exact(plain)
    assert [token % 100 for token, _ in exact(again)[0]] == list(range(30))


@pytest.mark.parametrize("session", ["index", "live"])
def test_what_a_question_shares_with_a_session_stays_shared(folder: Path, tmp_path: Path, session: str) -> None:
    model = keye.load(folder)
    if session == "index":
        model.index(clip(4), tmp_path / "a.keye")
        messages = [Message("user", (Medium("video", str(tmp_path / "a.keye")), "what is red?"))]

        def build_request() -> GenerationRequest:
            return model.request(messages, max_tokens=30, ignore_eos=True, logprobs=0)

    else:
        live = model.live()
        live.append(clip(4).frames, [i / 2 for i in range(30)])
        build_request = lambda: replace(live.request("what is red?", max_tokens=30), ignore_eos=True, logprobs=0)  # noqa: E731
    (plain,) = run(model, build_request())
    request = build_request()
    before = model.runtime.store.nbytes()
    (again,) = run(model, request, preempt_at={0: 10 + plain.events[-1].prompt_tokens})  # type: ignore[union-attr]
    assert exact(again) == exact(plain)
    assert model.runtime.store.nbytes() == before, "the past of the session was not copied"


class Only:
    """A form of one token, again and again."""

    def __init__(self, vocab_size: int, token: int) -> None:
        self.vocab_size, self.token = vocab_size, token

    def mask(self) -> torch.Tensor:
        return torch.arange(self.vocab_size) == self.token

    def settle(self, token: int) -> int:
        return token

    def advance(self, token: int) -> None: ...

    def fork(self) -> Only:
        return self


def test_a_placeholder_that_a_model_samples_has_no_effect(folder: Path) -> None:
    """Beside a prompt whose placeholders are given visual tokens."""
    model = keye.load(folder)
    config = model.config
    drawn = replace(about_words(model, 5, max_tokens=60), guide=Only(config.text.vocab_size, config.video_token_id))
    first, second = run(model, drawn, about_clip(model, max_tokens=5))
    assert [token for token, _ in exact(first)[0]] == [config.video_token_id] * 60
    assert len(exact(second)[0]) == 5


def test_requests_that_fit_alone_finish_together(folder: Path) -> None:
    """With scratch for the smallest step and room for two of eight, each writes what it writes alone."""
    model = keye.load(folder, dtype="float32")
    requests = [
        about_words(model, 960, max_tokens=90),
        about_words(model, 950, max_tokens=90, temperature=1.0, seed=4),
        about_clip(model, 1, max_tokens=60),
        about_words(model, 300, max_tokens=40, n=4, temperature=1.0, seed=5),
        about_words(model, 200, max_tokens=5, prompt_logprobs=0),
    ]
    expected = [exact(run(model, item)[0]) for item in requests]
    assert nothing_held(model)
    model.runtime.ledger.budget = model.core.scheduler.scratch.least + 2 * model.runtime.store.slab_bytes
    inboxes = run(model, *requests)
    assert model.core.scheduler.preemptions > 0
    for inbox, alone in zip(inboxes, expected, strict=True):
        for index, choice in exact(inbox).items():
            assert [token for token, _ in choice] == [token for token, _ in alone[index]]
            assert [prob for _, prob in choice] == pytest.approx([prob for _, prob in alone[index]], abs=1e-4)
    assert nothing_held(model)


def test_without_room_on_the_disk_a_reply_is_computed_again(folder: Path, tmp_path: Path) -> None:
    model = keye.load(folder, dtype="float32")
    (plain,) = run(model, about_clip(model))
    disk = tmp_path / "disk"
    disk.mkdir()
    model = keye.load(folder, dtype="float32", kv_tier="file", kv_folder=disk)
    inbox, prompt = Inbox(), plain.events[-1].prompt_tokens  # type: ignore[union-attr]
    task = model.core.add(about_clip(model), inbox)
    while len(task.choices[0].reply if task.choices else ()) < 20:
        if not model.core.step():
            model.core.wait_for_work()
    disk.rmdir()  # the files in it have no names
    model.core.scheduler.preempt(task)
    disk.mkdir()
    assert isinstance(task.state, Ready) and task.state.preempted is None and model.runtime.ledger.used(ACCOUNT) == 0
    while not model.core.is_idle():
        if not model.core.step():
            model.core.wait_for_work()
    assert model.core.computed["prompt"] >= prompt + 1
    assert [t for t, _ in exact(inbox)[0]] == [t for t, _ in exact(plain)[0]]


def test_a_request_whose_steps_never_fit_is_refused_at_once(folder: Path) -> None:
    model = keye.load(folder, dtype="float32")
    model.runtime.ledger.budget = model.core.scheduler.scratch.least + model.runtime.store.slab_bytes
    (inbox,) = run(model, about_words(model, 20, deterministic=True))
    assert isinstance(inbox.events[-1], Failed) and isinstance(inbox.events[-1].error, OutOfMemory)
    (inbox,) = run(model, about_words(model, 20))
    assert isinstance(inbox.events[-1], Finished)


def test_a_preempted_request_that_is_given_up_leaves_nothing(folder: Path) -> None:
    model = keye.load(folder)
    task = model.core.add(about_clip(model), Inbox())
    while not isinstance(task.state, Generating):
        if not model.core.step():
            model.core.wait_for_work()
    model.core.scheduler.preempt(task)
    assert model.runtime.ledger.used(ACCOUNT) > 0 and model.runtime.ledger.used("kv") == model.runtime.store.nbytes()
    model.core.abort(task)
    assert nothing_held(model)


def test_choices_that_find_no_room_leave_nothing_behind(folder: Path) -> None:
    """Not even while its error is kept."""
    model = keye.load(folder)
    model.runtime.ledger.budget = model.core.scheduler.scratch.least + model.runtime.store.slab_bytes
    (inbox,) = run(model, about_words(model, 800, n=8))
    assert isinstance(inbox.events[-1], Failed) and nothing_held(model)
