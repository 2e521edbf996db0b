"""The version is the same wherever it stands, and a tag publishes no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.check_release import ROOT, find_problems, sections

UNRELEASED = "# Changelog\n\n## [Unreleased]\n\n- Added: much.\n\n## [1.2.2] - 2027-01-01\n\nOld.\n"
RELEASED = UNRELEASED.replace("## [Unreleased]", "## [1.2.3] - 2027-01-31")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    texts = {
        "src/keye/version.py": '__version__: Final = "1.2.3"\n',
        "plugins/keye-vllm/pyproject.toml": '[project]\nname = "keye-vllm"\nversion = "1.2.3"\n',
        "CITATION.cff": "cff-version: 1.2.0\nversion: 1.2.3\n",
        "CHANGELOG.md": RELEASED,
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_this_tree_agrees() -> None:
    assert find_problems(ROOT) == []


def test_a_release_with_its_tag(tree: Path) -> None:
    assert find_problems(tree) == find_problems(tree, "v1.2.3") == []
    assert list(sections(RELEASED)) == ["1.2.3", "1.2.2"] and sections(RELEASED)["1.2.3"] == "- Added: much."


def test_between_releases_the_changelog_may_be_behind(tree: Path) -> None:
    (tree / "CHANGELOG.md").write_text(UNRELEASED)
    assert find_problems(tree) == []
    assert find_problems(tree, "v1.2.3") == ["the changelog opens with Unreleased, which must be 1.2.3 in a release"]


@pytest.mark.parametrize("name", ["plugins/keye-vllm/pyproject.toml", "CITATION.cff", "CHANGELOG.md"])
def test_another_version_is_named(tree: Path, name: str) -> None:
    (tree / name).write_text((tree / name).read_text().replace("1.2.3", "1.2.1"))
    (problem,) = find_problems(tree)
    assert "1.2.1" in problem and "1.2.3" in problem


def test_another_tag_is_named(tree: Path) -> None:
    (problem,) = find_problems(tree, "v1.3.0")
    assert problem == "the tag is v1.3.0, keye is 1.2.3; tag v1.2.3, or change src/keye/version.py"
