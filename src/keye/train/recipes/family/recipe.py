"""The family's recipe as the training loop sees it."""

from __future__ import annotations

from pathlib import Path

from keye.config import ConfigError, KeyeConfig
from keye.models.keye import KeyeModel
from keye.train.batches import BatchSource
from keye.train.optim import Trained, mark_trainable
from keye.train.recipe import Objective
from keye.train.recipes.family.config import FamilyConfig, FamilyStage
from keye.train.recipes.family.objectives import NextToken
from keye.train.recipes.family.siglip import SiglipObjective
from keye.train.recipes.family.sources import open_batches, open_validation
from keye.train.recipes.nano.initialise import fresh_model


class FamilyRecipe:
    """Any checkpoint of the family on data from files."""

    config = FamilyConfig
    open_batches = staticmethod(open_batches)

    def create_model(self, config: KeyeConfig, folder: Path, seed: int) -> KeyeModel:
        return fresh_model(config, seed)

    def prepare(self, model: KeyeModel, stage: FamilyStage) -> list[Trained]:
        if stage.attention != "dense" and model.config.text.sparse is None:
            raise ConfigError(f'stage {stage.name!r}: the model has no indexer; set attention = "dense"')
        return mark_trainable(model, stage)

    def open_validation(self, stage: FamilyStage, folder: Path, *, rank: int, size: int) -> BatchSource | None:
        return open_validation(stage, folder, rank=rank, size=size)

    def make_objective(self, stage: FamilyStage, model: KeyeModel) -> Objective:
        if stage.objective == "siglip":
            return SiglipObjective(stage, model)
        return NextToken(stage, model)
