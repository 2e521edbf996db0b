"""The JSON files of a checkpoint, and the sentence when one of them is wrong."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from keye.errors import KeyeError


class ConfigError(KeyeError):
    """A configuration file is missing, unreadable, incomplete or contradicts itself."""


def read_json(path: Path) -> dict[str, Any]:
    """Parses a JSON object from a file; `ConfigError` with one sentence otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a checkpoint folder needs it") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def refuse(problems: Iterable[str]) -> None:
    """Raises `ConfigError` with the first sentence, if there is one."""
    for problem in problems:
        raise ConfigError(problem)


def own_fields(raw: Mapping[str, Any], path: Path, known: Collection[str]) -> Mapping[str, Any]:
    """The `keye` object of a file, whose fields must be among `known`."""
    own = raw.get("keye", {})
    if not isinstance(own, Mapping):
        raise ConfigError(f"{path} has keye {own!r}; it must be an object")
    if unknown := sorted(set(own) - set(known)):
        raise ConfigError(f"{path} has unknown keye fields {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return own


def require(raw: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    if missing := [name for name in names if raw.get(name) is None]:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")


def require_whole(raw: Mapping[str, Any], names: Iterable[str], where: str, *, least: int = 1) -> None:
    """Every one of `names` that is given must be a whole number of at least `least`."""
    for name in names:
        value = raw.get(name)
        if value is not None and (type(value) is not int or value < least):
            raise ConfigError(f"{where} has {name} {value!r}; it must be a whole number of at least {least}")
