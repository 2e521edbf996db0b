"""Requests in little memory: caches are evicted and requests preempted; nothing is lost, and everything released."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import keye
from keye import Keye, KeyeError
from keye.cache.ledger import OutOfMemory
from keye.cache.slabs import FILE_BLOCKS
from keye.chat.messages import Message
from keye.engine.request import Delta, Finished, Generating
from keye.engine.scheduler import StepTimer, is_fragmented
from keye.models.keye import KeyeModel
from tests.support.engine import (
    Inbox,
    about,
    add,
    clip,
    conversation,
    generate_alone,
    greedy,
    is_clean,
    lay_out,
    memory_for,
    run,
    run_together,
    step,
    tokens_of,
)


def test_too_little_memory_delays_and_loses_nothing(load: Callable[..., Keye]) -> None:
    model = load()
    model.runtime.ledger.budget = memory_for(model, 3)
    long = [[Message("user", ("word " * 700 + str(i),))] for i in range(4)]
    sampled = [greedy(model, messages, 8, temperature=1.0, seed=3) for messages in long]
    got, _ = run_together(model, sampled)
    model.runtime.ledger.budget = None
    model.clear_caches()
    free, _ = run_together(load(), sampled)
    assert got == free
    assert model.runtime.ledger.used() == 0


def test_a_prompt_that_never_fits_is_rejected_with_what_would_fit(model: Keye, monkeypatch: pytest.MonkeyPatch) -> None:
    model.runtime.ledger.budget = memory_for(model, 1)

    def fail(*_: Any) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(KeyeModel, "encode_vision", fail)
    with pytest.raises(
        OutOfMemory, match=r"memory budget leaves [\d.]+ [KM]iB, enough for 1,024 tokens.*max_frames.*kv=int4"
    ):
        model.chat([Message("user", ("word " * 3000,))], max_tokens=4)
    assert model.runtime.ledger.used() == 0


def test_prefixes_are_evicted_for_requests_that_need_the_memory(model: Keye) -> None:
    for seed in range(12):
        model.chat([Message("user", ("word " * 300 + str(seed),))], max_tokens=1)
    assert len(model.runtime.prefixes) == 12
    slabs = model.runtime.store.nbytes() // model.runtime.store.slab_bytes
    model.runtime.ledger.budget = memory_for(model, slabs)
    model.chat([Message("user", ("other " * 300,))], max_tokens=1)
    assert len(model.runtime.prefixes) < 13 and model.runtime.store.nbytes() <= slabs * model.runtime.store.slab_bytes


def test_visual_tokens_wait_for_memory(model: Keye) -> None:
    """Two clips whose visual tokens do not fit beside each other, nor beside all keys and values."""
    model.runtime.vision_cache.budget = 0
    questions = [about(clip(seed, 60)) for seed in range(3)]
    expected = [generate_alone(model, messages) for messages in questions]
    item = 60 * 4 * model.config.text.hidden_size * 4  # bytes of the visual tokens of a clip
    model.runtime.ledger.budget = 2 * model.runtime.store.slab_bytes + item // 2 + model.core.scheduler.scratch.least
    inboxes = [add(model, greedy(model, messages)) for messages in questions]
    run(model)
    assert [tokens_of(inbox) for inbox in inboxes] == expected
    assert is_clean(model)


def test_a_fragmented_request_is_preempted_once_before_it_fails(model: Keye) -> None:
    """Its blocks lie in two slabs because another was there first; in one it has room."""
    messages = [Message("user", ("word " * 500,))]
    other = add(model, greedy(model, [Message("user", ("a " * 700,))], 30))
    while not any(isinstance(task.state, Generating) for task in model.core.tasks):
        step(model)
    inbox = add(model, greedy(model, messages, 12))
    while not all(isinstance(task.state, Generating) for task in model.core.tasks):
        step(model)
    model.core.abort(model.core.tasks[0])
    model.clear_caches()
    task = model.core.tasks[0]
    slabs = model.runtime.store.nbytes() // model.runtime.store.slab_bytes
    assert is_fragmented(task.state) and slabs == 2 and not isinstance(other.events[-1], Finished)
    model.runtime.ledger.budget = model.runtime.store.slab_bytes + model.core.scheduler.scratch.least

    def full() -> None:
        if not task.retried:
            raise OutOfMemory("full")

    assert model.core.scheduler.make_room(full, task) is None and task.retried
    run(model)
    assert tokens_of(inbox) == generate_alone(model, messages, 12)
    assert is_clean(model)


def test_the_choices_of_a_request_may_preempt_a_younger_prompt(model: Keye, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older's prompt is complete in the very step that computes a part of the younger's."""
    old, young = [Message("user", ("word " * 60,))], [Message("user", ("other " * 30,))]
    expected = generate_alone(model, old), generate_alone(model, young)
    monkeypatch.setattr(StepTimer, "token_budget", lambda *_: 120)
    model.runtime.ledger.budget = model.runtime.store.slab_bytes + model.core.scheduler.scratch.least
    # Laid out before, so that both begin in the same step however slow the thread that would do it.
    first, second = (add(model, lay_out(model, item)) for item in (greedy(model, old, n=13), greedy(model, young)))
    run(model)
    assert model.core.scheduler.preemptions > 0
    assert (tokens_of(first), tokens_of(second)) == expected
    assert is_clean(model)


