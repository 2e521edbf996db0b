"""What the stages of the family minimise over packs: next tokens, with the losses of routers and indexers."""

from __future__ import annotations

from typing import Final, cast

import torch
from torch import Tensor, nn

from keye.models.keye import KeyeModel
from keye.models.moe import MoE
from keye.train.config import TrainMode
from keye.train.features import FeatureCache, encode_media
from keye.train.losses import token_log_probs
from keye.train.packed import TreeStep
from keye.train.packing import Packed
from keye.train.recipe import AddUp, Figures
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
        self._counts: Tensor | None = None
        self.keep_counts(model)

    def forward(
        self, model: KeyeModel, packed: Packed[Tensor], mode: TrainMode | None = None
    ) -> tuple[Tensor, TreeStep]:
        """Hidden states [T, d] of a pack, and the step that has watched the layers; the stage's `mode` by default."""
        visual = encode_media(model, packed, self.cache)
        measure = self.mode != "dense" and torch.is_grad_enabled() and self._passes % RECALL_INTERVAL == 0
        self._passes += torch.is_grad_enabled()
        step = TreeStep(packed.segments, model.config.text, mode or self.mode, measure_recall=measure)
        return model(model.embed(packed.token_ids, visual), packed.position_ids, step), step

    def keep_counts(self, model: KeyeModel) -> None:
        """Has `heads` keep how often each expert was chosen in the last step, with the checkpoints: which experts are
        busy is a matter of all packs of all processes. The step before knows it in time, however a step is divided."""
        layers = [module for module in model.modules() if isinstance(module, MoE)]
        if layers:
            counts = torch.zeros(len(layers), layers[0].gate.weight.shape[0])
            self.heads.register_buffer("expert_counts", counts)

    def _usual_counts(self, counts: Tensor, share: float) -> Tensor | None:
        """The counts [layers, E] of the last step; None, which is a pack's own, in the first. Adds up those of this,
        without packs that only keep a process company (`share` 0)."""
        if torch.is_grad_enabled() and share:
            self._counts = counts if self._counts is None else self._counts + counts
        usual = cast(Tensor, self.heads.expert_counts)
        return usual if bool(usual.any()) else None

    def finish_step(self, add_up: AddUp) -> None:
        usual = dict(self.heads.named_buffers()).get("expert_counts")
        if usual is not None:  # a process without packs of its own takes part too
            counts = torch.zeros_like(usual) if self._counts is None else self._counts
            add_up([counts])
            usual.copy_(counts)
            self._counts = None

    def side_losses(self, step: TreeStep, share: float) -> Tensor:
        """The losses of routers and indexers, of a pack that holds `share` of the step's learnt weight."""
        total = torch.zeros(())
        figures = self.figures if share else Figures()  # a pack that only keeps a process company is none of the step
        if self.mode != "dense":
            kl = step.kl()
            figures.add("kl", float(kl.detach()), 1 / step.parts)
            for recall in step.recalls():
                figures.add("recall", recall.against_best)
            total = total + self.stage.indexer_kl * kl
        if self.mode != "warmup" and step.routers:
            counts = step.expert_counts()
            balance, z = step.balance(self._usual_counts(counts, share)), step.z()
            figures.add("balance", float(balance.detach()), 1 / step.parts)
            figures.add("expert_load", float((counts.amax(1) / counts.mean(1)).mean()))
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
