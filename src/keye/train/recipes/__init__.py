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

NAMES = ("nano",)


def find_recipe(name: str) -> Recipe:
    """The recipe of this name, one of `NAMES`."""
    assert name in NAMES, name
    from keye.train.recipes.nano.recipe import NanoRecipe

    return NanoRecipe()


def load_run(path: Path) -> tuple[TrainConfig, Recipe]:
    """Reads a training file and finds its recipe; `ConfigError` for the first thing that is wrong with the file."""
    raw = read_toml(path, "a training configuration such as configs/nano.toml")
    name = raw.get("recipe")
    if name not in NAMES:
        problem = "is missing" if name is None else f"is {name!r}"
        raise ConfigError(f'{path}: recipe {problem}; set recipe = "{closest(str(name), NAMES) or NAMES[0]}"')
    recipe = find_recipe(name)
    config = parse_settings(recipe.config, raw, path)
    folders = {name: (path.parent / getattr(config, name)).resolve() for name in ("model", "output")}
    return config.model_copy(update=folders), recipe
