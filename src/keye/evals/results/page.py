"""The report of evaluations: one HTML file that loads nothing, with the scores of every scorer beside their intervals,
what failed or said nothing, the costs, the digests, and what the reports of others say, marked as theirs.

Plain data in, text out: reads the results of `keye.evals.results.result`, and knows neither models nor tasks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from keye.evals.faults import find_fault
from keye.evals.published import DIMENSIONS, Published, find_published
from keye.html_report import DotRow, details, draw_dots, facts_table, figure, table, to_text, write_html
from keye.version import __version__

REPORT_NAME: Final = "report.html"
STRICT: Final = "strict"
#: What a column of scores that says nothing holds.
_EMPTY: Final = (None, "0.0 %")
#: Rows of the parts of one label that are shown.
_MOST_PARTS: Final = 60

Result = Mapping[str, Any]


def build_report(
    results: Sequence[Result], path: Path, *, comparisons: Sequence[Mapping[str, Any]] = (), charts: Sequence[str] = ()
) -> None:
    """Writes the report of one or several results. `comparisons` are those of `compare`, `charts` figures (HTML) that
    come first. `KeyeError` where the file cannot be written."""
    models = list(dict.fromkeys(_model(result) for result in results))
    title = f"Evaluation of {', '.join(models)}" if models else "Evaluation"
    parts = [f"<h1>{to_text(title)}</h1>", *_warnings(results), *charts]
    if results:
        parts += ["<h2>Scores</h2>", _scores(results), *_dots(results), _dimensions(results)]
    if comparisons:
        parts += ["<h2>Paired comparisons</h2>", *map(_comparison, comparisons)]
    for result in results:
        parts += _section(result)
    parts.append(f"<p>Written by keye {to_text(__version__)}. Figures marked <i class=theirs>theirs</i> are those of "
                 "the source that stands beside them; they were not measured here.</p>")  # fmt: skip
    write_html(path, title, parts)


def _model(result: Result) -> str:
    model = result.get("model")
    return str(model.get("name") or model.get("server")) if isinstance(model, Mapping) else str(model or "unknown")


def _title(result: Result) -> str:
    return str(result.get("title") or result["task"])


def _warnings(results: Sequence[Result]) -> Iterator[str]:
    """What must be read before any score: what is missing, and why a run ended."""
    for result in results:
        shares, total = result.get("shares", {}), result.get("items", 0)
        counts = [(name, round(shares.get(name, 0) * total)) for name in ("failed", "missing")]
        lost = [f"{count:,} {name}" for name, count in counts if count]
        sentences = [str(text) for text in (result.get("stopped"), result.get("withheld")) if text]
        if lost:
            sentences.append(f"{' and '.join(lost)} of {total:,} items; they count as wrong")
        if sentences:
            yield f'<p class="warning"><b>{to_text(_title(result))}</b>: {to_text("; ".join(sentences))}.</p>'


def _score(figures: Mapping[str, Any]) -> str:
    """A value with its interval, or its lower bound where failures withhold it."""
    value, interval = figures.get("value"), figures.get("interval")
    if value is None:
        bound = figures.get("lower_bound")
        return "-" if bound is None else f"withheld (at least {bound:.1f})"
    return f"{value:.1f}" if not interval else f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


def _share(value: Any) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _first_official(result: Result) -> str | None:
    """The official scorer that the reports use: the first that is not strict."""
    return next((name for name in result["scorers"] if name != STRICT), None)


def _scores(results: Sequence[Result]) -> str:
    head = ("task", "items", "strict", "official", "unparsed", "judged", "failed", "frames", "prompt tokens", "theirs")
    with_model = len({_model(result) for result in results}) > 1
    rows = []
    for result in results:
        scorers, shares, official = result["scorers"], result.get("shares", {}), _first_official(result)
        facts = [_title(result), _model(result) if with_model else "", _settings(result)]
        rows.append((
            "\n".join(filter(None, facts)), f"{result.get('items', 0):,}",
            _score(scorers[STRICT]) if STRICT in scorers else None,
            f"{_score(scorers[official])}\n{official}" if official else None,
            _share(shares.get("unparsed")), _share(shares.get("judged")),
            _share(shares.get("failed", 0) + shares.get("missing", 0)), _mean(result.get("frames")),
            _mean((result.get("tokens") or {}).get("prompt")), _theirs(result),
        ))  # fmt: skip
    caption = ("Points of 100 with intervals of 95 %, clustered by video or picture. Failed items, and those without "
               "an answer that a scorer can read, count as wrong. Theirs: published, not measured here")  # fmt: skip
    used = [place for place in range(len(head)) if any(row[place] not in _EMPTY for row in rows)]
    numbers = [number for number, place in enumerate(used) if 0 < place < len(head) - 1]
    return table(caption, [head[place] for place in used], [[row[place] for place in used] for row in rows], numbers)


def _settings(result: Result) -> str:
    """The settings that differ from none, in short."""
    settings = result.get("settings")
    if not isinstance(settings, Mapping):
        return str(settings or "")
    groups = [value if isinstance(value, Mapping) else {name: value} for name, value in settings.items()]
    flat = {name: value for group in groups for name, value in group.items()}
    words = {True: "on", False: "off"}
    named = {{"nframes": "frames"}.get(name, name): value for name, value in flat.items() if value not in (None, "")}
    return ", ".join(f"{name} {words[value] if isinstance(value, bool) else value}" for name, value in named.items())


def _mean(spread: Any) -> str | None:
    return f"{spread['mean']:,.0f}" if isinstance(spread, Mapping) and "mean" in spread else None


def _theirs(result: Result) -> str | None:
    """The figures of the newest Keye that has any."""
    own = [entry for entry in _published(result) if entry.model.startswith("Keye")]
    newest = [entry for entry in own if entry.model == own[-1].model]
    lines = [f"{entry.value:g} ({', '.join(filter(None, (entry.metric, entry.settings)))})" for entry in newest]
    return "\n".join([f"{own[-1].model}:", *lines]) if own else None


def _published(result: Result) -> list[Published]:
    """The figures that the result carries, or those known now of one that carries none."""
    carried = result.get("published")
    return find_published(result["task"]) if carried is None else [Published(**entry) for entry in carried]


def _dots(results: Sequence[Result]) -> Iterator[str]:
    rows = []
    for result in results:
        ours = {}
        for place, name in enumerate((STRICT, _first_official(result))):
            figures = result["scorers"].get(name) if name else None
            if figures and figures.get("value") is not None:
                interval = figures.get("interval")
                ours[place] = (figures["value"], (interval[0], interval[1]) if interval else None)
        theirs = [(f"{entry.model}, {entry.source}", entry.value) for entry in _published(result)]
        if ours:
            is_alone = sum(other["task"] == result["task"] for other in results) == 1
            rows.append(DotRow(str(result["task"]) if is_alone else _settings(result), ours, theirs))
    if rows:
        words = ((0, "strict"), (1, "official"), (5, "theirs (hollow)"))
        yield figure("Scores with intervals of 95 %", draw_dots("Scores of all tasks", rows), words)


def _dimensions(results: Sequence[Result]) -> str:
    """The seven capability dimensions with the tasks measured in each."""
    rows = []
    for dimension in DIMENSIONS:
        own = [result for result in results if result.get("dimension") == dimension]
        values = [value for result in own if (value := _headline(result)) is not None]
        names = ", ".join(dict.fromkeys(str(result["task"]) for result in own))
        rows.append(
            (dimension, f"{sum(values) / len(values):.1f}" if values else None, len(own), names or "not measured")
        )
    caption = ("The seven capability dimensions of the model card of Keye-VL-2.0; the mean is over the results here, "
               "by the official scorer where there is one")  # fmt: skip
    return table(caption, ("dimension", "mean", "results", "tasks"), rows, numbers=(1, 2))


def _headline(result: Result) -> float | None:
    figures = result["scorers"].get(_first_official(result) or STRICT)
    return figures.get("value") if figures else None


def _section(result: Result) -> Iterator[str]:
    yield f"<h2>{to_text(_title(result))}: {to_text(_model(result))}</h2>"
    if settings := _settings(result):
        yield f"<p>{to_text(settings)}</p>"
    yield _scorers(result)
    if fault := find_fault(result["task"]):
        yield f"<p><b>Known of the official scorers:</b> {to_text(fault)}.</p>"
    for name, figures in result["scorers"].items():
        for note in figures.get("notes", ()):
            yield f"<p>{to_text(name)}: {to_text(note)}.</p>"
    yield from _parts(result)
    totals = [(name, metric, f"{value:.2f}") for name, figures in result["scorers"].items()
              for metric, value in (figures.get("official") or {}).items()]  # fmt: skip
    if totals:
        caption = "What the official aggregations make of the same replies, in their own units"
        yield table(caption, ("scorer", "metric", "value"), totals, numbers=(2,))
    yield facts_table("Costs", _costs(result))
    if result.get("errors"):
        errors = [(error.get("message"), error.get("count"), error.get("item")) for error in result["errors"]]
        yield table("Errors, the most frequent ones", ("error", "items", "an item"), errors, numbers=(1,))
    if published := _published(result):
        head = ("model", "score", "metric", "settings", "source", "note")
        theirs = [(row.model, f"{row.value:g}", row.metric, row.settings, row.source, row.note) for row in published]
        yield table("Theirs: published scores", head, theirs, numbers=(1,))
    yield facts_table("Digests: equal digests mean equal input", _flat(result.get("digests", {})))
    yield details("Settings and figures as data", json.dumps(result, indent=1, ensure_ascii=False, default=str))


def _scorers(result: Result) -> str:
    head = (
        "scorer",
        "metric",
        "score",
        "items",
        "unparsed",
        "drawn at random",
        "their expected points",
        "needs a judge",
    )
    rows = [
        (name, figures.get("metric"), _score(figures), f"{figures.get('n', 0):,}", _share(figures.get("unparsed")),
         _share(figures.get("random")), f"{figures.get('random_expected') or 0:.2f}",
         _share(figures.get("judge_needed")))
        for name, figures in result["scorers"].items()
    ]  # fmt: skip
    caption = ("The same replies by every scorer. Where the original draws an option at random, the item counts as "
               "wrong here, and the points that drawing would add on average stand beside it")  # fmt: skip
    return table(caption, head, rows, numbers=(3, 4, 5, 6, 7))


def _parts(result: Result) -> Iterator[str]:
    """The parts of the headline by label, scorers side by side."""
    scorers = result["scorers"]
    labels = dict.fromkeys(label for figures in scorers.values() for label in figures.get("parts", {}))
    for label in labels:
        groups = {name: figures.get("parts", {}).get(label, {}) for name, figures in scorers.items()}
        values = list(dict.fromkeys(value for group in groups.values() for value in group))
        rows = [(value, *(_number(group.get(value)) for group in groups.values())) for value in values[:_MOST_PARTS]]
        more = f" ({len(values) - _MOST_PARTS} more in the data below)" if len(values) > _MOST_PARTS else ""
        yield table(f"By {label}{more}", (label, *groups), rows, numbers=range(1, len(groups) + 1))


def _number(value: Any) -> str | None:
    return None if value is None else f"{value:.1f}"


def _costs(result: Result) -> dict[str, object]:
    facts: dict[str, object] = {"items": f"{result.get('items', 0):,} about {result.get('clusters', 0):,} media"}
    spreads = {"frames": result.get("frames"),
               **{f"{name} tokens": spread for name, spread in (result.get("tokens") or {}).items()}}  # fmt: skip
    for name, spread in spreads.items():
        if isinstance(spread, Mapping):
            facts[name] = f"mean {spread['mean']:,.1f}, median {spread['p50']:,.0f}, most {spread['max']:,.0f}"
    if result.get("seconds") is not None:
        facts["seconds"] = f"{result['seconds']:,.1f}"
    if result.get("items_per_second"):
        facts["items per second"] = f"{result['items_per_second']:,.2f}"
    return facts


def _flat(values: Mapping[str, Any]) -> dict[str, object]:
    return {name: "not known" if value is None else value for name, value in values.items()}


def _comparison(comparison: Mapping[str, Any]) -> str:
    """A paired comparison of `keye.evals.results.compare`."""
    first, second = (_model({"model": comparison.get(side)}) for side in ("first", "second"))
    kind = comparison.get("kind") or (f"{second} against {first}" if first != second else "second against first run")
    frames = f", at most {comparison['frames']:,} frames" if comparison.get("frames") else ""
    rows = []
    for name, figures in comparison.get("scorers", {}).items():
        interval = figures.get("interval")
        between = f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else " (no interval: a single cluster)"
        rows.append((
            name, f"{figures['first']:.2f}", f"{figures['second']:.2f}", f"{figures['difference']:+.2f}{between}",
            figures["first_better"], figures["second_better"], figures["equal"],
        ))  # fmt: skip
    head = ("scorer", "first", "second", "difference", "first better", "second better", "equal")
    facts = [f"{comparison.get('items', 0):,} items in pairs"]
    if comparison.get("same_replies") is not None:
        facts.append(f"{_share(comparison['same_replies'])} of the replies are equal letter by letter")
    if comparison.get("verdict"):
        facts.append(f"verdict with a margin of {comparison['margin']:g} points: {comparison['verdict']}")
    caption = f"{comparison.get('task', '')}: {kind}{frames}; {'; '.join(facts)}"
    return table(caption, head, rows, numbers=range(1, 7))
