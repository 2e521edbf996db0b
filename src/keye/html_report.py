"""Reports as one HTML file that loads nothing from elsewhere, runs no script and reads on screens and paper: its frame,
its tables, and charts as inline SVG, which also stand alone as files.

Plain data in, text out: knows nothing of models, training or evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Final

from keye.files import MARK, output_file
from keye.units import one_line

#: Letters of a text that are shown.
_MOST_LETTERS: Final = 20_000
#: Series of a chart have these colours, on light and on dark ground, and dashes, so that they differ without colour.
_COLORS: Final = (("#0b6b66", "#5fd0c6"), ("#a3520a", "#f0a35e"), ("#5b4bb5", "#b3a8f5"), ("#8f2d56", "#f08cb4"),
                  ("#3c6e1f", "#9bd477"), ("#4f5d5b", "#a7b4b2"))  # fmt: skip
_DASHES: Final = ("none", "6 3", "2 3", "8 3 2 3", "12 4", "1 4")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM, _TOP = 640, 260, 56, 14, 44, 12
_CELL_WIDTH, _CELL_HEIGHT = 64, 30
#: The colours of one page, and of a chart that stands alone, where nothing else sets them.
_PALETTE: Final = "".join(f" --series-{place}: light-dark({light}, {dark});"
                          for place, (light, dark) in enumerate(_COLORS))  # fmt: skip
_GROUND: Final = """ --ground: light-dark(#f4f6f6, #101415); --surface: light-dark(#fff, #181e1f);
  --line: light-dark(#d3dada, #333d3e); --text: light-dark(#17201f, #e8eeed); --soft: light-dark(#4f5d5b, #a7b4b2);"""
_CHART_STYLE: Final = """
svg path { fill: none; stroke-width: 1.5; vector-effect: non-scaling-stroke; } svg .grid { stroke: var(--line); }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } svg circle { stroke-width: 2; }
svg .theirs { fill: var(--surface); } svg .value { fill: var(--text); }
""" + "\n".join(
    f".series-{place} {{ stroke: var(--series-{place}); }} path.series-{place} {{ stroke-dasharray: {dash}; }} "
    f"circle.series-{place} {{ fill: var(--series-{place}); }} "
    f"path.error.series-{place} {{ stroke-dasharray: none; }} .label-{place} {{ color: var(--series-{place}); }} "
    f"svg text.label-{place} {{ fill: var(--series-{place}); }}"
    for place, dash in enumerate(_DASHES)
) + "\nsvg circle.theirs { fill: var(--surface); }\n"  # fmt: skip
STYLE: Final = f"""
:root {{ color-scheme: light dark;{_GROUND}{_PALETTE} --first: var(--series-0); --second: var(--series-1); }}
body {{ margin: 0 auto; max-width: 64rem; padding: 1.5rem; background: var(--ground); color: var(--text);
  font: 0.9rem/1.45 system-ui, "Noto Sans", "PingFang SC", "Microsoft YaHei", sans-serif;
  font-variant-numeric: tabular-nums; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.05rem; margin-top: 2rem; }} h3 {{ font-size: 0.95rem; }}
table {{ border-collapse: collapse; width: 100%; background: var(--surface); margin-top: 0.8rem; }}
th, td {{ border: 1px solid var(--line); padding: 0.3rem 0.6rem; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; white-space: pre-wrap; }}
.wide td, .wide th {{ overflow-wrap: break-word; }} .wide tbody th {{ min-width: 9rem; }}
td.number {{ text-align: right; white-space: pre; }} th.number {{ text-align: right; }}
caption {{ text-align: left; color: var(--soft); padding: 0.3rem 0; }} tbody th {{ font-weight: 600; }}
figure {{ margin: 1.5rem 0 0; }} figcaption {{ font-weight: 600; }} figcaption small {{ color: var(--soft); }}
svg {{ display: block; width: 100%; height: auto; background: var(--surface); border: 1px solid var(--line); }}
.warning {{ border-left: 4px solid var(--second); padding: 0.3rem 0.8rem; background: var(--surface); }}
.theirs {{ color: var(--soft); font-style: italic; }} .wide {{ overflow-x: auto; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; }} summary {{ cursor: pointer; }}
:focus-visible {{ outline: 3px solid var(--first); outline-offset: 2px; }}
@media print {{ body {{ max-width: none; }} }}
{_CHART_STYLE}"""


@dataclass(frozen=True)
class Series:
    """A line of a chart: (x, y) in order of x; `intervals` are the (low, high) of y at each point, None where unknown.
    One that is `theirs` was not measured here and is drawn hollow."""

    name: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float] | None] = field(default_factory=tuple)
    theirs: bool = False


@dataclass(frozen=True)
class LineChart:
    """Lines over one axis of values from `low` to `high`. `places` are the values of x that get a mark; with
    `is_logarithmic` that axis is logarithmic. Six lines can be distinguished, more are left out."""

    title: str
    x_name: str
    series: Sequence[Series]
    places: Sequence[float] = ()
    low: float = 0.0
    high: float = 100.0
    is_logarithmic: bool = False


