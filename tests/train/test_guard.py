"""The guard: steps that are not finite or far from usual are left out, counted and reported."""

import json
import math

import pytest

from keye.errors import KeyeError, KeyeWarning
from keye.train.config import GuardSettings
from keye.train.guard import Guard


def steady(**settings) -> Guard:
    """A guard that has seen 40 losses around 2."""
    guard = Guard(GuardSettings(**settings), {})
    for step in range(40):
        assert guard.accepts(2.0 + 0.1 * math.sin(step), 1.0 + 0.2 * math.cos(step), "read")
    return guard


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (2.0, math.inf), (2.0, math.nan)])
def test_what_is_not_finite_is_left_out_and_counted(loss, norm):
    guard = steady()
    with pytest.warns(KeyeWarning, match="read, step 9: .* so the step is left out"):
        assert not guard.accepts(loss, norm, "read, step 9")
    assert guard.take() == {"skipped": 1.0} and guard.take() == {}
    json.dumps(guard.state(), allow_nan=False)


@pytest.mark.parametrize(("loss", "norm"), [(40.0, 1.0), (2.0, 90.0)])
def test_spikes(loss, norm):
    guard = steady()
    with pytest.warns(KeyeWarning, match="times the usual spread above the median, so the step is left out"):
        assert not guard.accepts(loss, norm, "read, step 9")
    assert guard.take() == {"skipped": 1.0, "spikes": 1.0}
    with pytest.warns(KeyeWarning, match="above the median"):
        assert steady(on_spike="report").accepts(loss, norm, "read, step 9")
    with pytest.raises(KeyeError, match=r"read, step 9: .* resume with a lower learning rate"):
        steady(on_spike="stop").accepts(loss, norm, "read, step 9")


def test_changes_that_are_usual_in_training_are_no_spikes():
    guard = Guard(GuardSettings(), {})
    losses = [8.0 * 0.99**step * (1.3 if step % 7 == 0 else 1.0) for step in range(300)]
    assert all(guard.accepts(loss, 1.0 + loss / 4, "read") for loss in losses)
    even = Guard(GuardSettings(), {})
    assert all(even.accepts(loss, 1.0, "read") for loss in [1.0] * 30 + [1.2])


def test_many_in_a_row_end_the_run():
    guard = steady(patience=3)
    for _ in range(2):
        with pytest.warns(KeyeWarning):
            guard.accepts(math.nan, 1.0, "read")
    with pytest.raises(KeyeError, match="3 in a row were: lower the learning rate and resume"):
        guard.accepts(math.nan, 1.0, "read")


def test_a_resumed_guard_decides_alike():
    guard = steady()
    resumed = Guard(GuardSettings(), json.loads(json.dumps(guard.state())))
    for loss in (2.1, 60.0, 2.0):
        decisions = []
        for each in (guard, resumed):
            if loss > 10:
                with pytest.warns(KeyeWarning):
                    decisions.append(each.accepts(loss, 1.0, "read"))
            else:
                decisions.append(each.accepts(loss, 1.0, "read"))
        assert decisions[0] == decisions[1] == (loss < 10)
