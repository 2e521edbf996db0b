"""Learning from pairs of replies: DPO and MPO over packs in which both replies share their prompt.

The log-probabilities of the reference, the model at the stage's beginning, are computed once, before the first step,
and kept in a file of the output folder: no second model is held, and a resumed run reads what it had.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor

from keye.data.sources import SampleStream
from keye.errors import KeyeError
from keye.models.keye import KeyeModel
from keye.train.layout import LaidOut
from keye.train.losses import token_log_probs
from keye.train.packing import Array, Pack, Packed, load
from keye.train.preferences import Pairs, RewardShift, bco_loss, dpo_loss
from keye.train.recipe import move_batch
from keye.train.recipes.family.batches import PackedBatches, open_stream
from keye.train.recipes.family.config import DataConfig, FamilyStage
from keye.train.recipes.family.objectives import PackObjective
from keye.train.recipes.family.sampled import samples_file
from keye.train.recipes.family.shared_files import write_shared
from keye.train.rollouts import generating
from keye.train.tree import IGNORE


@dataclass(frozen=True)
class PairPack(Generic[Array]):
    """A pack of n samples with two replies each. `reference` float32 [n, 2], log-probabilities of the better and the
    worse reply; `weights` float32 [n]; `places` where the samples come from."""

    packed: Packed[Array]
    reference: Array
    weights: Array
    places: tuple[str, ...]


class PairBatches(PackedBatches):
    """Packs of pairs with what the reference says of them, by place; zeros where that is to be computed."""

    def __init__(
        self, stage: FamilyStage, folder: Path, stream: SampleStream, rank: int, size: int,
        reference: Mapping[str, tuple[float, float]] | None,
    ) -> None:  # fmt: skip
        super().__init__(stage, folder, stream, rank, size)
        self.reference = reference

    def check(self, sample: LaidOut) -> None:
        if not sample.sample.rejected:
            raise KeyeError("it has no reply that lost; give rejected_response, or chosen and rejected")
        if self.reference is not None and str(sample.sample.place) not in self.reference:
            raise KeyeError("the reference has not seen it; start the stage again")

    def weigh(self, sample: LaidOut) -> float:
        return sample.sample.weight

    def load(self, pack: Pack) -> PairPack[Any]:
        places = tuple(str(member.sample.place) for member in pack.samples)
        known = self.reference or {}
        return PairPack(
            load(pack), np.array([known.get(place, (0.0, 0.0)) for place in places], np.float32),
            np.array([member.sample.weight for member in pack.samples], np.float32), places,
        )  # fmt: skip

    def _filler(self, pack: Pack) -> PairPack[Any]:
        filler = self.load(pack)
        return replace(filler, weights=np.zeros_like(filler.weights))


def pair_data(stage: FamilyStage, folder: Path) -> tuple[DataConfig, ...]:
    """The sets of pairs: what the stage has sampled, or its data."""
    if stage.sampling is None:
        return stage.data
    return (DataConfig(path=str(samples_file(folder, stage))),)


def open_pairs(
    stage: FamilyStage, folder: Path, *, seed: int, rank: int, size: int, state: dict[str, Any] | None
) -> PairBatches:
    """The pairs of a stage whose reference has been computed."""
    stream = open_stream(pair_data(stage, folder), folder, seed=seed, epochs=stage.epochs, state=state)
    return PairBatches(stage, folder, stream, rank, size, _read_reference(_reference_file(folder, stage)))


def compute_reference(stage: FamilyStage, model: KeyeModel, folder: Path) -> None:
    """Writes what the model says of every pair now, those of held-out data too."""
    path = _reference_file(folder, stage)
    objective, lines = PreferenceObjective(stage, model), []
    for data in (pair_data(stage, folder), stage.val_data):
        if not data:
            continue
        batches = PairBatches(stage, folder, open_stream(data, folder, seed=0, epochs=1.0), 0, 1, None)
        while (step := batches.next()) is not None:
            for micro in step.micro:
                moved = move_batch(micro, model.device)
                with generating(model):
                    sums = objective.reply_log_probs(model, moved.packed).sums.tolist()
                lines += [
                    json.dumps({"place": place, "log_probs": pair})
                    for place, pair in zip(micro.places, sums, strict=True)
                ]
    write_shared(path, "".join(line + "\n" for line in lines))


def _reference_file(folder: Path, stage: FamilyStage) -> Path:
    samples = samples_file(folder, stage)
    return samples.with_name(f"reference-{samples.name}")


def _read_reference(path: Path) -> dict[str, tuple[float, float]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {row["place"]: tuple(row["log_probs"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KeyeError(f"{path} cannot be read ({error}); start the stage again") from None


@dataclass(frozen=True)
class ReplyLogProbs:
    """Of n samples with two replies each: log-probabilities `sums` [n, 2] of the replies, their `lengths` [n, 2]."""

    sums: Tensor
    lengths: Tensor


class PreferenceObjective(PackObjective):
    """objective = "dpo": -log sigmoid(r_w - r_l), the mean over pairs. "mpo" (InternVL): preference * DPO + quality *
    BCO + next_token * the better reply's mean cross entropy. See `keye.train.preferences`."""

    def __init__(self, stage: FamilyStage, model: KeyeModel) -> None:
        super().__init__(stage, model)
        self.heads = RewardShift()
        self.keep_counts(model)

    def loss(self, model: KeyeModel, micro: PairPack[Tensor], count: float) -> Tensor:
        replies, step = self._compute(model, micro.packed)
        settings, reference = self.stage.preference, micro.reference
        pairs = Pairs(replies.sums[:, 0], replies.sums[:, 1], reference[:, 0], reference[:, 1])
        losses = dpo_loss(pairs, settings.beta)
        if self.stage.objective == "mpo":
            assert isinstance(self.heads, RewardShift)
            surprise = -replies.sums[:, 0] / replies.lengths[:, 0]
            shift = self.heads.update(pairs, settings.beta, micro.weights > 0)
            losses = (settings.preference * losses + settings.quality * bco_loss(pairs, settings.beta, shift)
                      + settings.next_token * surprise)  # fmt: skip
            self._note("surprise", surprise, micro.weights)
        won, lost = pairs.rewards(settings.beta)
        self._note("loss", losses, micro.weights)
        self._note("accuracy", (won > lost).float(), micro.weights)
        self._note("margin", won - lost, micro.weights)
        weight = float(micro.weights.sum())
        return (micro.weights * losses).sum() / count + self.side_losses(step, weight / count)

    def reply_log_probs(self, model: KeyeModel, packed: Packed[Tensor]) -> ReplyLogProbs:
        """log p of both replies of each sample, summed over their tokens."""
        return self._compute(model, packed)[0]

    def _compute(self, model: KeyeModel, packed: Packed[Tensor]) -> tuple[ReplyLogProbs, Any]:
        hidden, step = self.forward(model, packed)
        rows = (packed.labels != IGNORE).nonzero().squeeze(1)
        values = token_log_probs(model.logits, hidden[rows], packed.labels[rows])
        lengths = packed.segments[:, 1] - packed.segments[:, 0]
        reply = (2 * packed.segment_sample + packed.rejected.long()).repeat_interleave(lengths)[rows]
        samples = int(packed.segment_sample.max()) + 1
        sums = values.new_zeros(2 * samples).index_add(0, reply, values)
        return ReplyLogProbs(sums.view(-1, 2), torch.bincount(reply, minlength=2 * samples).view(-1, 2)), step

    def _note(self, name: str, values: Tensor, weights: Tensor) -> None:
        if weight := float(weights.sum()):
            self.figures.add(name, float((values.detach() * weights).sum()), weight)
