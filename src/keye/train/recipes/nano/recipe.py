"""keye-nano's recipe as the training loop sees it: what one step of each stage computes from a batch.

Sources: 2.0 report (warm-up and sparse adaptation), `keye.train.packed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keye.chat.tokenizer import Tokenizer
from keye.config import KeyeConfig
from keye.models.keye import KeyeModel
from keye.models.load import save_model
from keye.train.algorithms.sft import SupervisedFineTuning
from keye.train.config import TrainConfig
from keye.train.losses import token_loss
from keye.train.optim import Trained, mark_trainable
from keye.train.packed import TreeStep
from keye.train.recipe import AddUp, Figures, Objective
from keye.train.recipes.nano.batches import IGNORE, VISION_TARGETS, PackedBatch, VisionBatch, open_batches
from keye.train.recipes.nano.config import NanoConfig, NanoStage
from keye.train.recipes.nano.helpers import Helpers
from keye.train.recipes.nano.initialise import fresh_model, number_tokens, order_numbers

#: One of so many batches measures the recall of the selected keys, which costs dense attention twice.
RECALL_INTERVAL = 50


def encode_frames(model: KeyeModel, frames: Tensor) -> Tensor:
    """uint8 frames [N, H, W, 3] -> visual tokens [N * tokens, d]."""
    patch, (n, height, width, _) = model.config.vision.patch_size, frames.shape
    x = (frames.to(torch.bfloat16) / 127.5 - 1.0).view(n, height // patch, patch, width // patch, patch, 3)
    patches = x.permute(0, 1, 3, 5, 2, 4).reshape(-1, 3, patch, patch)  # in raster order
    return model.encode_vision(patches, torch.tensor([[1, height // patch, width // patch]]).expand(n, 3))


class VisionObjective:
    """Dense pre-training: from each visual token, what is centred in its cell and where it lies in the frame."""

    def __init__(self, model: KeyeModel) -> None:
        self.figures = Figures()
        width = sum(count for _, count in VISION_TARGETS) + 2
        self.heads: nn.Linear = nn.Linear(model.config.text.hidden_size, width)

    def finish_step(self, add_up: AddUp) -> None:
        """Nothing is counted over a step."""

    def loss(self, model: KeyeModel, micro: VisionBatch[Tensor], count: float) -> Tensor:
        return self._mean(model, micro) / count

    def _mean(self, model: KeyeModel, batch: VisionBatch[Tensor]) -> Tensor:
        tokens = encode_frames(model, batch.frames)
        out = self.heads(F.rms_norm(tokens.float(), tokens.shape[-1:]))
        ids, offset = batch.ids.flatten(0, 1), batch.offset.flatten(0, 1)
        total = out.new_zeros(())
        for column, (name, count) in enumerate(VISION_TARGETS):
            logits, out = out[:, :count], out[:, count:]
            target = ids[:, column]
            weight = torch.ones(count, device=logits.device)
            weight[0] = 0.2  # most cells are empty
            total = total + F.cross_entropy(logits, target, weight=weight)
            some = target > 0
            self.figures.add(name, int((logits.argmax(-1) == target)[some].sum()), int(some.sum()))
        known = ~offset[:, 0].isnan()
        total = total + (out[known] - offset[known]).pow(2).mean()
        self.figures.add("loss", float(total.detach()))
        return total


class LanguageObjective:
    """Next-token prediction on answers, with the indexer's KL where the attention is sparse."""

    def __init__(self, stage: NanoStage, model: KeyeModel) -> None:
        self.stage, self.figures, self.algorithm = stage, Figures(), SupervisedFineTuning()
        self.heads: Helpers = Helpers(stage.nano, model, self.figures.add)
        self.frozen_vision = stage.trains in ("decoder", "indexer")
        self._batches = 0

    def finish_step(self, add_up: AddUp) -> None:
        """Nothing is counted over a step."""

    def loss(self, model: KeyeModel, micro: PackedBatch[Tensor], count: float) -> Tensor:
        return self._mean(model, micro) / count

    def _mean(self, model: KeyeModel, batch: PackedBatch[Tensor]) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_vision):
            visual = encode_frames(model, batch.frames.flatten(0, 1))
        ids = torch.cat((batch.trunk_ids, batch.tail_ids), dim=1)
        positions = batch.positions.transpose(0, 1).flatten(1)
        trunk, text = batch.trunk_ids.shape[1], model.config.text
        measure = self.stage.attention != "dense" and self._batches % RECALL_INTERVAL == 0
        self._batches += 1
        step = TreeStep(batch.segments, text, self.stage.attention, watch=self.heads.watch,
                        hints=self.heads.hints(batch), measure_recall=measure)  # fmt: skip
        hidden = model(model.embed(ids.flatten(), visual), positions, step).view(*ids.shape, -1)
        frames_key = f"/{batch.frames.shape[1]}"
        if measure:
            for recall in step.recalls():
                self.figures.add("recall" + frames_key, recall.against_best)
        if self.stage.attention == "warmup":
            kl = step.kl()
            self.figures.add("kl" + frames_key, float(kl.detach()))
            return self.stage.indexer_kl * kl
        total = self._next_token(model, batch, hidden[:, trunk:], frames_key)
        if step.routers:
            balance = step.balance()
            self.figures.add("balance", float(balance.detach()))
            total = total + self.stage.balance * balance
        total = total + self.heads.loss(model, batch, step)
        if self.stage.attention == "sparse":
            kl = step.kl()
            self.figures.add("kl" + frames_key, float(kl.detach()))
            total = total + self.stage.indexer_kl * kl
        return total

    def _next_token(self, model: KeyeModel, batch: PackedBatch[Tensor], hidden: Tensor, key: str) -> Tensor:
        learnt = batch.labels != IGNORE
        rows = learnt.flatten().nonzero().squeeze(1)
        targets = batch.labels.flatten()[rows]
        logits = model.logits(hidden.flatten(0, 1).index_select(0, rows))
        loss = token_loss(logits, targets, self.algorithm)
        self.figures.add("loss", float(loss.detach()))
        correct = torch.ones_like(learnt)
        correct[learnt] = logits.detach().argmax(-1) == targets
        right = correct.cpu().numpy()
        for answer in batch.answers:
            self.figures.add(answer.question.task + key, bool(right[answer.row, answer.start : answer.stop].all()))
        return loss


