"""Ctrl-C ends a step, saves and ends the run; the run goes on as if nothing had happened."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from keye.train.interrupt import Interrupt
from tests.support.training import LANGUAGE, a_run, assert_same_weights, train_nano


def test_a_run_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    steps = []

    def interrupt(figures: dict) -> None:
        steps.append(figures["step"])
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)

    broken = a_run(tmp_path, "broken", LANGUAGE, save_steps=None)
    with pytest.raises(KeyboardInterrupt):
        train_nano(broken, report=interrupt)
    assert steps == [1, 2, 3]  # the step that had begun is the last one
    train_nano(broken, report=lambda figures: steps.append(figures["step"]))
    assert steps == [1, 2, 3, 4, 5]
    train_nano(a_run(tmp_path, "unbroken", LANGUAGE, save_steps=None))
    assert_same_weights(tmp_path / "broken", tmp_path / "unbroken")


def test_the_second_interrupt_comes_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt().listening() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.is_requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_leave_the_signal_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def listen() -> None:
        with Interrupt().listening():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]
