"""Recipes by the names that training files give them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from keye.config import ConfigError
from keye.config.settings import parse_settings, read_toml
from keye.errors import closest
from keye.train.config import TrainConfig

if TYPE_CHECKING:  # making batches needs no torch
    from keye.train.recipe import Recipe

NAMES = ("family", "nano")


def find_recipe(name: str) -> Recipe:
    """The recipe of this name, one of `NAMES`."""
    assert name in NAMES, name
    if name == "family":
        from keye.train.recipes.family.recipe import FamilyRecipe

        return FamilyRecipe()
    from keye.train.recipes.nano.recipe import NanoRecipe

    return NanoRecipe()


def load_run(path: Path) -> tuple[TrainConfig, Recipe]:
    """Reads a training file and finds its recipe; `ConfigError` for the first thing that is wrong with the file."""
    raw = read_toml(path, "a training configuration such as configs/nano.toml")
    name = raw.get("recipe", NAMES[0])
    if name not in NAMES:
        raise ConfigError(f'{path}: recipe is {name!r}; set recipe = "{closest(str(name), NAMES) or NAMES[0]}"')
    recipe = find_recipe(name)
    config = parse_settings(recipe.config, raw, path)
    return config.resolve(path.parent), recipe
