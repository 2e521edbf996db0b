"""What the stages of the family minimise over packs: next tokens, with the losses of routers and indexers."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from keye.models.keye import KeyeModel
from keye.train.features import FeatureCache, encode_media
from keye.train.losses import token_log_probs
from keye.train.packed import TreeStep
from keye.train.packing import Packed
from keye.train.recipe import Figures
from keye.train.recipes.family.config import FamilyStage
from keye.train.tree import IGNORE

#: One of so many micro-batches measures the recall of the selected keys, which costs dense attention twice.
RECALL_INTERVAL: Final = 50


class PackObjective:
    """The forward pass of a pack, and the losses that do not depend on what is learnt from its tokens."""

    def __init__(self, stage: FamilyStage, model: KeyeModel, cache: FeatureCache | None = None) -> None:
        """`cache` keeps the visual features that packs were loaded from."""
        self.stage, self.figures, self.heads, self.cache = stage, Figures(), nn.Module(), cache
        self.mode, self._passes = stage.attention, 0

    def forward(self, model: KeyeModel, packed: Packed[Tensor]) -> tuple[Tensor, TreeStep]:
        """Hidden states [T, d] of a pack, and the step that has watched the layers."""
        visual = encode_media(model, packed, self.cache)
        measure = self.mode != "dense" and torch.is_grad_enabled() and self._passes % RECALL_INTERVAL == 0
        self._passes += torch.is_grad_enabled()
        step = TreeStep(packed.segments, model.config.text, self.mode, measure_recall=measure)
        return model(model.embed(packed.token_ids, visual), packed.position_ids, step), step

    def side_losses(self, step: TreeStep, share: float) -> Tensor:
        """The losses of routers and indexers, of a pack that holds `share` of the step's learnt weight."""
        total = torch.zeros(())
        if self.mode != "dense":
            kl = step.kl()
            self.figures.add("kl", float(kl.detach()), 1 / step.parts)
            for recall in step.recalls():
                self.figures.add("recall", recall.against_best)
            total = total + self.stage.indexer_kl * kl
        if self.mode != "warmup" and step.routers:
            balance, z, counts = step.balance(), step.z(), step.expert_counts()
            # How many times its share the busiest expert of a layer gets, as the mean over layers.
            self.figures.add("expert_load", float((counts.amax(1) / counts.mean(1)).mean()))
            counts = step.expert_counts()
            self.figures.add("balance", float(balance.detach()), 1 / step.parts)
            self.figures.add("expert_load", float((counts.amax(1) / counts.mean(1)).mean()))
            total = total + self.stage.balance * balance + self.stage.router_z * z
        return share * total


class NextToken(PackObjective):
    """Cross entropy of the learnt tokens: - sum_t w_t log p(y_t) / sum_t w_t. While indexers warm up, only their KL."""

    def loss(self, model: KeyeModel, micro: Packed[Tensor], count: float) -> Tensor:
        hidden, step = self.forward(model, micro)
        weight = float(micro.weights.sum())
        side = self.side_losses(step, weight / count)
        if self.mode == "warmup":
            return side
        rows = (micro.labels != IGNORE).nonzero().squeeze(1)
        log_probs = token_log_probs(model.logits, hidden[rows], micro.labels[rows])
        loss = -(micro.weights[rows] * log_probs).sum()
        if weight:
            self.figures.add("loss", float(loss.detach()), weight / step.parts)
        return loss / count + side
