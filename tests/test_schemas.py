"""JSON schemas in docs/schemas: current, and true to the example files that name them."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCHEMAS = ROOT / "docs" / "schemas"


def test_the_schemas_are_current() -> None:
    check = subprocess.run([sys.executable, "-m", "tools.schemas", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr


def test_a_wrong_argument_writes_nothing() -> None:
    command = [sys.executable, "-m", "tools.schemas", "--chek"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "--chek" in result.stderr


@pytest.mark.parametrize(
    ("example", "schema"),
    [
        ("nano.toml", "train.json"),
        ("nano-modes.toml", "train.json"),
        ("nano-mpo.toml", "train.json"),
        ("fleet.toml", "fleet.json"),
    ],
)
def test_examples_name_the_schema_that_they_follow(example: str, schema: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    text = (ROOT / "configs" / example).read_text(encoding="utf-8")
    assert text.startswith(f"#:schema ../docs/schemas/{schema}\n")
    jsonschema.validate(tomllib.loads(text), json.loads((SCHEMAS / schema).read_text()))


@pytest.mark.parametrize("name", ["generation_config.json", "preprocessor_config.json"])
def test_files_of_keye_nano_follow_their_schemas(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(
        json.loads((ROOT / "configs" / "nano" / name).read_text()), json.loads((SCHEMAS / name).read_text())
    )