class NanoRecipe:
    """A vision tower on dense labels of frames, then a decoder on questions about synthetic clips."""

    config = NanoConfig
    open_batches = staticmethod(open_batches)

    def create_model(self, config: KeyeConfig, folder: Path, seed: int) -> KeyeModel:
        model = fresh_model(config, seed)
        order_numbers(model, number_tokens(Tokenizer.from_file(folder)))
        return model

    def begin_run(self, model: KeyeModel, run: TrainConfig) -> None:
        """Nothing: the model is trained as it is."""

    def begin_stage(
        self, stage: NanoStage, model: KeyeModel, folder: Path, *, seed: int, resumed: bool
    ) -> Mapping[str, float]:  # fmt: skip
        return {}

    def end_stage(self, stage: NanoStage, model: KeyeModel, folder: Path) -> Mapping[str, float]:
        return {}

    def save(self, model: KeyeModel, tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
        save_model(model, folder, dtype=dtype, tensors=tensors)

    def prepare(self, model: KeyeModel, stage: NanoStage) -> list[Trained]:
        return mark_trainable(model, stage)

    def open_validation(self, stage: NanoStage, folder: Path, *, rank: int, size: int) -> None:
        """None: the card measures held-out clips."""

    def make_objective(self, stage: NanoStage, model: KeyeModel) -> Objective:
        if stage.nano.kind == "vision":
            return VisionObjective(model)
        return LanguageObjective(stage, model)