@dataclass(frozen=True)
class DotRow:
    """A row of a dot chart: values of ours by place of their series, with intervals, and those of others."""

    name: str
    ours: Mapping[int, tuple[float, tuple[float, float] | None]]
    theirs: Sequence[tuple[str, float]] = ()


def write_html(path: Path, title: str, parts: Iterable[str], style: str = STYLE) -> None:
    """Writes the page; `parts` are HTML already."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    html = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<!-- {MARK} -->\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{to_text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"
    )  # fmt: skip
    with output_file(path) as draft:
        draft.write_text(html, encoding="utf-8", errors="replace")


def to_text(value: object) -> str:
    """A value as HTML on one line."""
    return escape(one_line(str(value)))


def cut_text(text: str) -> str:
    """A text as HTML with its line breaks, cut where it is very long."""
    return escape(text[:_MOST_LETTERS] + (" ..." if len(text) > _MOST_LETTERS else ""))


def facts_table(caption: str, facts: Mapping[str, object]) -> str:
    """Names and values, a row each."""
    rows = "".join(
        f"<tr><th scope=row>{to_text(name)}</th><td>{to_text(value)}</td></tr>" for name, value in facts.items()
    )
    return f"<table><caption>{to_text(caption)}</caption><tbody>{rows}</tbody></table>"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    """A table; columns of `numbers` are aligned to the right. None is shown as a dash."""
    kinds = ["number" if place in numbers else "text" for place in range(len(head))]
    names = "".join(
        f'<th scope=col class="{kind}">{to_text(name)}</th>' for kind, name in zip(kinds, head, strict=True)
    )
    lines = []
    for row in rows:
        first, *rest = ("-" if cell is None else cut_text(str(cell)) for cell in row)
        cells = "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(kinds[1:], rest, strict=True))
        lines.append(f"<tr><th scope=row>{first}</th>{cells}</tr>")
    return (
        f'<div class="wide"><table><caption>{to_text(caption)}</caption><thead><tr>{names}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def details(title: str, text: str) -> str:
    """A text that is folded away."""
    return f"<details><summary>{to_text(title)}</summary><pre>{cut_text(text)}</pre></details>"


def pick_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def figure(title: str, svg: str, words: Sequence[tuple[int, str]] = ()) -> str:
    """A chart with its title; `words` name its series by their places."""
    names = " ".join(f'<small class="label-{place}">{to_text(word)}</small>' for place, word in words)
    return f"<figure><figcaption>{to_text(title)} {names}</figcaption>\n{svg}</figure>"


def draw_line_figure(chart: LineChart) -> str:
    """The chart as a figure of a page, its lines named above it."""
    return figure(chart.title, draw_lines(chart), [(place, line.name) for place, line in enumerate(chart.series)])


def draw_lines(chart: LineChart, *, is_named: bool = False) -> str:
    """The chart as SVG; with `is_named` the names of the lines stand below it, for a file of its own."""
    places = sorted(set(chart.places) | {x for line in chart.series for x, _ in line.points})
    ends = (places[0], places[-1]) if places else (0.0, 1.0)

    def x(value: float) -> float:
        first, last, here = (math.log(max(v, 1e-9)) for v in (*ends, value)) if chart.is_logarithmic else (*ends, value)
        share = 0.5 if last == first else (here - first) / (last - first)
        return _LEFT + 12 + (_WIDTH - _LEFT - _RIGHT - 24) * share

    def y(value: float) -> float:
        share = (min(max(value, chart.low), chart.high) - chart.low) / (chart.high - chart.low)
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - share)

    marks = []
    for value in pick_ticks(chart.low, chart.high, 5):
        marks.append(f'<path class="grid" d="M{_LEFT} {y(value):.1f}H{_WIDTH - _RIGHT}" />')
        marks.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in places:
        marks.append(f'<text x="{x(value):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    marks.append(
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - _BOTTOM + 34}" text-anchor="middle">{to_text(chart.x_name)}</text>'
    )
    for place, line in enumerate(chart.series[: len(_COLORS)]):
        marks += _draw_series(place, line, x, y)
    height = _HEIGHT
    if is_named:
        for place, line in enumerate(chart.series[: len(_COLORS)]):
            height += 18
            marks.append(f'<path class="series-{place}" d="M{_LEFT} {height - 12}h30" />')
            marks.append(f'<text class="value" x="{_LEFT + 38}" y="{height - 8}">{to_text(line.name)}</text>')
        height += 6
    return _svg(_WIDTH, height, f"{chart.title} over {chart.x_name}", marks)


def draw_grid(
    title: str, x_name: str, y_name: str, columns: Sequence[str], rows: Sequence[str],
    values: Mapping[tuple[str, str], float],
) -> str:  # fmt: skip
    """A heat map as SVG: `values` from 0 to 100 by (column, row); cells without one stay empty."""
    left, top = 76, 10
    width, height = left + _CELL_WIDTH * len(columns) + 12, top + _CELL_HEIGHT * len(rows) + 42
    marks = []
    for line, row in enumerate(rows):
        middle = top + _CELL_HEIGHT * (line + 0.5) + 4
        marks.append(f'<text x="{left - 8}" y="{middle:.0f}" text-anchor="end">{to_text(row)}</text>')
        for place, column in enumerate(columns):
            value = values.get((column, row))
            if value is None:
                continue
            x, y = left + _CELL_WIDTH * place, top + _CELL_HEIGHT * line
            share = min(max(value, 0), 100) / 100
            marks.append(
                f'<rect x="{x + 1}" y="{y + 1}" width="{_CELL_WIDTH - 2}" height="{_CELL_HEIGHT - 2}" '
                f'fill="#0b8a80" fill-opacity="{0.06 + 0.54 * share:.2f}" />'
                f'<text class="value" x="{x + _CELL_WIDTH / 2:.0f}" y="{middle:.0f}" text-anchor="middle">'
                f"{value:.0f}</text>"
            )
    bottom = top + _CELL_HEIGHT * len(rows)
    for place, column in enumerate(columns):
        middle = left + _CELL_WIDTH * (place + 0.5)
        marks.append(f'<text x="{middle:.0f}" y="{bottom + 16}" text-anchor="middle">{to_text(column)}</text>')
    marks.append(f'<text x="{left}" y="{bottom + 34}">{to_text(x_name)} across, {to_text(y_name)} down</text>')
    return _svg(width, height, title, marks)


def draw_dots(title: str, rows: Sequence[DotRow]) -> str:
    """Scores from 0 to 100 as SVG, a row each: ours filled with their intervals, those of others hollow."""
    left, right, step = 190, 14, 26
    height = 14 + step * len(rows) + 24

    def x(value: float) -> float:
        return left + (_WIDTH - left - right) * min(max(value, 0), 100) / 100

    marks = []
    for tick in range(0, 101, 20):
        marks.append(f'<path class="grid" d="M{x(tick):.1f} 8V{height - 24}" />')
        marks.append(f'<text x="{x(tick):.1f}" y="{height - 8}" text-anchor="middle">{tick}</text>')
    for number, row in enumerate(rows):
        y = 14.0 + step * (number + 0.5)
        marks.append(f'<text x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{to_text(row.name[:34])}</text>')
        for name, value in row.theirs:
            marks.append(
                f'<circle class="series-5 theirs" cx="{x(value):.1f}" cy="{y:.1f}" r="4">'
                f"<title>{to_text(name)}: {value:g}</title></circle>"
            )
        for place, (value, interval) in row.ours.items():
            height_of = y + 5 * (place - (len(row.ours) - 1) / 2)
            if interval is not None:
                low, high = interval
                marks.append(f'<path class="error series-{place}" d="M{x(low):.1f} {height_of:.1f}H{x(high):.1f}" />')
            marks.append(
                f'<circle class="series-{place}" cx="{x(value):.1f}" cy="{height_of:.1f}" r="3">'
                f"<title>{to_text(row.name)}: {value:.1f}</title></circle>"
            )
    return _svg(_WIDTH, height, title, marks)


def to_file(svg: str) -> str:
    """A chart as the text of an SVG file, with its colours in it; on white where nothing says light or dark."""
    palette = "".join(f" --series-{place}: {light};" for place, (light, _) in enumerate(_COLORS))
    ground = " --surface: #fff; --line: #d3dada; --text: #17201f; --soft: #4f5d5b;"
    style = f"<style>svg {{{ground}{palette} background: #fff; }}{_CHART_STYLE}</style>"
    head, body = svg.split(">", 1)
    width, height = head.split('viewBox="0 0 ')[1].split('"')[0].split()
    space = 'xmlns="http://www.w3.org/2000/svg"'
    back = f'<rect width="{width}" height="{height}" fill="#fff" />'
    return f"{head.replace('<svg', f'<svg {space}', 1)}>{style}{back}{body}\n"


def _draw_series(place: int, line: Series, x: Callable[[float], float], y: Callable[[float], float]) -> list[str]:
    marks = []
    for (at, _), interval in zip(line.points, line.intervals, strict=False):
        if interval is not None:
            low, high = interval
            marks.append(f'<path class="error series-{place}" d="M{x(at):.1f} {y(low):.1f}V{y(high):.1f}" />')
    if len(line.points) > 1:
        path = "L".join(f"{x(at):.1f} {y(value):.1f}" for at, value in line.points)
        marks.append(f'<path class="series-{place}" d="M{path}" />')
    kind = f"series-{place} theirs" if line.theirs else f"series-{place}"
    for at, value in line.points:
        marks.append(
            f'<circle class="{kind}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="3">'
            f"<title>{to_text(line.name)}, {at:g}: {value:.1f}</title></circle>"
        )
    return marks


def _svg(width: float, height: float, label: str, marks: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(one_line(label))}">'
        f"{''.join(marks)}</svg>"
    )
