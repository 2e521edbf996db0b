"""Which batches a stage of the family has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from keye.train.batches import StepBatch
from keye.train.recipes.family.batches import Batches, PackedBatches, open_stream
from keye.train.recipes.family.config import FamilyStage
from keye.train.recipes.family.distill import PromptBatches
from keye.train.recipes.family.preference import open_pairs
from keye.train.recipes.family.siglip import CaptionBatches

_KINDS: dict[str, Callable[..., Batches]] = {
    "next_token": PackedBatches, "siglip": CaptionBatches, "distill": PromptBatches,
}  # fmt: skip


class NoBatches:
    """Those of a stage that only samples."""

    def next(self) -> StepBatch | None:
        return None

    def close(self) -> None:
        """Nothing is open."""


def open_batches(
    stage: FamilyStage, folder: Path, *, seed: int, rank: int, size: int, state: dict[str, Any] | None,
    decode: str | None = None,
) -> Batches | NoBatches:  # fmt: skip
    """The batches of a stage; see `keye.train.batches.OpenBatches`."""
    if stage.objective in ("pairs", "modes"):
        return NoBatches()
    if stage.objective in ("dpo", "mpo"):
        return open_pairs(stage, folder, seed=seed, rank=rank, size=size, state=state)
    stream = open_stream(stage.data, folder, seed=seed, epochs=stage.epochs, state=state)
    return _KINDS[stage.objective](stage, folder, stream, rank, size)


def open_validation(stage: FamilyStage, folder: Path, *, rank: int, size: int) -> Batches | None:
    """One pass over the held-out data; None without any."""
    if not stage.val_data or stage.objective not in ("next_token", "dpo", "mpo"):
        return None
    held_out = stage.model_copy(update={"data": stage.val_data, "epochs": 1.0, "sampling": None})
    batches = open_batches(held_out, folder, seed=0, rank=rank, size=size, state=None)
    assert isinstance(batches, Batches)
    return batches
