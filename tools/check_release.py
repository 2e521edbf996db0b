"""Check that everything that carries the version says the same, for a tag where one is passed.

    python tools/check_release.py [TAG] [--notes]

The version of `src/keye/version.py` is the one of the plug-in, of `CITATION.cff` and of the newest numbered heading of
the changelog, `## [1.2.3] - 2027-01-31`. Between releases the changelog opens with `## [Unreleased]` and its newest
number may be older. With a tag, `v1.2.3` must be that version, and nothing may be unreleased. `--notes` prints the
changelog of the version.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def search(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    assert match, f"nothing matches {pattern}"
    return match[1]


def sections(changelog: str) -> dict[str, str]:
    """Text below each heading of the changelog, by version or "Unreleased", in the order of the file."""
    parts = re.split(r"^## \[([^]]+)\](?: - \d{4}-\d\d-\d\d)?$", changelog, flags=re.MULTILINE)
    return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def find_problems(root: Path, tag: str | None = None) -> list[str]:
    """What disagrees with the version of the package, a sentence each."""
    version = search(r'^__version__: Final = "(.+)"$', (root / "src/keye/version.py").read_text())
    plugin = tomllib.loads((root / "plugins/keye-vllm/pyproject.toml").read_text())["project"]["version"]
    citation = search(r"^version: (.+)$", (root / "CITATION.cff").read_text())
    names = list(sections((root / "CHANGELOG.md").read_text()))
    numbered = [name for name in names if name != "Unreleased"]
    problems = []
    if plugin != version:
        problems.append(f"plugins/keye-vllm/pyproject.toml has version {plugin}, keye is {version}")
    if citation != version:
        problems.append(f"CITATION.cff has version {citation}, keye is {version}")
    if tag is not None and tag != f"v{version}":
        problems.append(f"the tag is {tag}, keye is {version}; tag v{version}, or change src/keye/version.py")
    if names[:1] == ["Unreleased"] and tag is None:
        return problems
    if names[:1] != [version]:
        problems.append(f"the changelog opens with {names[0]}, which must be {version} in a release")
    if len(set(numbered)) < len(numbered):
        problems.append("a version occurs twice in the changelog")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag", nargs="?")
    parser.add_argument("--notes", action="store_true")
    options = parser.parse_args()
    problems = find_problems(ROOT, options.tag)
    print("\n".join(problems), end="\n" if problems else "", file=sys.stderr)
    if options.notes and not problems:
        name, text = next(iter(sections((ROOT / "CHANGELOG.md").read_text()).items()))
        print(text or name)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
