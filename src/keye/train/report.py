"""The report of a training run: one HTML file with its curves, the answers before and after, and its configuration. It
loads nothing from elsewhere, runs no script and reads on screens and paper.

Plain data in, text out: reads the run's log, and knows neither models nor data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Final

from keye.errors import is_number
from keye.html_report import STYLE, cut_text, details, facts_table, pick_ticks, to_text, write_html
from keye.units import format_bytes
from keye.version import __version__

REPORT_FILE: Final = "report.html"
#: Points of a curve that are drawn; of more, means.
_MOST_POINTS: Final = 600
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 220, 72, 28, 10
_STYLE: Final = (
    STYLE + "svg .stage { stroke: var(--soft); } .first-text { color: var(--first); } .second-text "
    "{ color: var(--second); } svg .first { stroke: var(--first); fill: none; } svg .second { stroke: var(--second); "
    "fill: none; }\n"
)  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """Curves with one axis: `names` are figures of the log, with what they are called. `write` puts a value of the axis
    into words."""

    title: str
    names: Mapping[str, str]
    write: Callable[[float], str] = "{:.4g}".format


#: What is drawn, where the log has it.
CHARTS: Final = (
    Chart("Loss", {"loss": "training", "val_loss": "validation"}),
    Chart("Learning rate", {"lr": "of the language model"}, "{:.2e}".format),
    Chart("Memory", {"memory_bytes": "at most"}, format_bytes),
    Chart("Throughput", {"tokens_per_second": "tokens a second", "steps_per_second": "steps a second"}),
    Chart("Norm of the gradient", {"grad_norm": "before clipping"}),
)


@dataclass(frozen=True)
class AnsweredSample:
    """A question of held-out data: the reply in the data, and the model's before and after training; None where it was
    not asked."""

    question: str
    expected: str
    before: str | None = None
    after: str | None = None
    media: Sequence[str] = field(default_factory=tuple)


def read_log(file: Path) -> list[dict[str, Any]]:
    """The records of a log; lines that a crash cut off are left out."""
    records = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def write_report(
    path: Path, title: str, facts: Mapping[str, Any], log: Sequence[Mapping[str, Any]],
    samples: Sequence[AnsweredSample] = (), texts: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Writes the report. `facts` stand in its first table, `texts` (such as the configuration) folded at its end."""
    charts = [drawn for chart in CHARTS if (drawn := draw_chart(chart, log))]
    parts = [
        f"<h1>{to_text(title)}</h1>", facts_table("Run", {**facts, "keye": __version__}),
        "<h2>Curves</h2>", *(charts or ["<p>The log has no figures yet.</p>"]),
        *(["<h2>Answers before and after</h2>", _samples(samples)] if samples else []),
        "<h2>Words</h2>", *(details(name, text) for name, text in (texts or {}).items()),
    ]  # fmt: skip
    write_html(path, title, parts, _STYLE)


def draw_chart(chart: Chart, log: Sequence[Mapping[str, Any]]) -> str:
    """The chart as a figure; empty where the log has none of its figures. Steps of later stages follow those of
    earlier ones."""
    steps, borders = _count_steps(log)
    curves: dict[str, list[tuple[float, float]]] = {}
    for name in chart.names:
        records = zip(steps, log, strict=True)
        points = [(float(step), float(record[name])) for step, record in records if is_number(record.get(name))]
        if points:
            curves[name] = _thin(points)
    if not curves:
        return ""
    values = [value for points in curves.values() for _, value in points]
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = (0.0 if 0 <= low < margin * 4 else low - margin), high + margin
    last = max(steps[-1], 1)

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 12) * step / last

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    marks = [_axis(chart, low, high, last, x, y)]
    marks += [
        f'<path class="stage" stroke-dasharray="4 4" d="M{x(step):.1f} {_TOP}V{_HEIGHT - _BOTTOM}" />'
        for step in borders
    ]
    words = []
    for kind, (name, points) in zip(("first", "second"), curves.items(), strict=False):
        line = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)
        alone = f'<circle class="{kind}" cx="{x(points[0][0]):.1f}" cy="{y(points[0][1]):.1f}" r="2" />'
        marks.append(f'<path class="{kind}" d="M{line}" />' if len(points) > 1 else alone)
        last_value = to_text(chart.write(points[-1][1]))
        words.append(f'<small class="{kind}-text">{to_text(chart.names[name])}, last {last_value}</small>')
    label = f"{chart.title} over steps"
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(marks)}</svg>'
    return f"<figure><figcaption>{to_text(chart.title)} {' '.join(words)}</figcaption>\n{svg}</figure>"


def _axis(
    chart: Chart, low: float, high: float, last: int, x: Callable[[float], float], y: Callable[[float], float]
) -> str:
    marks = []
    for value in pick_ticks(low, high, 4):
        marks.append(f'<path class="grid" d="M{_LEFT} {y(value):.1f}H{_WIDTH - 12}" />')
        marks.append(
            f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{to_text(chart.write(value))}</text>'
        )
    for step in pick_ticks(0, last, 6):
        marks.append(f'<text x="{x(step):.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{step:,.0f}</text>')
    return "".join(marks)


def _count_steps(log: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """The step of each record over all stages, and the steps at which stages begin but for the first."""
    steps, borders, before, stage, last = list[int](), list[int](), 0, None, 0
    for record in log:
        if stage is not None and record.get("stage") != stage:
            before = last
            borders.append(before)
        stage = record.get("stage")
        step = record.get("step")
        last = before + (int(step) if is_number(step) else last - before)  # type: ignore[arg-type]
        steps.append(last)
    return steps, borders


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_MOST_POINTS` points: means of neighbours."""
    size = math.ceil(len(points) / _MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(step for step, _ in g) / len(g), sum(value for _, value in g) / len(g)) for g in groups]


def _samples(samples: Sequence[AnsweredSample]) -> str:
    names = ("question", "in the data", "before", "after")
    head = "".join(f"<th scope=col>{name}</th>" for name in names)
    rows = ""
    for sample in samples:
        media = "".join(f"[{name}]\n" for name in sample.media)
        cells = (media + sample.question, sample.expected, sample.before, sample.after)
        rows += "<tr>" + "".join(f"<td>{cut_text('-' if cell is None else cell)}</td>" for cell in cells) + "</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
