"""The family's recipe as the training loop sees it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from keye.config import ConfigError, KeyeConfig
from keye.models.keye import KeyeModel
from keye.models.load import save_model
from keye.train.batches import BatchSource
from keye.train.config import TrainConfig
from keye.train.features import FeatureCache, open_features
from keye.train.lora import LoraParameters, add_lora, save_adapter
from keye.train.optim import Trained, mark_trainable
from keye.train.parts import choose_adapters
from keye.train.recipe import Objective
from keye.train.recipes.family.batches import check_paths, count_skipped, features_folder, write_features
from keye.train.recipes.family.config import FamilyConfig, FamilyStage
from keye.train.recipes.family.distill import Distillation
from keye.train.recipes.family.objectives import NextToken
from keye.train.recipes.family.preference import PreferenceObjective, compute_reference
from keye.train.recipes.family.reshape import apply_changes
from keye.train.recipes.family.sampled import count_loops, sample_modes, sample_pairs
from keye.train.recipes.family.siglip import SiglipObjective
from keye.train.recipes.family.sources import open_batches, open_validation
from keye.train.recipes.nano.initialise import fresh_model


class FamilyRecipe:
    """Any checkpoint of the family on data from files. Holds what belongs to one run: its adapter, and the visual
    features of the stage that runs."""

    config = FamilyConfig
    open_batches = staticmethod(open_batches)

    def __init__(self) -> None:
        self.run: FamilyConfig | None = None
        self.lora: LoraParameters | None = None
        self.cache: FeatureCache | None = None
        self.folder = Path()

    def create_model(self, config: KeyeConfig, folder: Path, seed: int) -> KeyeModel:
        return fresh_model(config, seed)

    def begin_run(self, model: KeyeModel, run: TrainConfig) -> None:
        assert isinstance(run, FamilyConfig)
        self.run = run
        check_paths(run)
        if run.lora is not None:
            self.lora = add_lora(model, run.lora, seed=run.seed)

    def begin_stage(
        self, stage: FamilyStage, model: KeyeModel, folder: Path, *, seed: int, resumed: bool
    ) -> Mapping[str, float]:
        assert self.run is not None
        self.folder = folder
        before = takewhile(lambda other: other.name != stage.name, self.run.stages)
        apply_changes([*before, stage], model, folder)
        trained = [each.name for each in self.prepare(model, stage)]
        self.cache = None
        if stage.features_gib and stage.objective == "next_token":
            limit = int(stage.features_gib * 2**30)
            self.cache = open_features(model, trained, features_folder(folder), limit=limit)
        write_features(folder, self.cache)
        return {} if resumed else self._sample(stage, model, folder, seed)

    def _sample(self, stage: FamilyStage, model: KeyeModel, folder: Path, seed: int) -> dict[str, float]:
        """What a stage needs of the model's own replies."""
        if stage.objective == "modes":
            return sample_modes(stage, model, folder, seed)
        if stage.objective == "pairs":
            return sample_pairs(stage, model, folder, seed)
        figures: dict[str, float] = {}
        if stage.objective in ("dpo", "mpo"):
            if stage.sampling is not None:
                figures = {"looping_before": count_loops(stage, model, folder, 0)}
                figures |= sample_pairs(stage, model, folder, seed)
            compute_reference(stage, model, folder)
        return figures

    def end_stage(self, stage: FamilyStage, model: KeyeModel, folder: Path) -> Mapping[str, float]:
        figures = {"left_out": float(count_skipped(folder))}
        if stage.objective in ("dpo", "mpo") and stage.sampling is not None:
            figures["looping_after"] = count_loops(stage, model, folder, 0)
        return figures

    def prepare(self, model: KeyeModel, stage: FamilyStage) -> list[Trained]:
        if stage.attention != "dense" and model.config.text.sparse is None:
            raise ConfigError(f'stage {stage.name!r}: the model has no indexer; set attention = "dense"')
        if self.lora is None:
            return mark_trainable(model, stage)
        return [
            Trained(name, parameter, False, stage.lr)
            for name, parameter in choose_adapters(self.lora.named, stage).items()
        ]

    def save(self, model: KeyeModel, tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
        if self.lora is None:
            save_model(model, folder, dtype=dtype, tensors=tensors)
        else:
            assert self.run is not None
            save_adapter(self.lora, folder, base=str(self.run.model))

    def open_validation(self, stage: FamilyStage, folder: Path, *, rank: int, size: int) -> BatchSource | None:
        return open_validation(stage, folder, rank=rank, size=size)

    def make_objective(self, stage: FamilyStage, model: KeyeModel) -> Objective:
        if stage.objective == "siglip":
            return SiglipObjective(stage, model)
        if stage.objective == "distill":
            return Distillation(stage, model, self.folder)
        if stage.objective in ("dpo", "mpo"):
            return PreferenceObjective(stage, model)
        return NextToken(stage, model, self.cache)
