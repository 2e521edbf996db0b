"""The engine for programs with an event loop: clients come, wait, leave and are turned away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from keye import Keye, KeyeError
from keye.chat.messages import Message
from keye.engine.async_engine import AsyncEngine, Overloaded
from keye.engine.request import Delta, Finished, Progress
from keye.engine.step import Slice, run_slices
from keye.models.keye import KeyeModel
from tests.support.engine import TEXT, about, clip, conversation, generate_alone, greedy, is_clean


def run_async(model: Keye, work: Callable[[AsyncEngine], Any]) -> Any:
    engine = AsyncEngine(model.engine)
    engine.start()
    try:
        return asyncio.run(work(engine))
    finally:
        engine.close()


def test_many_clients_at_once(model: Keye) -> None:
    questions = [conversation(s) for s in range(6)]

    async def client(engine: AsyncEngine, messages: list[Message]) -> list[int]:
        tokens: list[int] = []
        async for event in engine.run(greedy(model, messages, 8)):
            if isinstance(event, Delta):
                tokens += event.tokens
        return tokens

    async def all_clients(engine: AsyncEngine) -> list[list[int]]:
        return await asyncio.gather(*(client(engine, messages) for messages in questions))

    assert run_async(model, all_clients) == [generate_alone(model, messages, 8) for messages in questions]
    assert model.chat(questions[0], max_tokens=2).usage.completion_tokens > 0, "the model outlives the engine"
    assert run_async(model, all_clients) == [generate_alone(model, messages, 8) for messages in questions]


def test_client_disconnect_releases_memory(model: Keye) -> None:
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


def test_a_submitted_request_can_be_aborted_or_dropped(model: Keye) -> None:
    async def submit(engine: AsyncEngine) -> None:
        running = engine.submit(greedy(model, conversation(1), 400))
        assert await running.next_events()
        running.abort()
        running.abort()
        assert await running.next_events() is None
        del running
        engine.submit(greedy(model, conversation(2), 400))  # dropped at once
        assert await engine.drain(5.0)

    run_async(model, submit)
    model.clear_caches()
    assert model.runtime.ledger.used() == 0


def test_too_many_requests_are_rejected_and_progress_is_reported(model: Keye) -> None:
    async def crowd(engine: AsyncEngine) -> list[Any]:
        engine.most_requests = 1
        first = engine.run(greedy(model, conversation(1), 4))
        events = [await anext(first)]
        with pytest.raises(Overloaded, match="1 requests are waiting or running"):
            await anext(engine.run(greedy(model, conversation(2), 4)))
        events += [event async for event in first]
        assert engine.gauges()["computed_reply_tokens_total"] >= 3
        return events

    phases = [event.phase for event in run_async(model, crowd) if isinstance(event, Progress)]
    assert phases[0] == "media" and "encode" in phases and phases[-1] == "prefill"


def test_closing_fails_requests_that_wait(model: Keye) -> None:
    async def closed(engine: AsyncEngine) -> None:
        events = engine.run(greedy(model, about(clip(1)), 4000))
        await anext(events)
        await asyncio.to_thread(engine.close)
        with pytest.raises(KeyeError, match="is ending before the request was complete"):
            async for _ in events:
                pass

    run_async(model, closed)
    assert is_clean(model)
    assert model.chat(TEXT, max_tokens=1).usage.completion_tokens <= 1, "the model goes on without that engine"


def test_a_defect_in_a_step_fails_its_requests_and_the_thread_goes_on(model: Keye) -> None:
    broken = iter([True])

    def fail_once(network: KeyeModel, slices: Sequence[Slice]) -> list[torch.Tensor | None]:
        if next(broken, False):
            raise AssertionError("a defect")
        return run_slices(network, slices)

    model.core.run_slices = fail_once

    async def both(engine: AsyncEngine) -> list[Any]:
        with pytest.raises(AssertionError, match="a defect"):
            async for _ in engine.run(greedy(model, TEXT)):
                pass
        return [event async for event in engine.run(greedy(model, TEXT))]

    assert isinstance(run_async(model, both)[-1], Finished)
