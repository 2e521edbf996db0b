"""README.zh.md says what README.md says: the same headings, commands, figures and links."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
ADVICE = "README.zh.md has to follow README.md: change both"


def read_blocks(text: str) -> list[list[str]]:
    """The lines of code blocks without their comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [[re.sub(r"\s*#.*", "", line) for line in block.splitlines()] for block in blocks]


def read_rows(text: str) -> list[tuple[list[str], list[str]]]:
    """Code and figures of each row of a table."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [
        (re.findall(r"`[^`]+`", row), sorted(re.findall(r"\d[\d.,]*\d|\d", re.sub(r"`[^`]+`", "", row))))
        for row in rows
    ]


def read_levels(text: str) -> list[int]:
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [len(mark) for mark in re.findall(r"^(#+) ", prose, re.MULTILINE)]


def test_headings_have_the_same_levels() -> None:
    assert read_levels(ENGLISH) == read_levels(CHINESE), ADVICE


def test_commands_are_the_same() -> None:
    assert read_blocks(ENGLISH) == read_blocks(CHINESE), ADVICE


def test_tables_have_the_same_commands_and_figures() -> None:
    english, chinese = read_rows(ENGLISH), read_rows(CHINESE)
    assert len(english) == len(chinese), ADVICE
    for ours, theirs in zip(english, chinese, strict=True):
        assert ours == theirs, ADVICE


def test_links_lead_to_the_same_pages() -> None:
    english, chinese = (
        set(re.findall(r"\]\(([^)#]+)", text)) - {"README.md", "README.zh.md"} for text in (ENGLISH, CHINESE)
    )
    assert english == chinese, ADVICE
    assert all((ROOT / path).exists() for path in chinese if not path.startswith("http"))
