"""A reply that repeats itself without end is stopped and said to be one."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keye.engine.sampling import LOOP_INTERVAL, is_loop


def first_stop(reply: Sequence[int], max_tokens: int) -> int | None:
    """After how many tokens the reply would have been stopped."""
    return next((n for n in range(1, len(reply) + 1) if is_loop(reply[:n], max_tokens)), None)


@pytest.mark.parametrize(
    ("period", "max_tokens", "most"),
    [(1, 128, 80), (6, 128, 112), (12, 512, 320), (30, 4096, 320), (60, 4096, 1100), (120, 4096, 1180)],
)
def test_repetitions_are_found_soon(period: int, max_tokens: int, most: int) -> None:
    reply = [*range(500, 510), *(i % period for i in range(3000))]
    assert 48 <= first_stop(reply, max_tokens) <= most


def test_lists_are_no_loops() -> None:
    """Rows of a table with numbers of their own, and a few equal rows, may go on."""
    chance = random.Random(0)
    table = [token for row in range(300) for token in (1, 2, chance.randrange(10, 20), 3, row % 10 + 30, 4)]
    assert first_stop(table, 4096) is None
    assert first_stop([*([7, 8, 9] * 7), *range(100, 400)], 4096) is None


@given(st.lists(st.integers(0, 3), max_size=300), st.integers(1, 4096))
def test_only_repetitions_are_found(reply: list[int], max_tokens: int) -> None:
    if is_loop(reply, max_tokens):
        assert len(reply) % LOOP_INTERVAL == 0
        length = min(max(48, max_tokens // 2), 256)
        assert any(
            len(reply) >= n and reply[-n:] == (reply[-n : -n + period] * n)[:n]
            for n in (length, 4 * length)
            for period in range(1, n // 8 + 1)
        )
