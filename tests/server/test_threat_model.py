"""The threat model names tests; they must be there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_threat_model_names_exists() -> None:
    named = re.findall(r"`(tests/[a-z_/]+\.py)::(test_\w+)`", (ROOT / "docs" / "threat-model.md").read_text())
    assert len(named) > 40
    missing = [(file, test) for file, test in named if f"def {test}(" not in (ROOT / file).read_text()]
    assert missing == []


def test_every_attack_of_the_list_has_its_row() -> None:
    text = (ROOT / "docs" / "threat-model.md").read_text().partition("## The list of attacks")[2]
    rows = "".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| "))
    assert set(map(int, re.findall(r"\d+", rows))) == set(range(1, 25))
