"""Writing TOML: settings as the files that `keye.config.settings` reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keye.config.settings import Settings

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(settings: Settings | Mapping[str, Any]) -> str:
    """Settings, or plain data, as the text of a TOML file. Fields that are None are left out: TOML has no word for
    them; the file says everything else, defaults too."""
    lines: list[str] = []
    _write_table(lines, (), _plain(settings))
    return "\n".join(lines).strip() + "\n"


def _plain(value: Any) -> Any:
    """Plain data under the names that files give their fields."""
    if isinstance(value, Settings):
        fields = type(value).model_fields
        value = {str(field.validation_alias or name): getattr(value, name) for name, field in fields.items()}
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items() if entry is not None}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _write_table(lines: list[str], path: tuple[str, ...], table: Mapping[str, Any]) -> None:
    """Values first, then tables: what follows the heading of a table belongs to it."""
    tables = {name: value for name, value in table.items() if isinstance(value, Mapping) or _is_tables(value)}
    lines += [f"{_key(name)} = {_value(value)}" for name, value in table.items() if name not in tables]
    for name, value in tables.items():
        inner = (*path, name)
        heading = ".".join(map(_key, inner))
        for entry in value if _is_tables(value) else (value,):
            lines += ["", f"[[{heading}]]" if _is_tables(value) else f"[{heading}]"]
            _write_table(lines, inner, entry)


def _is_tables(value: object) -> bool:
    """Whether a value is a list of tables that is written below headings of their own."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(entry, Mapping) for entry in value)


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _text(name)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return _text(str(value))
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(name)} = {_value(entry)}" for name, entry in value.items()) + " }"
    assert isinstance(value, Sequence), f"{type(value).__name__} has no form in TOML"
    return "[" + ", ".join(map(_value, value)) + "]"
