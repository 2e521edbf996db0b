"""Packs are spread over processes by what they cost the vision tower and the decoder."""

import random

import pytest

from keye.train.balance import Load, assign_packs


def worst(loads, packs, field):
    """How much more than its share the busiest process does."""
    sums = [sum(getattr(loads[number], field) for number in own) for own in packs]
    return max(sums) * len(packs) / max(1, sum(sums))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_both_parts_are_balanced(size):
    rng = random.Random(size)
    loads = [
        Load(length := rng.randint(500, 8000), int(length * rng.choice([0, 0, 0.5, 0.9]))) for _ in range(6 * size)
    ]
    packs = assign_packs(loads, size)
    in_turn = [list(range(rank, len(loads), size)) for rank in range(size)]
    assert sorted(number for own in packs for number in own) == list(range(len(loads)))
    assert {len(own) for own in packs} == {6}
    assert max(worst(loads, packs, field) for field in ("tokens", "media")) < 1.25
    assert worst(loads, packs, "media") < worst(loads, in_turn, "media")
    assert packs == assign_packs(loads, size)


def test_fewer_packs_than_processes_and_none():
    assert assign_packs([Load(5, 0), Load(9, 3)], 3) == [[1], [0], []]
    assert assign_packs([], 2) == [[], []]


def test_the_heaviest_come_first_everywhere():
    packs = assign_packs([Load(n, 0) for n in (1, 8, 2, 7, 3, 6)], 2)
    assert [number for own in packs for number in own[:1]] == [1, 3]
