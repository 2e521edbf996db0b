"""How busy other programs keep the processors while something is measured here. Reads /proc, which not all systems
have."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

#: Processors that others may keep busy before a measurement is doubtful.
MOST_OTHERS: Final = 0.1
_PROC: Final = Path("/proc")


class Company:
    """Begins to watch when it is made."""

    def __init__(self) -> None:
        self._begin, self._before = time.perf_counter(), self._seconds()

    def others(self) -> float | None:
        """Processors, of those that we may use, that other programs have kept busy on average since the beginning."""
        now = self._seconds()
        if now is None or self._before is None:
            return None
        busy, ours = (after - before for after, before in zip(now, self._before, strict=True))
        return round(max(0.0, busy - ours) / max(1e-9, time.perf_counter() - self._begin), 3)

    @staticmethod
    def _seconds() -> tuple[float, float] | None:
        """Seconds that our processors were busy with anything, and with this process and those that it started."""
        try:
            tick, mine = os.sysconf("SC_CLK_TCK"), {f"cpu{number}" for number in os.sched_getaffinity(0)}
            busy = 0
            for line in (_PROC / "stat").read_text().splitlines():
                name, *values = line.split()
                if name in mine:
                    user, nice, system, _, _, irq, softirq, steal = map(int, values[:8])
                    busy += user + nice + system + irq + softirq + steal
            return busy / tick, _family_ticks(os.getpid()) / tick
        except (OSError, AttributeError, ValueError):
            return None


def _family_ticks(root: int) -> int:
    """Ticks of a process, those that it started, and those of them that have ended."""
    parents, ticks = dict[int, int](), dict[int, int]()
    for folder in _PROC.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        number = int(folder.name)
        parents[number], ticks[number] = int(fields[1]), sum(map(int, fields[11:15]))
    family, grown = {root}, True
    while grown:
        more = {number for number, parent in parents.items() if parent in family} - family
        family, grown = family | more, bool(more)
    return sum(ticks.get(number, 0) for number in family)
