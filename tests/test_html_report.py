"""Charts and tables of reports: well-formed, inside their frame, texts as they are."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from keye.html_report import (
    DotRow,
    LineChart,
    Series,
    draw_dots,
    draw_grid,
    draw_line_figure,
    draw_lines,
    table,
    to_file,
    write_html,
)

LINES = LineChart(
    "Score <1>", "frames", [
        Series("ours & co", [(16, 20.0), (64, 80.0), (256, 50.0)], [(10.0, 30.0), None, (40.0, 60.0)]),
        Series("theirs", [(64, 70.0)], theirs=True),
    ], is_logarithmic=True,
)  # fmt: skip


def points(svg: str, kind: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(rf'<circle class="{kind}" cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_lines_go_through_their_points_on_a_logarithmic_axis() -> None:
    svg = draw_lines(LINES)
    ElementTree.fromstring(svg)
    (x1, y1), (x2, y2), (x3, y3) = points(svg, "series-0")
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)  # 16, 64, 256
    assert (y1 - y2) / (y3 - y2) == pytest.approx(2, abs=0.02)
    assert svg.count('class="error series-0"') == 2 and points(svg, "series-1 theirs") != []


@pytest.mark.parametrize("chart", [
    LineChart("t", "x", []), LineChart("t", "x", [Series("a", [(5, -3.0)])]),
    LineChart("t", "x", [Series("a", [(0, 400.0), (1, 7.0)])], is_logarithmic=True),
    LineChart("t", "x", [Series(str(n), [(n, n)]) for n in range(9)]),
])  # fmt: skip
def test_any_values_stay_inside_the_frame(chart: LineChart) -> None:
    svg = draw_lines(chart, is_named=True)
    root = ElementTree.fromstring(svg)
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    for circle in root.iter("circle"):
        assert 0 <= float(circle.attrib["cx"]) <= width and 0 <= float(circle.attrib["cy"]) <= height


def test_a_grid_shows_its_values_and_leaves_unknown_cells_empty() -> None:
    svg = draw_grid("needles", "frames", "depth", ["16", "64"], ["0 %", "<100 %>"], {("16", "0 %"): 42.4})
    texts = [text.text for text in ElementTree.fromstring(svg).iter("text")]
    assert "42" in texts and texts.count("<100 %>") == 1 and svg.count("<rect") == 1


def test_dots_of_ours_and_theirs_differ() -> None:
    svg = draw_dots("all", [DotRow("a", {0: (50.0, (40.0, 60.0)), 1: (45.0, None)}, [("b", 70.0)])])
    ElementTree.fromstring(svg)
    assert len(points(svg, "series-0")) == len(points(svg, "series-1")) == len(points(svg, "series-5 theirs")) == 1


def test_a_chart_stands_alone_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text(to_file(draw_lines(LINES, is_named=True)))
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = (tmp_path / "a.svg").read_text()
    assert "ours &amp; co" in text and "--series-0: #0b6b66" in text and "url(" not in text


def test_pages_show_texts_as_they_are(tmp_path: Path) -> None:
    rows = [("<b>", None, 3.5), ("line\nbreak", "x", 1)]
    page = tmp_path / "page.html"
    write_html(page, "a <title>", [table("c", ("name", "text", "number"), rows, numbers=(2,)), draw_line_figure(LINES)])
    html = page.read_text()
    assert "&lt;b&gt;" in html and '<td class="text">-</td>' in html and "line\nbreak" in html
    assert "a &lt;title&gt;" in html and "Score &lt;1&gt;" in html and "<script" not in html
