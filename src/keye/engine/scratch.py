"""Memory for the activations of a step: a smallest share is held as long as anything runs, so that keys and values
never take its place; more is taken for one step where it is free. Knows slices and the ledger, not requests."""

from __future__ import annotations

from collections.abc import Sequence

from keye.cache.ledger import Ledger
from keye.engine.step import Slice, scratch_bytes, smallest_scratch
from keye.models.keye import KeyeModel

#: The ledger's account.
ACCOUNT = "scratch"


class Scratch:
    """The scratch of one engine. `smallest` bytes are enough for a few rows with the logits of each."""

    def __init__(self, model: KeyeModel, ledger: Ledger) -> None:
        self._model, self._ledger = model, ledger
        self.smallest = smallest_scratch(model)
        self.held = False

    def hold(self) -> bool:
        """Takes the smallest share, unless it is held; `OutOfMemory` where it is not free."""
        if not self.held:
            self._ledger.reserve(ACCOUNT, self.smallest)
            self.held = True
        return True

    def let_go(self) -> None:
        """Gives the smallest share back."""
        if self.held:
            self._ledger.release(ACCOUNT, self.smallest)
            self.held = False

    def take(self, slices: Sequence[Slice]) -> int:
        """Takes what a pass over the slices needs beyond the smallest share; returns the bytes, for `give_back`.
        `OutOfMemory` where they are not free."""
        more = self._beyond(*_rows(slices))
        self._ledger.reserve(ACCOUNT, more)
        return more

    def give_back(self, nbytes: int) -> None:
        """Gives back what `take` took."""
        self._ledger.release(ACCOUNT, nbytes)

    def affordable(self, tokens: int, replies: int = 0, *, every: bool = False) -> int:
        """Prompt tokens for which a step beside so many replies has scratch, at most `tokens`; the logits of one of
        them or of `every` one are wanted. Fewer where memory is short, but some where there are no replies."""
        free = self._ledger.free(ACCOUNT)
        while free is not None and tokens and self._beyond(tokens + replies, (tokens if every else 1) + replies) > free:
            tokens //= 2
        return tokens

    def fitting(self, slices: Sequence[Slice]) -> int:
        """How many of the slices, from the first on, there is scratch for; 0 where not even for the first."""
        free = self._ledger.free(ACCOUNT)
        if free is None:
            return len(slices)
        rows = wanted = 0
        for count, one in enumerate(slices):
            more = _rows([one])
            rows, wanted = rows + more[0], wanted + more[1]
            if self._beyond(rows, wanted) > free:
                return count
        return len(slices)

    def least(self, rows: int, wanted: int) -> int:
        """Bytes without which a pass over so many rows cannot be computed."""
        return self.smallest + self._beyond(rows, wanted)

    def _beyond(self, rows: int, wanted: int) -> int:
        """Bytes of a pass beyond the smallest share."""
        model = self._model
        return max(0, scratch_bytes(model.config.text, rows, wanted, model.dtype.itemsize) - self.smallest)


def _rows(slices: Sequence[Slice]) -> tuple[int, int]:
    """Rows of a pass over slices, and those whose logits are wanted."""
    rows = [one.token_ids.shape[0] for one in slices]
    return sum(rows), sum(n if s.wanted == "all" else s.wanted == "last" for n, s in zip(rows, slices, strict=True))
