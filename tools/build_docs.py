"""Build the documentation as a website and check its links (`make docs`).

    python tools/build_docs.py

Pages lie all over the repository and link to one another and to other files as GitHub resolves links. They are copied
with what they link to into build/docs, in the same arrangement, and MkDocs makes build/site of them by `mkdocs.yml`. A
link or an anchor that leads nowhere is an error, and so is anything that a reader's browser would load from elsewhere.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES, SITE = ROOT / "build/docs", ROOT / "build/site"
PAGES = ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/*.md", "plugins/*/*.md", "src/keye/assets/**/*.md")
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
#: Attributes whose address a browser loads by itself.
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}


def copy_pages() -> None:
    """Copy every page and each file that it links to; a folder gets a page that lists its files."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    for page in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        folder = page.parent

        def copy(match: re.Match[str], folder: Path = folder) -> str:
            start, address, end = match.groups()
            linked = (folder / urllib.parse.unquote(address)).resolve()
            if linked.suffix == ".md" or not linked.exists() or not linked.is_relative_to(ROOT):
                return match[0]
            target = SOURCES / linked.relative_to(ROOT)
            if linked.is_file():
                write(target, linked.read_bytes())
                return match[0]
            files = sorted(path for path in linked.iterdir() if path.is_file())
            for file in files:
                write(target / file.name, file.read_bytes())
            if (linked / "README.md").exists():
                return f"{start}{address.rstrip('/')}/README.md{end}"
            listing = f"# {linked.name}\n\n" + "".join(f"- [{file.name}]({file.name})\n" for file in files)
            write(target / "index.md", listing.encode())
            return f"{start}{address.rstrip('/')}/index.md{end}"

        text = LINK.sub(copy, page.read_text(encoding="utf-8"))
        write(SOURCES / page.relative_to(ROOT), text.encode())


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


class _Page(HTMLParser):
    """Names of the anchors of a page, and the addresses in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.anchors.update(value for name in ("id", "name") if (value := values.get(name)))
        if tag == "a" and (address := values.get("href")):
            self.links.append(address)
        if address := values.get(LOADED.get(tag, "")):
            self.loaded.append(address)


def find_problems(site: Path) -> list[str]:
    """Links that lead nowhere and resources from elsewhere, a sentence each."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    problems = []
    for path, page in pages.items():
        name = path.relative_to(site)
        for address in page.loaded:
            if re.match(r"[a-z]+:|//", address) and not address.startswith("data:"):
                problems.append(f"{name} loads {address}, which is not part of the site")
        for address in page.links + page.loaded:
            target, _, anchor = urllib.parse.unquote(address).partition("#")
            if re.match(r"[a-z]+:|//", target) or name.name == "404.html":
                continue
            linked = Path(os.path.normpath(path.parent / target.partition("?")[0])) if target else path
            linked = linked / "index.html" if linked.is_dir() else linked
            if not linked.is_file():
                problems.append(f"{name} links to {address}, which does not exist")
            elif anchor and linked in pages and anchor not in pages[linked].anchors:
                problems.append(f"{name} links to {address}, which has no such anchor")
    return problems


def main() -> int:
    copy_pages()
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(ROOT / "mkdocs.yml")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout)
        return 1
    problems = find_problems(SITE)
    pages = len(list(SITE.rglob("*.html")))
    print("\n".join(problems) or f"{pages} pages are in {SITE.relative_to(ROOT)}, their links are in order")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
