"""keye-nano's recipe as the training loop sees it."""

from __future__ import annotations

from pathlib import Path

from keye.chat.tokenizer import Tokenizer
from keye.config import KeyeConfig
from keye.models.keye import KeyeModel
from keye.train.recipe import Objective
from keye.train.recipes.nano.batches import make_batch
from keye.train.recipes.nano.config import NanoConfig, NanoStage
from keye.train.recipes.nano.initialise import fresh_model, number_tokens, order_numbers
from keye.train.recipes.nano.objectives import LanguageObjective, VisionObjective


class NanoRecipe:
    """A vision tower on dense labels of frames, then a decoder on questions about synthetic clips."""

    config = NanoConfig
    make_batch = staticmethod(make_batch)

    def create_model(self, config: KeyeConfig, folder: Path, seed: int) -> KeyeModel:
        model = fresh_model(config, seed)
        order_numbers(model, number_tokens(Tokenizer.from_file(folder)))
        return model

    def make_objective(self, stage: NanoStage, model: KeyeModel) -> Objective:
        if stage.nano.kind == "vision":
            return VisionObjective(model)
        return LanguageObjective(stage, model)
