"""What a step computes: pure decisions over numbers. Knows no tensors.

Everything that writes goes on in every step. What is left of the step's time goes to prompts, in equal shares, so that
a long prompt delays neither those that write nor short prompts behind it, and is itself never passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

#: Prompt tokens of a step in which nothing is written, and the fewest of one in which something is.
ALONE_TOKENS: Final = 1024
LEAST_TOKENS: Final = 32
#: How much longer than a step of writing alone one with prompts in it may take, as a factor: for one prompt beside any
#: number of replies, and at most, where the prompts outnumber the replies.
STRETCH: Final = 1.6
MOST_STRETCH: Final = 3.0
#: Weight of the newest measurement.
_NEWEST: Final = 0.2


def share_out(waiting: Sequence[tuple[int, int]], budget: int) -> dict[int, int]:
    """Prompt tokens of a step for each of `waiting`: (number, tokens that could be computed) of prompts, the oldest
    first. Equal shares of `budget`; what one does not need goes to the others, the oldest first. Whoever is there gets
    at least one token if the budget has one for each; if not, the oldest and those who need least."""
    if budget <= 0:
        return {}
    if budget < len(waiting):
        oldest, *others = waiting
        return {number: 1 for number, _ in [oldest, *sorted(others, key=lambda one: one[1])[: budget - 1]]}
    left, shares = budget, dict[int, int]()
    youngest_first = [*reversed(waiting)]
    by_need = sorted(youngest_first, key=lambda one: one[1])  # of equals the oldest comes last, and gets the rest
    for place, (number, need) in enumerate(by_need):
        share = min(need, left // (len(by_need) - place))
        shares[number] = share
        left -= share
    for number, need in waiting:
        more = min(need - shares[number], left)
        shares[number] += more
        left -= more
    return {number: share for number, share in shares.items() if share}


@dataclass
class Pace:
    """Measured times of steps, from which the budget follows: `step` seconds of a step of writing alone, `token`
    seconds that a prompt token adds, `patch` seconds of a patch."""

    step: float | None = None
    token: float | None = None
    patch: float | None = None
    _alone: bool = field(default=False, repr=False)

    def budget(self, writing: int, prompts: int = 1) -> int:
        """Prompt tokens of the next step, beside `writing` replies. The more of the `prompts` wait for each reply, the
        longer it may be: of many that come together the first would otherwise hold up all others."""
        if not writing:
            return ALONE_TOKENS
        if self.step is None or not self.token:
            return LEAST_TOKENS * 4
        stretch = min(1 + (STRETCH - 1) * max(1.0, prompts / writing), MOST_STRETCH)
        spare = (stretch - 1) * self.step
        return max(LEAST_TOKENS, min(ALONE_TOKENS, int(spare / self.token)))

    def patches(self, writing: int) -> int:
        """Patches to encode in the next step; the encoder takes whole groups."""
        if not writing or self.step is None or not self.patch:
            return 1 << 14 if not writing else 1
        return max(1, int((STRETCH - 1) * self.step / self.patch))

    def saw_step(self, seconds: float, writing: int, prompt: int) -> None:
        """A step with `writing` tokens of replies and `prompt` tokens of prompts took so long."""
        if writing and not prompt:
            self.step = _mixed(self.step, seconds)
        elif prompt >= LEAST_TOKENS:
            beside = (self.step or 0.0) if writing else 0.0
            self.token = _mixed(self.token, max(1e-7, seconds - beside) / prompt)

    def saw_patches(self, seconds: float, patches: int) -> None:
        """Encoding `patches` took so long."""
        self.patch = _mixed(self.patch, seconds / patches)


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else (1 - _NEWEST) * old + _NEWEST * new
