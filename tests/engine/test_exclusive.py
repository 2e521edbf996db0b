"""Several threads on one engine: one steps at a time, none while another works exclusively; indexes are requests."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import pytest

import keye
from keye import Frames, Keye
from keye.chat.messages import Message
from keye.engine.request import Progress
from tests.support.engine import Inbox, conversation
from tests.support.tiny import tiny_folder

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 56, 56, 3), dtype=np.uint8)
TIMES = tuple(i / 2 for i in range(40))
VIDEO = Frames(PIXELS, TIMES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Keye:
    return keye.load(tiny_folder(tmp_path_factory.mktemp("models") / "tiny"), dtype="float32")


def test_no_step_runs_while_a_thread_works_exclusively(model: Keye) -> None:
    inbox = Inbox()
    model.core.add(model.request([Message("user", ("hello",))], max_tokens=4), inbox)
    with model.engine.exclusive():
        assert not model.core.step() and not model.core.step() and not inbox.events
    while not model.core.is_idle():
        model.core.step()
    assert inbox.events


def test_exclusive_work_comes_between_the_steps_of_another_thread(model: Keye) -> None:
    """Also where that thread steps without a pause."""
    done = threading.Event()

    def step() -> None:
        while not done.is_set():
            model.core.step()

    thread = threading.Thread(target=step)
    thread.start()
    try:
        for _ in range(20):
            with model.engine.exclusive():
                assert not model.core.step()
    finally:
        done.set()
        thread.join()


def test_answers_of_several_threads_are_those_of_one(model: Keye) -> None:
    expected = [model.chat(conversation(seed), max_tokens=6).text for seed in range(4)]
    answers = [""] * 4

    def ask(seed: int) -> None:
        answers[seed] = model.chat(conversation(seed), max_tokens=6).text

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == expected and model.core.is_idle()


def test_an_index_is_computed_beside_other_requests(model: Keye, tmp_path: Path) -> None:
    inbox, running = Inbox(), list[bool]()
    model.core.add(model.request([Message("user", ("hello",))], max_tokens=200, ignore_eos=True), inbox)
    model.index(VIDEO, tmp_path / "video.keye", on_progress=lambda _: running.append(not model.core.is_idle()))
    assert len(running) >= 2 and all(running) and inbox.events, "the request has gone on meanwhile"
    while not model.core.is_idle():
        model.core.step()


def test_an_index_is_ended_by_its_progress(model: Keye, tmp_path: Path) -> None:
    pieces = 0

    def stop(_: Progress) -> None:
        nonlocal pieces
        pieces += 1
        if pieces == 2:
            raise InterruptedError

    model.clear_caches()
    before = model.runtime.ledger.accounts()
    with pytest.raises(InterruptedError):
        model.index(VIDEO, tmp_path / "video.keye", on_progress=stop)
    gc.collect()
    model.clear_caches()
    assert list(tmp_path.iterdir()) == [] and model.runtime.ledger.accounts() == before


def test_an_abort_during_exclusive_work_is_cleaned_up_after_it(model: Keye) -> None:
    request = model.request([Message("user", ("hello",))], max_tokens=4)
    task = model.core.add(request, Inbox())
    with model.engine.exclusive():
        model.core.abort(task)
        assert not model.core.is_idle()
    assert model.core.is_idle()


def test_frames_may_come_between_a_question_and_its_answer(model: Keye) -> None:
    """A question is about what was seen when it was answer."""
    session, other = (model.live(resized_height=56, resized_width=56) for _ in range(2))
    for live in (session, other):
        live.append(PIXELS[:8], TIMES[:8])
    answer = session.stream_ask("what is this?", max_tokens=6)
    session.append(PIXELS[8:], TIMES[8:])
    assert answer.finish().text == other.ask("what is this?", max_tokens=6).text
