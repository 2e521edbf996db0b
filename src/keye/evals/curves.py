"""A task over a grid of frame budgets and kinds of attention: how scores change with frames, and whether sparse
attention loses anything against dense attention on the same items.

    OUTPUT/<attention>-<frames>/<task>/...    one run each, as `keye eval` writes them
    OUTPUT/curve.json, OUTPUT/report.html, OUTPUT/<task>-*.svg

Every run goes on where it was killed, and a finished one is read, not asked again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from keye.errors import KeyeError
from keye.evals.results.compare import compare, read_run
from keye.evals.results.page import REPORT_NAME, build_report
from keye.evals.results.result import SCORES_NAME, Z95
from keye.evals.run import PREDICTIONS_NAME, RunOptions, run_task
from keye.evals.settings import RunSettings
from keye.evals.task import STRICT, Task
from keye.files import complete_file
from keye.html_report import LineChart, Series, draw_grid, draw_line_figure, draw_lines, figure, to_file
from keye.scoring.metrics import clustered_error

FORMAT: Final = "keye-curve-1"
CURVE_NAME: Final = "curve.json"
#: Sparse attention counts as lossless where the interval of the difference lies within so many points.
MARGIN: Final = 1.0
#: Label of parts that make a grid: two labels of an item joined by this.
_CROSS: Final = " x "

Measure = Mapping[str, Any]


@dataclass(frozen=True)
class Grid:
    """What is varied: the most frames of a video (none: as the task has them) and the kinds of attention (None: as the
    model has it). `margin` in points is what counts as lossless. `KeyeError` names a value out of range."""

    frames: tuple[int, ...] = ()
    attention: tuple[str | None, ...] = (None,)
    margin: float = MARGIN

    def __post_init__(self) -> None:
        if any(count < 1 for count in self.frames):
            raise KeyeError(f"frames holds {min(self.frames)}; a video is read with at least 1 frame")
        for name, values in (("frames", self.frames), ("attention", self.attention)):
            if len(set(values)) < len(values):
                raise KeyeError(f"{name} names a value twice; give each once")
        if not self.margin > 0:
            raise KeyeError(f"margin is {self.margin:g}; give points above 0")

    @property
    def counts(self) -> Sequence[int | None]:
        """The numbers of frames from few to many, or None alone."""
        return sorted(self.frames) or (None,)

    def points(self) -> Iterator[tuple[str | None, int | None]]:
        """All combinations, the cheap ones first."""
        for count in self.counts:
            for attention in self.attention:
                yield attention, count


def run_curve(
    task: Task, folder: Path, grid: Grid, settings: RunSettings, output: Path, options: RunOptions,
    on_point: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """Runs the task at every point and writes the curve, its charts and the report; the curve is returned. `on_point`
    is called with the name of each point before it is run."""
    results, points = [], []
    for attention, count in grid.points():
        name = point_name(attention, count)
        on_point(name)
        media = settings.media if count is None else {**settings.media, "max_frames": count}
        chosen = replace(settings, media=media, attention=attention or settings.attention)
        result = run_task(task, folder, chosen, output / name, options)
        results.append(result)
        points.append(measure_point(output / name / task.name, result, attention, count))
    compared = (_compare_attention(task, grid, count, output) for count in grid.counts)
    pairs = [pair for pair in compared if pair is not None]
    curve = {
        "format": FORMAT, "task": task.name, "title": task.title, "model": results[0].get("model"),
        "margin": grid.margin, "complete": all(result["complete"] for result in results), "points": points,
        "lossless": pairs,
    }  # fmt: skip
    with complete_file(output / CURVE_NAME) as draft:
        draft.write_text(json.dumps(curve, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for name, svg in draw_files(curve).items():
        with complete_file(output / name) as draft:
            draft.write_text(svg, encoding="utf-8")
    build_report(results, output / REPORT_NAME, comparisons=pairs, charts=draw_figures(curve))
    return curve


def point_name(attention: str | None, frames: int | None) -> str:
    """The folder of a point."""
    return "-".join(str(part) for part in (attention or "model", frames) if part is not None)


def measure_point(place: Path, result: Mapping[str, Any], attention: str | None, frames: int | None) -> dict[str, Any]:
    """The figures of a point: the headline of the strict scorer and the mean over questions, each with its interval,
    and the parts of the task."""
    figures = result["scorers"][STRICT]
    measures = {figures["metric"]: {"value": figures["value"], "interval": figures["interval"]}}
    if "accuracy" not in measures and figures["value"] is not None:
        measures["accuracy"] = _mean_of(place / SCORES_NAME)
    tokens, used = result["tokens"].get("prompt"), result["frames"]
    return {
        "frames": frames, "attention": attention, "measures": measures, "items": result["items"],
        "parts": figures["parts"], "failed": result["shares"]["failed"] + result["shares"]["missing"],
        "unparsed": figures["unparsed"], "prompt_tokens": tokens and tokens["mean"],
        "frames_used": used and used["mean"], "withheld": result["withheld"],
    }  # fmt: skip


def _mean_of(path: Path) -> dict[str, Any]:
    """The mean score over questions with its interval, from the scores of the items."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [(row["cluster"], row["scores"][STRICT]) for row in rows if row.get("has_gold", True)]
    if not pairs:
        return {"value": None, "interval": None}
    value, error = 100 * math.fsum(score for _, score in pairs) / len(pairs), 100 * clustered_error([pairs])
    interval = None if math.isnan(error) else [max(0.0, value - Z95 * error), min(100.0, value + Z95 * error)]
    return {"value": value, "interval": interval}


