"""docs/architecture.md names every package and top-level module of keye, and none that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import keye

ROOT = Path(keye.__file__).parent
DOCUMENT = Path(__file__).parents[1] / "docs/architecture.md"


def list_packages() -> set[str]:
    """Dotted names of the packages below keye and of the modules beside them."""
    packages = {path.parent for path in ROOT.rglob("__init__.py") if path.parent != ROOT}
    modules = {path.with_suffix("") for path in ROOT.glob("*.py") if not path.name.startswith("__")}
    return {".".join(("keye", *path.relative_to(ROOT).parts)) for path in packages | modules}


def test_the_table_of_packages_is_complete() -> None:
    table = [
        line.split("|")[1] for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| `keye")
    ]
    listed = {name for cell in table for name in re.findall(r"`(keye[a-z0-9_.]*)`", cell)}
    assert listed == list_packages()
