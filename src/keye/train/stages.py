"""The losses of the stages: what one step of each computes from a batch.

A stage object holds what is trained besides the model (heads that are thrown away afterwards), turns a batch into a
loss, and keeps running figures for the log. Sources: 2.0 report (warm-up and sparse adaptation), ../models/packed.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keye.models.keye import KeyeModel
from keye.train.config import StageConfig
from keye.train.packed import PackedStep
from keye.train.recipes.nano.batches import IGNORE, VISION_TARGETS, WINDOW, PackedBatch, VisionBatch
from keye.train.recipes.nano.helpers import Helpers

#: Loss rows are padded to a multiple of this, for the same reason as the tails.
LOGIT_MULTIPLE = 256


class Figures:
    """Sums and counts by name; `take` returns means and starts anew."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        entry = self._sums[name]
        entry[0] += value
        entry[1] += count

    def take(self) -> dict[str, float]:
        means = {name: total / count for name, (total, count) in sorted(self._sums.items()) if count}
        self._sums.clear()
        return means


class Stage(Protocol):
    """What the trainer needs of a stage."""

    figures: Figures

    @property
    def heads(self) -> nn.Module:
        """What is trained besides the model and thrown away afterwards."""

    def loss(self, model: KeyeModel, batch: VisionBatch | PackedBatch) -> Tensor:
        """The scalar to minimise."""


def make_stage(config: StageConfig, model: KeyeModel) -> Stage:
    """The stage object for a configuration."""
    if config.kind == "vision":
        return VisionStage(config, model)
    return LanguageStage(config, model)


def trainable(model: KeyeModel, config: StageConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """Marks and yields the parameters that a stage changes; everything else stays as it is."""
    for name, parameter in model.named_parameters():
        vision = name.startswith(("visual.", "mlp_AR."))
        indexer = ".sa_indexer." in name
        wanted = {
            "vision": vision,
            "indexer": indexer,
            "decoder": not vision and (not indexer or config.attention == "sparse"),
            "all": not indexer or config.attention == "sparse",
        }[config.trains]
        parameter.requires_grad_(wanted)
        if wanted:
            yield name, parameter


def pixels_to_patches(frames: Tensor, patch: int) -> Tensor:
    """uint8 frames [N, H, W, 3] -> normalised patches bfloat16 [N * patches, 3, patch, patch] in raster order."""
    n, height, width, _ = frames.shape
    x = (frames.to(torch.bfloat16) / 127.5 - 1.0).view(n, height // patch, patch, width // patch, patch, 3)
    return x.permute(0, 1, 3, 5, 2, 4).reshape(-1, 3, patch, patch)


def encode_frames(model: KeyeModel, frames: Tensor) -> Tensor:
    """uint8 frames [N, H, W, 3] -> visual tokens [N * tokens, d]."""
    patch = model.config.vision.patch_size
    grid = torch.tensor([[1, frames.shape[1] // patch, frames.shape[2] // patch]]).expand(frames.shape[0], 3)
    return model.encode_vision(pixels_to_patches(frames, patch), grid)


class VisionStage:
    """Dense pre-training: from each visual token, what is centred in its cell and where it lies in the frame."""

    def __init__(self, config: StageConfig, model: KeyeModel) -> None:
        self.config, self.figures = config, Figures()
        width = sum(count for _, count in VISION_TARGETS) + 2
        self.heads: nn.Linear = nn.Linear(model.config.text.hidden_size, width)

    def loss(self, model: KeyeModel, batch: VisionBatch | PackedBatch) -> Tensor:
        assert isinstance(batch, VisionBatch)
        tokens = encode_frames(model, torch.from_numpy(batch.frames))
        out = self.heads(F.rms_norm(tokens.float(), tokens.shape[-1:]))
        ids = torch.from_numpy(batch.ids).flatten(0, 1)
        offset = torch.from_numpy(batch.offset).flatten(0, 1)
        total = out.new_zeros(())
        for column, (name, count) in enumerate(VISION_TARGETS):
            logits, out = out[:, :count], out[:, count:]
            target = ids[:, column]
            weight = torch.ones(count)
            weight[0] = 0.2  # most cells are empty
            total = total + F.cross_entropy(logits, target, weight=weight)
            some = target > 0
            hits = int((logits.argmax(-1) == target)[some].sum())
            self.figures.add(name, hits, int(some.sum()))
        known = ~offset[:, 0].isnan()
        total = total + (out[known] - offset[known]).pow(2).mean()
        self.figures.add("loss", float(total.detach()))
        return total


class LanguageStage:
    """Next-token prediction on answers, with the indexer's KL where the attention is sparse."""

    def __init__(self, config: StageConfig, model: KeyeModel) -> None:
        self.config, self.figures = config, Figures()
        self.heads: Helpers = Helpers(config, model, self.figures.add)
        self.frozen_vision = config.trains in ("decoder", "indexer")

    def loss(self, model: KeyeModel, batch: VisionBatch | PackedBatch) -> Tensor:
        assert isinstance(batch, PackedBatch)
        frames = torch.from_numpy(batch.frames)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_vision):
            visual = encode_frames(model, frames.flatten(0, 1))
        ids = torch.from_numpy(np.concatenate([batch.trunk_ids, batch.tail_ids], axis=1))
        positions = torch.from_numpy(batch.positions).transpose(0, 1).flatten(1)
        trunk = batch.trunk_ids.shape[1]
        text = model.config.text
        step = PackedStep(
            torch.from_numpy(batch.branch), trunk, window=WINDOW, mode=self.config.attention,
            topk=text.sparse.topk if text.sparse is not None else 0,
            watch=self.heads.watch, hints=self.heads.hints(batch), elementwise=model.elementwise,
        )  # fmt: skip
        hidden = model(model.embed(ids.flatten(), visual), positions, step).view(*ids.shape, -1)
        frames_key = f"/{frames.shape[1]}"
        if self.config.attention == "warmup":
            total = self.config.indexer_kl * step.indexer_kl()
            self.figures.add("kl" + frames_key, float(total.detach()))
            return total
        total = self._next_token(model, batch, hidden[:, trunk:], frames_key)
        if step.balance:
            balance = step.balance_loss()
            self.figures.add("balance", float(balance.detach()))
            total = total + self.config.balance * balance
        total = total + self.heads.loss(model, batch, step)
        if self.config.attention == "sparse":
            kl = step.indexer_kl()
            self.figures.add("kl" + frames_key, float(kl.detach()))
            total = total + self.config.indexer_kl * kl
        return total

    def _next_token(self, model: KeyeModel, batch: PackedBatch, hidden: Tensor, key: str) -> Tensor:
        labels = torch.from_numpy(batch.labels)
        learnt = labels != IGNORE
        rows = learnt.flatten().nonzero().squeeze(1)
        target = labels.flatten()[rows]
        padded = F.pad(rows, (0, -rows.numel() % LOGIT_MULTIPLE))
        logits = model.logits(hidden.flatten(0, 1).index_select(0, padded))[: rows.numel()]
        loss = F.cross_entropy(logits, target)
        self.figures.add("loss", float(loss.detach()))
        correct = torch.ones(labels.shape, dtype=torch.bool)
        correct[learnt] = logits.detach().argmax(-1) == target
        right = correct.numpy()
        for answer in batch.answers:
            hit = bool(right[answer.row, answer.start : answer.stop].all())
            self.figures.add(answer.question.task + key, hit)
        return loss
