"""The JSON files of a checkpoint: reading them, and the kinds of values that their fields may have.

They are checked here and not with pydantic (`keye.config.settings`), whose import would cost every `keye ask` 0.06 s of
processor time, 2 % of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from keye.errors import KeyeError, is_number, is_whole


class ConfigError(KeyeError):
    """A configuration file is missing, unreadable, incomplete or contradicts itself."""


def read_json(path: Path) -> dict[str, Any]:
    """Parses a JSON object from a file; `ConfigError` with one sentence otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a checkpoint folder needs it") from None
    except (ValueError, RecursionError, OSError) as error:  # also of numbers and nesting beyond Python's limits
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that chat templates write by name (`bos_token` and the like), of a folder's
    tokenizer_config.json; none where there is no such file."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    named = {name: settings.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    texts = {name: value.get("content") if isinstance(value, Mapping) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def read_keye_fields(raw: Mapping[str, Any], path: Path, known: Collection[str]) -> dict[str, Any]:
    """The `keye` object of a file, whose fields must be among `known`."""
    own = raw.get("keye", {})
    if not isinstance(own, Mapping):
        raise ConfigError(f"{path} has keye {own!r}; it must be an object")
    if unknown := sorted(set(own) - set(known)):
        raise ConfigError(f"{path} has unknown keye fields {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return dict(own)


def require(raw: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    if missing := [name for name in names if raw.get(name) is None]:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")


def _is_list(value: object, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(fits, value))


def _is_sentence(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _is_count(value: object) -> bool:
    return is_whole(value) and value >= 0  # type: ignore[operator]


#: Kinds of values: what fits, and the words for it.
_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "size": (lambda value: is_whole(value) and value >= 1, "a whole number of at least 1"),
    "count": (_is_count, "a whole number of at least 0"),
    "positive": (lambda value: is_number(value) and value > 0, "a number above 0"),
    "share": (lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "positive share": (lambda value: is_number(value) and 0 < value <= 1, "a number above 0 and at most 1"),
    "factor": (lambda value: is_number(value) and 0 < value <= 100, "a number above 0 and at most 100"),
    "scale": (lambda value: is_number(value) and value >= 0, "a number of at least 0"),
    "temperature": (lambda value: is_number(value) and 0 <= value <= 100, "a number 0 or more and at most 100"),
    "flag": (lambda value: isinstance(value, bool), "true or false"),
    "text": (lambda value: isinstance(value, str), "a text"),
    "texts": (lambda value: _is_list(value, _is_sentence), "a list of texts"),
    "object": (lambda value: isinstance(value, Mapping), "an object"),
    "layers": (lambda value: _is_list(value, is_whole), "a list of layer numbers"),
    "token": (_is_count, "a token id"),
    "tokens": (lambda value: _is_count(value) or _is_list(value, _is_count), "a token id or a list of them"),
    "three numbers": (lambda value: _is_list(value, is_number) and len(value) == 3, "three numbers"),
    "three sizes": (lambda value: _is_list(value, is_whole) and len(value) == 3, "three whole numbers"),
}


def check_fields(
    where: str,
    values: Mapping[str, Any],
    kinds: Mapping[str, Iterable[str]],
    *,
    required: Collection[str] = (),
    form: str = "{where} has {name} {value!r}",
) -> None:
    """`ConfigError` for the first field whose value is not of its kind; `kinds` lists the fields of each. None fits
    fields that are not `required`, and a missing field is right. `form` begins the sentence of the error."""
    for kind, names in kinds.items():
        fits, words = _KINDS[kind]
        for name in names:
            value = values.get(name)
            if name in values and not (fits(value) or (value is None and name not in required)):
                raise ConfigError(f"{form.format(where=where, name=name, value=value)}; it must be {words}")


def required_fields(config: type) -> frozenset[str]:
    """The fields of a dataclass that cannot be None."""
    hints = get_type_hints(config)
    return frozenset(name for name, hint in hints.items() if NoneType not in get_args(hint))


def check_format(name: str, text: str, **fields: Any) -> None:
    """`ConfigError` for a text with other {fields} than these, which are filled in later."""
    try:
        text.format(**fields)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        listed = ", ".join("{" + field + "}" for field in fields)
        raise ConfigError(f"{name} {text!r} may only use the field {listed}: {error}") from None
