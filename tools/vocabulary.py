"""Checks names and texts against the project's word list (tools/vocabulary.toml). Exits with 1 where one is used.

    python tools/vocabulary.py [--summary] [PATH ...]

Names are checked where they are defined (functions, classes, arguments, assigned variables); texts in comments, strings
and documentation. A line that ends in `# vocabulary: allow` is skipped, as are CHANGELOG.md and recorded test data.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXTS = {".md", ".js", ".html", ".css", ".toml", ".yaml", ".yml", ".h", ".cpp"}
SKIPPED = ("CHANGELOG.md", "tools/vocabulary", "tests/golden/", "src/keye/assets/", "tests/clients/package-lock.json")
ALLOW = "vocabulary: allow"

Finding = tuple[int, str, str]  # line number, what was found, what to use instead


def iter_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each definition."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def iter_texts(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each comment and string of a Python file, line by line."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in kinds:
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


def check_file(path: Path, identifiers: dict[str, str], phrases: list[tuple[re.Pattern[str], str]]) -> list[Finding]:
    """Findings of one file, by line."""
    source = path.read_text(encoding="utf-8")
    findings: list[Finding] = []
    texts: Iterator[tuple[int, str]] = enumerate(source.splitlines(), 1)
    if path.suffix == ".py":
        for number, name in iter_names(ast.parse(source)):
            if (plain := name.strip("_").lower()) in identifiers:
                findings.append((number, f"name {name!r}", identifiers[plain]))
        texts = iter_texts(source)
    for number, text in texts:
        for pattern, instead in phrases:
            findings += [(number, repr(match.group()), instead) for match in pattern.finditer(text)]
    lines = source.splitlines()
    return sorted(finding for finding in set(findings) if ALLOW not in lines[finding[0] - 1])


def list_files(paths: list[str]) -> list[Path]:
    """The tracked files that are checked, all or those at or below `paths`."""
    listed = subprocess.run(["git", "ls-files", "--", *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.splitlines() if not name.startswith(SKIPPED)]
    return [ROOT / name for name in names if Path(name).suffix in TEXTS | {".py"} and (ROOT / name).is_file()]


def main() -> int:
    parser = argparse.ArgumentParser(description="check names and texts against tools/vocabulary.toml")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="files or folders; all tracked files by default")
    parser.add_argument("--summary", action="store_true", help="counts by folder instead of lines")
    options = parser.parse_args()
    words = tomllib.loads((ROOT / "tools/vocabulary.toml").read_text(encoding="utf-8"))
    phrases = [(re.compile(pattern, re.IGNORECASE), instead) for pattern, instead in words["phrases"].items()]
    by_folder: Counter[str] = Counter()
    for path in list_files(options.paths):
        name = path.relative_to(ROOT)
        for number, match, instead in check_file(path, words["identifiers"], phrases):
            by_folder["/".join(name.parts[:3])] += 1
            if not options.summary:
                print(f"{name}:{number}: {match}: use {instead}")
    if options.summary:
        for folder, count in by_folder.most_common():
            print(f"{count:6} {folder}")
    if by_folder:
        print(f"{by_folder.total()} uses of words that tools/vocabulary.toml replaces", file=sys.stderr)
    return bool(by_folder)


if __name__ == "__main__":
    sys.exit(main())
