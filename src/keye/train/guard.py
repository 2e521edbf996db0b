"""Watches the loss and the gradient of each step: one that is not finite, or far above what was usual, does not change
the weights silently."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, Final

from keye.errors import KeyeError, KeyeWarning, warn
from keye.train.config import GuardSettings

#: Steps whose losses say what is usual, and how many there must be before anything counts as a spike.
WINDOW: Final = 64
LEAST: Final = 16
#: The spread is taken as at least this share of the median, so that an even loss does not make small changes spikes.
LEAST_SPREAD: Final = 0.02
#: Standard deviation of a normal distribution over its median absolute deviation.
_SCALE: Final = 1.4826


class Guard:
    """Decides for each step whether it is taken. Every process decides the same from the same figures.

    A step whose loss or gradient norm is not finite is left out. A spike is a loss or a norm that lies more than
    `spike` robust standard deviations above the median of the last `WINDOW` steps; `on_spike` says what happens then.
    `KeyeError` after `patience` steps in a row that were left out.
    """

    def __init__(self, settings: GuardSettings, state: Mapping[str, Any]) -> None:
        self.settings = settings
        self._losses = deque[float](state.get("losses", ()), WINDOW)
        self._norms = deque[float](state.get("norms", ()), WINDOW)
        self._left_out = int(state.get("left_out", 0))
        self._counts = {"skipped": 0, "spikes": 0}

    def accepts(self, loss: float, norm: float, place: str) -> bool:
        """Whether the step with these figures is taken; `place` names it in messages."""
        figures = f"loss {loss:.4g}, gradient norm {norm:.4g}"
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return self._leave_out(f"{place}: {figures}: not a number, so the step is left out")
        spread = max(spikes(loss, self._losses), spikes(norm, self._norms))
        if spread > self.settings.spike:
            self._counts["spikes"] += 1
            text = f"{place}: {figures}: {spread:.0f} times the usual spread above the median"
            if self.settings.on_spike == "stop":
                raise KeyeError(f"{text}; resume with a lower learning rate, or set guard.on_spike")
            if self.settings.on_spike == "skip":
                return self._leave_out(f"{text}, so the step is left out")
            warn(KeyeWarning(text))
        self._losses.append(loss)
        self._norms.append(norm)
        self._left_out = 0
        return True

    def _leave_out(self, text: str) -> bool:
        self._left_out += 1
        self._counts["skipped"] += 1
        if self._left_out >= self.settings.patience:
            raise KeyeError(f"{text}; {self._left_out} in a row were: lower the learning rate and resume")
        warn(KeyeWarning(text))
        return False

    def take(self) -> dict[str, float]:
        """How many steps were left out and how many spikes there were since the last call; nothing where none."""
        counts = {name: float(count) for name, count in self._counts.items() if count}
        self._counts = dict.fromkeys(self._counts, 0)
        return counts

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on with, as JSON."""
        return {"losses": list(self._losses), "norms": list(self._norms), "left_out": self._left_out}


def spikes(value: float, usual: deque[float]) -> float:
    """How many robust standard deviations `value` lies above the median of `usual`; 0 where too few are known."""
    if len(usual) < LEAST:
        return 0.0
    middle = median(usual)
    spread = _SCALE * median(abs(each - middle) for each in usual)
    return (value - middle) / max(spread, LEAST_SPREAD * abs(middle), 1e-8)
