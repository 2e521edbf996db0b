"""Which process learns from which pack of a step, so that all are done at about the same time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Load(NamedTuple):
    """What a pack costs: `tokens` in the decoder, `media` (visual tokens) in the vision tower."""

    tokens: int
    media: int


def assign_packs(loads: Sequence[Load], size: int) -> list[list[int]]:
    """The numbers of the packs of each of `size` processes, the heaviest first: the same for the same loads.

    Tower and decoder are balanced together: the heaviest pack first, each goes to the process in which the greater of
    the two shares of work stays least. Processes get as many packs as one another, or one less: they wait for each
    other after each, so packs that are learnt at the same time have similar loads.
    """
    tokens, media = (max(1, sum(column)) for column in zip(*loads, strict=True)) if loads else (1, 1)

    def weight(number: int) -> float:
        return max(loads[number].tokens / tokens, loads[number].media / media)

    most = -(-len(loads) // size)
    packs: list[list[int]] = [[] for _ in range(size)]
    shares = [[0.0, 0.0] for _ in range(size)]
    for number in sorted(range(len(loads)), key=lambda number: (-weight(number), number)):
        added = loads[number].tokens / tokens, loads[number].media / media

        def after(process: int, added: tuple[float, float] = added) -> tuple[float, float]:
            sums = [share + more for share, more in zip(shares[process], added, strict=True)]
            return max(sums), sum(sums)

        open_processes = [process for process in range(size) if len(packs[process]) < most]
        process = min(open_processes, key=lambda process: (*after(process), process))
        packs[process].append(number)
        shares[process] = [share + more for share, more in zip(shares[process], added, strict=True)]
    return packs
