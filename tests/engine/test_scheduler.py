"""How the time of a step is shared: replies go on, and no prompt starves."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest

from keye import Keye
from keye.engine.core import AHEAD
from keye.engine.request import Failed, Finished, LoadingMedia, Ready
from keye.engine.scheduler import MOST_STRETCH, STRETCH, StepTimer, split_budget
from keye.engine.step import LEAST_TOKENS
from keye.media.processor import Processor
from tests.support.engine import TEXT, about, add, clip, greedy, run, step, tokens_of


def test_shares_are_equal_and_the_budget_is_used_up() -> None:
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


def test_prompts_get_what_replies_can_spare() -> None:
    timer = StepTimer()
    assert timer.token_budget(0) > timer.token_budget(4)
    timer.record_step(0.010, 4, 0)
    timer.record_step(0.110, 4, 100)
    assert LEAST_TOKENS <= timer.token_budget(4) < 100
    timer.record_step(5.0, 4, 100)
    assert timer.token_budget(4) == LEAST_TOKENS


def test_no_prompt_starves_whatever_the_steps_take() -> None:
    """Prompts come all the time while others write, on a machine of changing speed: each is complete in time."""
    rng = random.Random(0)
    timer, waiting, begun, number = StepTimer(), dict[int, int](), dict[int, int](), 0
    total, longest = 0, 0
    for number_of_step in range(4000):
        if rng.random() < 0.02 and len(waiting) < 40:
            waiting[number], begun[number] = rng.choice([3, 40, 400, 4000]), number_of_step
            number += 1
        writing = rng.choice([0, 1, 8, 32])
        budget = timer.token_budget(writing, len(waiting))
        shares = split_budget(list(waiting.items()), budget)
        assert not waiting or sum(shares.values()) == min(budget, sum(waiting.values())) > 0
        for who, share in shares.items():
            waiting[who] -= share
            if not waiting[who]:
                longest = max(longest, number_of_step - begun[who])
                total += 1
                del waiting[who]
        prompt = sum(shares.values())
        slow = rng.choice([1.0, 1.0, 3.0])
        timer.record_step(slow * (0.010 + 0.0001 * writing + 0.0002 * prompt), writing, prompt)
    assert total > 50 and number - total < 15
    assert longest < 2000


def test_a_step_with_prompts_is_not_much_longer_than_one_without() -> None:
    timer = StepTimer()
    for _ in range(50):
        timer.record_step(0.020, 4, 0)
        budget = timer.token_budget(4)
        timer.record_step(0.020 + 0.0001 * budget, 4, budget)
    assert 0.020 + 0.0001 * timer.token_budget(4) <= STRETCH * 0.020 * 1.01


def test_where_prompts_outnumber_replies_a_step_is_longer_but_bounded() -> None:
    timer = StepTimer()
    for _ in range(50):
        timer.record_step(0.020, 4, 0)
        timer.record_step(0.020 + 0.0001 * 100, 4, 100)
    assert timer.token_budget(4, 4) == timer.token_budget(4, 1) < timer.token_budget(4, 8) < timer.token_budget(4, 1000)
    assert 0.020 + 0.0001 * timer.token_budget(4, 1000) <= MOST_STRETCH * 0.020 * 1.01


def test_where_there_is_not_a_token_for_each_short_prompts_do_not_wait_for_long_ones() -> None:
    """Nor do long ones wait for ever: the oldest always goes on."""
    waiting = [*((number, 100_000) for number in range(20)), (20, 3), (21, 2)]
    assert split_budget(waiting, 4) == {0: 1, 21: 1, 20: 1, 1: 1}
    assert split_budget(waiting, 1) == {0: 1} and split_budget(waiting, 0) == {}


def test_few_media_are_open_before_their_turn(model: Keye) -> None:
    """Pictures that wait are held in memory."""
    model.core.scheduler.most_running, most = 1, 0
    inboxes = [add(model, greedy(model, about(clip(seed % 3)), 2)) for seed in range(30)]
    while not model.core.is_idle():
        step(model)
        most = max(most, sum(isinstance(task.state, LoadingMedia | Ready) for task in model.core.tasks))
    assert most == AHEAD and all(len(tokens_of(inbox)) == 2 for inbox in inboxes)


def test_slow_media_delay_no_other_request(model: Keye, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a prompt of words behind more slow media than there are threads for them."""
    come = threading.Event()
    frames = Processor.frames

    def slow(self: Processor, *args: Any) -> Any:
        if threading.current_thread().name.startswith("keye-media"):
            come.wait()
        return frames(self, *args)

    monkeypatch.setattr(Processor, "frames", slow)
    waiting = [add(model, greedy(model, about(clip(seed)))) for seed in range(12)]
    words = add(model, greedy(model, TEXT))
    while not (words.events and isinstance(words.events[-1], Finished | Failed)):
        step(model)
    assert tokens_of(words) and not any(isinstance(event, Finished) for inbox in waiting for event in inbox.events)
    come.set()
    run(model)
    assert [len(tokens_of(inbox)) for inbox in waiting] == [6] * 12
