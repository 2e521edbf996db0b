"""Progress of long work on standard error: a bar with share and time left on a terminal, elsewhere a line at times."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

from keye.commands.shared.inputs import note, stderr

if TYPE_CHECKING:
    from keye.engine.request import Progress as Step

#: Seconds between two lines where standard error is no terminal, and those before the first time left is told.
LINE_SECONDS: Final = 5.0
FIRST_SECONDS: Final = 3.0


def time_left(seconds: float) -> str:
    """Seconds left for people, rounded up: "about 40 s left", "6 min left"."""
    if seconds < 90:
        return f"about {max(1, math.ceil(seconds / 5) * 5 if seconds > 10 else math.ceil(seconds))} s left"
    if seconds < 5400:
        return f"{math.ceil(seconds / 60)} min left"
    return f"{seconds / 3600:.1f} h left"


class Share:
    """How much of the work before a reply is done: visual tokens encoded and prompt tokens computed, together."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._begin = clock, clock()
        self._done: dict[str, tuple[int, int]] = {}
        self.share = 0.0

    def add(self, phase: str, done: int, total: int) -> None:
        """Takes the state of a phase; the share never falls."""
        self._done[phase] = (done, total)
        whole = sum(total for _, total in self._done.values())
        if whole:
            self.share = max(self.share, sum(done for done, _ in self._done.values()) / whole)

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._begin

    def __str__(self) -> str:
        """The share, and the time left once it can be known."""
        if not self.share or self.seconds < FIRST_SECONDS:
            return f"{self.share:.0%}"
        return f"{self.share:.0%}, {time_left(self.seconds * (1 - self.share) / self.share)}"


@contextmanager
def watching(title: str) -> Iterator[Callable[[Step], None]]:
    """Yields what takes the engine's progress on one request or index and shows it; gone when the block ends, or once
    all is computed, so that the reply can be printed."""
    console, share = stderr(), Share()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
               TextColumn("{task.fields[left]}"))  # fmt: skip
    told = 0.0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, left="")

        def show(step: Step) -> None:
            nonlocal told
            if step.phase == "media":  # of unknown length
                return
            share.add(step.phase, step.done, step.total)
            if console.is_terminal:
                bar.update(task, completed=share.share, total=1.0, left=str(share).partition(", ")[2])
                if share.share == 1.0:
                    bar.stop()
            elif share.seconds - told >= LINE_SECONDS and share.share < 1.0:
                told = share.seconds
                note(f"{title}: {share}")

        yield show
