"""The link check of the documentation finds what is broken and what would be loaded from elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.build_docs import find_problems

PAGE = '<html><body><h1 id="top">Page</h1><a href="other.html#part">ok</a><img src="image.png">{}</body></html>'


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "other.html").write_text(
        '<h2 id="part">Part</h2><a href="index.html#top">back</a><a href="#part">here</a>'
    )
    (tmp_path / "image.png").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", None),
        ('<a href="https://example.org/">elsewhere</a>', None),
        ('<a href="gone.html">gone</a>', "index.html links to gone.html, which does not exist"),
        ('<a href="other.html#gone">gone</a>', "index.html links to other.html#gone, which has no such anchor"),
        ('<a href="#gone">gone</a>', "index.html links to #gone, which has no such anchor"),
        ('<img src="gone.png">', "index.html links to gone.png, which does not exist"),
        (
            '<script src="https://cdn.example.org/x.js"></script>',
            "index.html loads https://cdn.example.org/x.js, which is not part of the site",
        ),
    ],
)
def test_links(site: Path, text: str, problem: str | None) -> None:
    (site / "index.html").write_text(PAGE.format(text))
    assert find_problems(site) == ([problem] if problem else [])
