"""Settings in TOML, read into frozen dataclasses: unknown keys and values of the wrong type are errors."""

from __future__ import annotations

import dataclasses
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from keye.config.files import ConfigError


def read_toml(path: Path, wanted: str) -> dict[str, Any]:
    """A file's tables. `ConfigError` for one that is not there, which says what is `wanted`, or cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give {wanted}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is no readable TOML: {error}") from None


def check_types(config: Any, where: str) -> None:
    """ConfigError for the first field of a dataclass whose value does not have the annotated type. Whole numbers pass
    for fractions; booleans pass for neither."""
    for name, hint in get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), get_args(hint) if isinstance(hint, UnionType) else (hint,)
        for kind, (fits, words) in _PLAIN_TYPES.items():
            if kind in kinds and not (fits(value) or (value is None and NoneType in kinds)):
                raise ConfigError(f"{where}: {name} is {value!r}; it must be {words}")


def is_number(value: object) -> bool:
    """Whether a value is a finite number and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


_PLAIN_TYPES: Mapping[type, tuple[Callable[[object], bool], str]] = {
    int: (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    float: (is_number, "a number"),
    str: (lambda value: isinstance(value, str), "text in quotes"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
}


def check_keys(raw: Mapping[str, Any], cls: type, where: str) -> None:
    """ConfigError for keys that are no fields of a dataclass."""
    known = [f.name for f in dataclasses.fields(cls)]
    if unknown := sorted(set(raw) - set(known)):
        raise ConfigError(f"{where}: unknown keys {', '.join(unknown)}; known are {', '.join(known)}")


def build(cls: Any, values: dict[str, Any], where: str) -> Any:
    """The dataclass with these fields; ConfigError where one is missing."""
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None
