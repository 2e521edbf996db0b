"""Work beside the engine: everybody gets a turn, nobody works while another does, and it ends between pieces."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import keye
from keye import Frames, Keye
from keye.chat.messages import Message
from keye.engine.request import Inbox
from keye.engine.turns import FairLock
from tests.support.tiny import tiny_folder

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 56, 56, 3), dtype=np.uint8)
TIMES = tuple(i / 2 for i in range(40))
VIDEO = Frames(PIXELS, TIMES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Keye:
    return keye.load(tiny_folder(tmp_path_factory.mktemp("models") / "tiny"), dtype="float32")


def test_the_lock_goes_to_who_waited_longest() -> None:
    lock, order, threads = FairLock(), list[int](), list[threading.Thread]()

    def work(number: int) -> None:
        with lock:
            order.append(number)

    with lock:
        for number in range(5):
            threads.append(threading.Thread(target=work, args=(number,)))
            threads[-1].start()
            while len(lock._waiting) <= number:
                pass  # until it stands in the line
        assert not lock.acquire(blocking=False)
    # Released and taken again at once, as the engine does from step to step: those in the line come first.
    with lock:
        assert order == [0, 1, 2, 3, 4]
    for thread in threads:
        thread.join()


def test_no_step_runs_while_an_index_works(model: Keye, tmp_path: Path) -> None:
    free: list[bool] = []

    @contextmanager
    def turn() -> Iterator[None]:
        with model.turn():
            free.append(model.core.stepping.acquire(blocking=False))
            yield

    model.index(VIDEO, tmp_path / "video.keye", turn=turn)
    assert len(free) > 2 and not any(free)
    assert model.core.stepping.acquire(blocking=False), "afterwards it is free"
    model.core.stepping.release()


def test_an_index_is_ended_between_pieces(model: Keye, tmp_path: Path) -> None:
    before, pieces = model.runtime.ledger.accounts(), 0

    @contextmanager
    def turn() -> Iterator[None]:
        nonlocal pieces
        if pieces == 2:
            raise InterruptedError
        pieces += 1
        with model.turn():
            yield

    with pytest.raises(InterruptedError):
        model.index(VIDEO, tmp_path / "video.keye", turn=turn)
    gc.collect()
    assert list(tmp_path.iterdir()) == [] and model.runtime.ledger.accounts() == before


def test_an_abort_during_a_piece_is_cleaned_up_after_it(model: Keye) -> None:
    request = model.request([Message("user", ("hello",))], max_tokens=4)
    task = model.core.add(request, Inbox())
    with model.turn():
        model.core.abort(task)
        assert not model.core.is_idle()
    assert model.core.is_idle()


def test_frames_may_come_between_a_question_and_its_answer(model: Keye) -> None:
    """A question is about what was seen when it was asked."""
    session, other = (model.live(resized_height=56, resized_width=56) for _ in range(2))
    for one in (session, other):
        one.append(PIXELS[:8], TIMES[:8])
    asked = session.stream_ask("what is this?", max_tokens=6)
    session.append(PIXELS[8:], TIMES[8:])
    assert asked.finish().text == other.ask("what is this?", max_tokens=6).text