def _compare_attention(task: Task, grid: Grid, frames: int | None, output: Path) -> dict[str, Any] | None:
    """Sparse against dense attention on the same items; None where one of the two was not run."""
    if not {"sparse", "dense"} <= set(grid.attention):
        return None
    dense, sparse = (output / point_name(kind, frames) / task.name for kind in ("dense", "sparse"))
    runs = read_run(dense), read_run(sparse)
    comparison = compare(*runs)
    clusters = runs[0].result["clusters"]
    return {
        **comparison, "frames": frames, "kind": "sparse against dense attention", "clusters": clusters,
        "same_replies": _share_same(dense / PREDICTIONS_NAME, sparse / PREDICTIONS_NAME),
        "margin": grid.margin, "verdict": judge_lossless(comparison["scorers"][STRICT], clusters, grid.margin),
    }  # fmt: skip


def judge_lossless(figures: Mapping[str, Any], clusters: int, margin: float) -> str:
    """What paired differences (second minus first) over so many videos say: "lossless" where the whole interval lies
    within the margin, "worse" or "better" where it leaves 0 out on one side, else "undecided".

    Where no item differs, the interval has no width; then the share of videos that may differ all the same is bounded
    by 1 - 0.05^(1/videos), so that a margin of one point takes about 300 videos."""
    if figures["interval"] is None:
        return "undecided"
    low, high = figures["interval"]
    if not figures["first_better"] and not figures["second_better"]:
        bound = 100 * (1 - 0.05 ** (1 / clusters))
        low, high = -bound, bound
    if -margin <= low and high <= margin:
        return "lossless"
    return "worse" if high < 0 else "better" if low > 0 else "undecided"


def _share_same(first: Path, second: Path) -> float | None:
    """The share of items, of those that both answered, whose replies are equal letter by letter."""
    ours, theirs = (_read_predictions(path) for path in (first, second))
    common = [name for name in ours if name in theirs]
    return round(sum(ours[name] == theirs[name] for name in common) / len(common), 6) if common else None


def _read_predictions(path: Path) -> dict[str, str]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {record["id"]: record["prediction"] for record in records if record.get("error") is None}


def draw_figures(curve: Mapping[str, Any]) -> list[str]:
    """The charts of a curve as figures of a page."""
    figures = [draw_line_figure(chart) for chart in _line_charts(curve)]
    return figures + [figure(title, svg) for title, svg in _grids(curve)]


def draw_files(curve: Mapping[str, Any]) -> dict[str, str]:
    """The charts of a curve as SVG files by name."""
    files = {f"{curve['task']}-frames.svg": draw_lines(chart, is_named=True) for chart in _line_charts(curve)}
    for number, (_, svg) in enumerate(_grids(curve)):
        files[f"{curve['task']}-grid{number or ''}.svg"] = svg
    return {name: to_file(svg) for name, svg in files.items()}


def _line_charts(curve: Mapping[str, Any]) -> Iterator[LineChart]:
    points = [point for point in curve["points"] if point["frames"] is not None]
    lines: dict[tuple[str, str | None], list[Mapping[str, Any]]] = {}
    for point in points:
        for measure in point["measures"]:
            lines.setdefault((measure, point["attention"]), []).append(point)
    series = []
    for (measure, attention), line in lines.items():
        known = [point for point in line if point["measures"][measure]["value"] is not None]
        name = f"{measure}, {attention}" if attention else measure
        places = [(float(point["frames"]), float(point["measures"][measure]["value"])) for point in known]
        intervals = [_pair(point["measures"][measure]["interval"]) for point in known]
        series.append(Series(name, places, intervals))
    if series:
        frames = sorted({float(point["frames"]) for point in points})
        title = f"{curve['title']}: score over frames"
        yield LineChart(title, "most frames of a video", series, frames, is_logarithmic=True)


def _pair(interval: Sequence[float] | None) -> tuple[float, float] | None:
    return (interval[0], interval[1]) if interval else None


def _grids(curve: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Heat maps of parts by two labels, one for each point that has them."""
    for point in curve["points"]:
        for label, values in point["parts"].items():
            if _CROSS not in label:
                continue
            x_name, y_name = label.split(_CROSS, 1)
            cells = {(pair[0], pair[2]): value for name, value in values.items() if (pair := name.partition(_CROSS))[1]}
            columns, rows = (sorted({cell[side] for cell in cells}, key=_in_order) for side in (0, 1))
            how = point_name(point["attention"], point["frames"]) if point["attention"] else ""
            title = f"{curve['title']}, {x_name} and {y_name}" + (f": {how}" if how else "")
            yield title, draw_grid(title, x_name, y_name, columns, rows, cells)


def _in_order(text: str) -> tuple[float, str]:
    """Numbers by their value, other texts after them."""
    head = text.split()[0] if text.split() else text
    try:
        return float(head), text
    except ValueError:
        return math.inf, text
