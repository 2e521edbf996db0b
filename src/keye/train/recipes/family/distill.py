"""On-policy distillation: the student samples replies through the engine, and learns from what the teacher says of each
of their tokens.

Sources: the 2.0 report (overlap of the likeliest tokens of both; see `keye.train.losses.overlap_loss` for the form that
has a gradient), on-policy distillation by sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor

from keye.chat.tokenizer import Tokenizer
from keye.config import ConfigError, KeyeConfig, load_model_config
from keye.data.samples import Sample
from keye.models.keye import KeyeModel
from keye.models.load import load_model
from keye.train.algorithms.distill import OnPolicyDistillation
from keye.train.layout import LaidOut, plant, reply_path
from keye.train.losses import likeliest_tokens, overlap_loss, token_log_probs, weighted_loss
from keye.train.packing import Array, Packed, load, pack
from keye.train.recipe import move_batch
from keye.train.recipes.family.batches import Batches
from keye.train.recipes.family.config import FamilyStage
from keye.train.recipes.family.objectives import PackObjective
from keye.train.recipes.family.sampled import TOGETHER, make_sampler, sampling_params
from keye.train.rollouts import Sampler
from keye.train.tree import IGNORE


@dataclass(frozen=True)
class PromptBatch(Generic[Array]):
    """n samples whose prompts are answered by the student; `weights` float32 [n] are theirs."""

    samples: tuple[Sample, ...]
    weights: Array


class PromptBatches(Batches):
    """`batch` prompts a step."""

    @property
    def is_packed(self) -> bool:
        return False

    def weigh(self, sample: LaidOut) -> float:
        return sample.sample.weight

    def make_micro(self, samples: Sequence[LaidOut], figures: dict[str, float]) -> list[Any]:
        own = [entry.sample for entry in samples[self.rank :: self.size]]
        micro = []
        for start in range(0, -(-len(samples) // self.size), TOGETHER):
            part = own[start : start + TOGETHER]
            weights = [sample.weight for sample in part] or [0.0]  # one that does not count, to take the same steps
            micro.append(PromptBatch(tuple(part or [samples[0].sample]), np.array(weights, np.float32)))
        return micro


class Distillation(PackObjective):
    """The mean over prompts of the mean over the tokens of their replies of the stage's form of reverse KL."""

    def __init__(self, stage: FamilyStage, model: KeyeModel, folder: Path) -> None:
        super().__init__(stage, model)
        assert stage.distill is not None
        self.settings, self.folder = stage.distill, folder
        self.sampler: Sampler = make_sampler(stage, model, folder)
        self.teacher = load_teacher(self.settings.teacher, folder, model)

    def loss(self, model: KeyeModel, micro: PromptBatch[Tensor], count: float) -> Tensor:
        packs = self._sample(micro)
        total = torch.zeros((), device=model.device)
        for packed in packs:
            total = total + self._loss(model, packed) / count
        return total

    def _sample(self, micro: PromptBatch[Tensor]) -> list[Packed[Tensor]]:
        """Packs of the replies to each prompt, whose tokens together have the prompt's weight."""
        stage, sampler = self.stage, self.sampler
        seed = int(torch.randint(2**31, ()))
        thinks = [{"think": True, "no_think": False}.get(sample.mode or "") for sample in micro.samples]
        prompts = [sampler.lay_out(sample, think) for sample, think in zip(micro.samples, thinks, strict=True)]
        rollouts = sampler.sample(prompts, sampling_params(stage, seed), stage.rollout.replies)
        laid_out = []
        for sample, prompt, replies, weight in zip(
            micro.samples, prompts, rollouts, micro.weights.tolist(), strict=True
        ):
            tokens = sum(len(reply.token_ids) for reply in replies)
            paths = [reply_path(prompt, reply.token_ids) for reply in replies]
            laid_out.append(plant(replace(sample, weight=weight / tokens), paths))
            for reply in replies:
                self.figures.add("reply_tokens", len(reply.token_ids))
                self.figures.add("looping", reply.is_looping)
        longest = max(stage.max_tokens, *(entry.length for entry in laid_out), 0)
        return [move_batch(load(each), sampler.model.device) for each in pack(laid_out, longest)]

    def _loss(self, model: KeyeModel, packed: Packed[Tensor]) -> Tensor:
        hidden, step = self.forward(model, packed)
        rows = (packed.labels != IGNORE).nonzero().squeeze(1)
        labels, weights, student = packed.labels[rows], packed.weights[rows], hidden[rows]
        log_probs = token_log_probs(model.logits, student, labels)
        with torch.no_grad():
            mode = self.mode if self.teacher.config.text.sparse is not None else "dense"
            taught = self.forward(self.teacher, packed, mode)[0][rows]
            reference = token_log_probs(self.teacher.logits, taught, labels)
        self.figures.add("kl_to_teacher", float((log_probs.detach() - reference).sum()), len(rows))
        side = self.side_losses(step, float(weights.sum()))
        if self.settings.form == "sampled":
            return weighted_loss(log_probs, OnPolicyDistillation(weights), reference) + side
        ids = likeliest_tokens(model.logits, student.detach(), self.settings.topk)
        theirs = likeliest_tokens(self.teacher.logits, taught, self.settings.topk)
        shared = (ids[:, :, None] == theirs[:, None, :]).any(2)
        chosen = token_log_probs(model.logits, student, ids)
        with torch.no_grad():
            wanted = token_log_probs(self.teacher.logits, taught, ids)
        losses, mass = overlap_loss(chosen, wanted, shared)
        uses_sampled = mass < self.settings.least_mass
        self.figures.add("overlap", float(shared.sum()), len(rows))
        self.figures.add("mass", float(mass.sum()), len(rows))
        self.figures.add("sampled_tokens", float(uses_sampled.sum()), len(rows))
        sampled = weighted_loss(log_probs, OnPolicyDistillation(weights * uses_sampled), reference)
        return (weights * losses.masked_fill(uses_sampled, 0.0)).sum() + sampled + side


def load_teacher(teacher: Path, folder: Path, student: KeyeModel) -> KeyeModel:
    """The teacher's weights beside the student. `ConfigError` where it does not read the student's tokens."""
    config, own = load_model_config(teacher), student.config
    before, after = Tokenizer.from_file(folder), Tokenizer.from_file(teacher)
    sizes = [(c.text.vocab_size, t.vocab_size, t.added_tokens) for c, t in ((own, before), (config, after))]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"the teacher {teacher} has another tokenizer than the student; choose one of its family")
    if _layout_of(config) != _layout_of(own):
        raise ConfigError(f"the teacher {teacher} is of another release and reads prompts otherwise; choose one of the "
                          "student's")  # fmt: skip
    model, _ = load_model(teacher, config, device=student.device, dtype=student.dtype)
    return model.requires_grad_(False)


def _layout_of(config: KeyeConfig) -> tuple[object, ...]:
    """What the student's prompts, positions and patches must have in common with those of another model."""
    vision = (config.vision.patch_size, config.vision.spatial_merge_size)
    tokens = (config.image_token_id, config.video_token_id)
    return (*vision, *tokens, config.tokens_per_second, config.text.uses_mrope)
