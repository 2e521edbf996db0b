"""README and docs: their links lead somewhere, their commands exist, and what the README prints runs as printed."""

from __future__ import annotations

import re
import shlex
import urllib.parse
from pathlib import Path

import pytest
from PIL import Image

from keye.cli import VERBS, main

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "examples/**/*.md",
        "benchmarks/*.md",
        "plugins/*/*.md",
        "src/keye/assets/**/*.md",
    )
    for page in ROOT.glob(pattern)
)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def heading_names(page: Path) -> set[str]:
    """The names by which links reach the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        path, _, heading = urllib.parse.unquote(target).partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name} links to {target}, which does not exist"
        assert not heading or heading in heading_names(linked), (
            f"{page.name} links to {target}, which has no such heading"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for script in re.findall(r"python ((?:benchmarks|examples|docs|tests)/[\w/]+\.py)", text):
        assert (ROOT / script).exists(), f"{page.name} names {script}, which does not exist"
    for module in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{page.name} names {module}, which does not exist"
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)", text)) <= targets
    assert set(re.findall(r"`keye ([a-z]+)[ `]", text)) <= set(VERBS)


def test_the_picture_of_the_page_is_small() -> None:
    path = ROOT / "docs/images/page.png"
    with Image.open(path) as picture:
        assert picture.size == (1280, 800) and path.stat().st_size < 120_000


def test_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [script] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(script, {})
    assert capsys.readouterr().out == "[[3.0, 8.5]] ((3.0, 8.5),)\n"


def test_commands_of_the_readme_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = "".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL))
    commands = [shlex.split(line, comments=True)[1:] for line in blocks.splitlines() if line.startswith("keye ")]
    commands = [command for command in commands if not {"1.5", "2.0", "keye-2.0-int4"} & set(command)]  # to download
    assert [command[0] for command in commands] == ["ask", "find", "plan"]
    for command in commands:
        assert main(command) == 0
    text = capsys.readouterr().out
    assert "[[3.0, 8.5]]" in text and "2.0 s to 14.5 s" in text and "512 visual tokens" in text


def test_table_of_machines_is_what_inspect_prints(capsys: pytest.CaptureFixture[str]) -> None:
    rows = re.findall(r"^\| (?:GPU|computer) .*$", README, flags=re.MULTILINE)
    assert main(["inspect", "--machines"]) == 0
    assert rows and set(rows) <= set(capsys.readouterr().out.splitlines())
