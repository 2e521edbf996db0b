"""The report of a run: curves of its log, answers before and after, nothing loaded from elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from keye.train.report import CHARTS, AnsweredSample, Chart, draw_chart, read_log, write_report

LOG = [
    {"stage": "one", "step": 5, "loss": 2.0, "lr": 1e-4},
    {"stage": "one", "step": 10, "loss": 1.0, "lr": 5e-5, "val_loss": 1.5},
    {"stage": "two", "step": 10, "loss": 0.5, "val_loss": None},
]
LOSS = CHARTS[0]


def points_of(figure: str, kind: str) -> list[tuple[float, float]]:
    match = re.search(rf'<path class="{kind}" d="M([^"]+)"', figure)
    return [] if match is None else [tuple(map(float, pair.split())) for pair in match[1].split("L")]


def test_a_curve_goes_through_the_figures_of_the_log() -> None:
    figure = draw_chart(LOSS, LOG)
    ElementTree.fromstring(figure)
    points = points_of(figure, "first")
    (x1, y1), (x2, y2), (x3, y3) = points
    assert (x3 - x2) / (x2 - x1) == pytest.approx(2, abs=0.01)  # steps 5, 10 and 10 + 10
    assert (y3 - y2) / (y2 - y1) == pytest.approx(0.5, abs=0.01) and y3 > y2 > y1
    assert "training, last 0.5" in figure and figure.count('class="stage"') == 1
    assert '<circle class="second"' in figure  # one value of the validation


@pytest.mark.parametrize("values", [[1.0] * 5, [0.0, 0.0], [-3.0, 4.0], [1e-9, 2e-9], [1e9], list(range(5000))])
def test_any_figures_are_drawn(values: list[float]) -> None:
    log = [{"stage": "a", "step": number + 1, "loss": value} for number, value in enumerate(values)]
    figure = draw_chart(LOSS, log)
    root = ElementTree.fromstring(figure)
    assert len(points_of(figure, "first")) <= 600
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d", "".join(p.get("d", "") for p in root.iter("path")))]
    assert all(-1 <= number <= 641 for number in numbers)


def test_figures_that_the_log_lacks_are_not_drawn() -> None:
    assert draw_chart(Chart("Memory", {"memory_bytes": "at most"}), LOG) == "" == draw_chart(LOSS, [])


def test_the_report_loads_nothing_and_shows_texts_as_they_are(tmp_path: Path) -> None:
    sample = AnsweredSample("what is <b>red</b>?", "a & b", None, "<script>", ["a<b>.mp4"])
    write_report(tmp_path / "report.html", "captions <1>", {"steps": 20}, LOG, [sample], {"Configuration": 'a = "<x>"'})
    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html and "<b>" not in html and "http://" not in html and "https://" not in html
    assert "&lt;script&gt;" in html and "what is &lt;b&gt;red&lt;/b&gt;?" in html and "[a&lt;b&gt;.mp4]" in html
    assert "default-src 'none'" in html and html.count("<figure>") == 2


def test_a_log_that_a_crash_cut_off_is_read(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps(LOG[0]) + '\n{"stage": "on')
    assert read_log(tmp_path / "log.jsonl") == LOG[:1]
    assert read_log(tmp_path / "none.jsonl") == []
