"""TOML that keye writes is TOML that it reads."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from keye.config.settings import Settings, parse_settings
from keye.config.toml import to_toml

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SCALARS = st.one_of(TEXTS, st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False))
TABLES = st.recursive(
    st.dictionaries(TEXTS, SCALARS | st.lists(SCALARS, max_size=3), max_size=4),
    lambda tables: st.dictionaries(TEXTS, tables | st.lists(tables, max_size=3) | SCALARS, max_size=4),
    max_leaves=8,
)


@given(TABLES)
def test_plain_data_comes_back(raw: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(raw)) == raw


class Part(Settings):
    name: str
    lr: float = 1e-4
    minutes: float | None = None


class Run(Settings):
    model: Path = Field(strict=False)
    parts: tuple[Part, ...] = Field(validation_alias="part", strict=False)


def test_settings_come_back_under_the_names_of_their_file() -> None:
    run = Run(model=Path("a folder"), parts=(Part(name="first"), Part(name='say "x"\n', lr=3e-5, minutes=2.0)))
    text = to_toml(run)
    assert text.startswith('model = "a folder"\n\n[[part]]\nname = "first"\nlr = 0.0001\n\n[[part]]\n')
    assert parse_settings(Run, tomllib.loads(text), Path("run.toml")) == run
