"""Settings that users write as TOML, read with pydantic into frozen models: one sentence for the first mistake.

Only what is read in commands that take seconds to start belongs here: importing pydantic costs `keye ask` 150 ms.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from keye.config.files import ConfigError
from keye.errors import brief, closest

_WANTED = {
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "finite_number": "a finite number", "string_type": "text in quotes", "bool_type": "true or false",
    "path_type": "a path in quotes", "tuple_type": "a list", "list_type": "a list", "dict_type": "a table",
    "model_type": "a table", "model_attributes_type": "a table", "literal_error": "one of {expected}",
    "greater_than": "above {gt}", "greater_than_equal": "at least {ge}", "less_than": "below {lt}",
    "less_than_equal": "at most {le}", "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}  # fmt: skip


class Settings(BaseModel):
    """A table of a file. Unknown keys are errors; `moved` gives the new spelling of keys that have one."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, populate_by_name=True,
        use_attribute_docstrings=True,
    )  # fmt: skip
    moved: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, raw: Any) -> Any:
        names = {name: str(field.validation_alias or name) for name, field in cls.model_fields.items()}
        known = names.values()
        for key in raw if isinstance(raw, dict) else ():
            if key in cls.moved:
                raise ValueError(f"{key} has moved: {cls.moved[key]}")
            if key not in known and key not in names:
                meant = closest(key, known)
                hint = f"did you mean {meant}?" if meant else f"known are {', '.join(known)}"
                raise ValueError(f"unknown key {key}; {hint}")
        return raw


S = TypeVar("S", bound=Settings)


def read_toml(path: Path, wanted: str) -> dict[str, Any]:
    """A file's tables. `ConfigError` for one that is not there, which says what is `wanted`, or cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give {wanted}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def parse_settings(model: type[S], raw: Mapping[str, Any], path: Path) -> S:
    """The tables of `path` as a `model`; `ConfigError` with the path of the first field that is wrong."""
    with explain_fields(path):
        return model.model_validate(raw)


@contextmanager
def explain_fields(place: object) -> Iterator[None]:
    """Turns what is wrong with a field of settings that are made inside into a `ConfigError` that begins with `place`
    and names the field."""
    try:
        yield
    except ValidationError as error:
        raise ConfigError(f"{place}: {_sentence(error)}") from None


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "missing":
        return f"{place} is missing; give it"
    if first["type"] == "value_error":
        words = first["msg"].removeprefix("Value error, ")
        return f"{place}: {words}" if place else words
    wanted = _WANTED.get(first["type"], "of another kind").format(**first.get("ctx", {}))
    return f"{place} is {brief(first['input'])}; it must be {wanted}"