def test_a_mapped_store_is_not_bound_by_the_memory_budget(folder: Path, tmp_path: Path) -> None:
    """Only the indexer keys are in memory; keys and values lie on the disk."""
    model = keye.load(folder, dtype="float32", kv_tier="file", kv_folder=tmp_path)
    text = [Message("user", ("word " * 300,))]
    near = FILE_BLOCKS * model.runtime.store.layout.scanned_block_bytes
    model.runtime.ledger.budget = near + model.core.scheduler.scratch.least
    assert near < model.runtime.store.slab_bytes
    inbox = add(model, greedy(model, text, 2))
    run(model)
    assert len(tokens_of(inbox)) == 2
    model.clear_caches()
    model.runtime.ledger.budget = near - 1 + model.core.scheduler.scratch.least
    with pytest.raises(KeyeError, match="enough for 0 tokens"):
        model.chat(text, max_tokens=2)


# Preemption


def test_preempted_requests_resume_where_they_were(model: Keye) -> None:
    questions = [conversation(seed) for seed in range(4)]
    inboxes = [Inbox() for _ in questions]
    tasks = [
        model.core.add(greedy(model, messages, 10), inbox) for messages, inbox in zip(questions, inboxes, strict=True)
    ]
    steps = 0
    while not model.core.is_idle():
        step(model)
        steps += 1
        writing = [task for task in tasks if isinstance(task.state, Generating)]
        if steps % 3 == 0 and writing:
            model.core.scheduler.preempt(writing[steps % len(writing)])
    got = [[t for e in inbox.events if isinstance(e, Delta) for t in e.tokens] for inbox in inboxes]
    assert got == [generate_alone(model, messages, 10) for messages in questions]
    assert model.core.scheduler.preemptions > 3


def test_evidence_and_probabilities_survive_a_preemption(model: Keye) -> None:
    """Evidence and the probabilities of the prompt are those of an undisturbed run."""

    def questions(disturbed: bool) -> Finished:
        inbox = add(model, replace(greedy(model, about(clip(1)), 8, evidence=True), prompt_logprobs=0))
        steps = 0
        while not model.core.is_idle():
            if not model.core.step():
                model.core.wait_for_work()
                continue
            steps += 1
            for task in model.core.tasks if disturbed and steps in (2, 6) else ():
                model.core.scheduler.preempt(task)
        return inbox.events[-1]  # type: ignore[return-value]

    plain = questions(disturbed=False)
    model.clear_caches()
    again = questions(disturbed=True)
    assert model.core.scheduler.preemptions >= 1
    assert plain.evidence is not None and again.evidence is not None
    assert again.evidence.steps == plain.evidence.steps == 8
    assert again.evidence.media[0].shares == pytest.approx(plain.evidence.media[0].shares)
    assert len(again.prompt_probs or ()) == len(plain.prompt_probs or ()) == plain.prompt_tokens - 1


def test_deterministic_replies_survive_a_preemption_to_the_last_bit(folder: Path) -> None:
    """In bfloat16, where the shape of a product decides its last bits."""
    model = keye.load(folder)

    def probabilities(disturbed: bool) -> list[float]:
        inbox = add(model, greedy(model, about(clip(1, 30)), 16, deterministic=True, logprobs=0))
        steps = 0
        while not model.core.is_idle():
            step(model)
            steps += 1
            for task in model.core.tasks if disturbed and steps >= 7 and writes(model) else ():
                model.core.scheduler.preempt(task)
                disturbed = False
        return [prob.logprob for event in inbox.events if isinstance(event, Delta) for prob in event.probs]

    plain = probabilities(disturbed=False)
    assert probabilities(disturbed=True) == plain and len(plain) == 16 and model.core.scheduler.preemptions == 1


def writes(model: Keye) -> bool:
    return any(isinstance(task.state, Generating) for task in model.core.tasks)


def test_memory_below_the_scratch_of_a_step_is_an_error_of_one_sentence(folder: Path) -> None:
    model = keye.load(folder, dtype="float32", memory="3KiB")
    with pytest.raises(KeyeError, match="memory budget"):
        model.chat([Message("user", ("hello",))], max_tokens=2)
    assert model.runtime.ledger.used() == 0
