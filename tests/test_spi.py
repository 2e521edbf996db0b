"""The public surface: the names of `keye` and `keye.spi`, and a plug-in that imports nothing else."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import keye
from keye import spi
from tests.support.spi_contract import FILE, describe_all

PLUGIN = Path(__file__).parents[1] / "plugins" / "keye-vllm" / "src"


def imports_of_keye(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that is imported from keye."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "keye")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "keye":
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("file", sorted(PLUGIN.rglob("*.py")), ids=lambda file: file.name)
def test_the_plugin_imports_public_names_only(file: Path) -> None:
    public = {"keye": keye.__all__, "keye.spi": spi.__all__}
    for module, name in imports_of_keye(ast.parse(file.read_text())):
        assert name in public.get(module, ()), f"{module} {name} is not public"


def test_names_and_signatures_are_those_of_the_contract() -> None:
    """After a wanted change: `python -m tests.support.spi_contract`, and a line in the changelog."""
    assert describe_all() == FILE.read_text()


def test_every_name_of_spi_is_exported_and_used_by_a_plugin() -> None:
    used = {name for file in PLUGIN.rglob("*.py") for module, name in imports_of_keye(ast.parse(file.read_text()))}
    #: Types of values that the other names take or return.
    types = {"Backend", "Prompt", "Release", "RowSpec"}
    assert set(spi.__all__) == (used - set(keye.__all__)) | types
    assert set(spi.__all__) <= set(dir(spi))


@pytest.mark.parametrize("name", keye.__all__)
def test_every_public_name_has_a_docstring(name: str) -> None:
    value = getattr(keye, name)
    assert name == "__version__" or inspect.getdoc(value), f"keye.{name} has no docstring"


def test_importing_keye_imports_no_torch() -> None:
    code = "import sys, keye; keye.KeyeError, keye.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
