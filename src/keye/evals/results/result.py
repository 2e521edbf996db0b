"""The result of a run as plain data: each scorer's value with its interval, what failed or said nothing, frames and
tokens, and digests of everything that the value depends on. docs/evaluation.md explains every field.

Items that failed or have no reply are counted as wrong by every scorer. Where more than `MOST_FAILED` of the items are
such, the value is withheld: only its lower bound is given.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import keye.scoring
from keye.errors import KeyeError
from keye.evals.published import find_published
from keye.evals.settings import digest_of
from keye.evals.task import STRICT, EvalItem, ItemScore, ScoredItem, Summary, Task
from keye.files import complete_file
from keye.scoring.metrics import clustered_error
from keye.version import __version__

FORMAT: Final = "keye-eval-1"
#: How scorers are called in which a judge decided a part, and how what it said begins.
JUDGED: Final = "judged"
VERDICT: Final = "judge: "
RESULT_NAME: Final = "result.json"
SCORES_NAME: Final = "scores.jsonl"
#: Share of failed and missing items above which the value is withheld.
MOST_FAILED: Final = 0.05
#: What official scorers extract where they read nothing.
_NOTHING: Final = ("Z", "N/A", "Unknown")
#: Of a normal distribution, for intervals of 95 %.
Z95: Final = 1.959964
#: Groups of clusters that are left out in turn where the metric is not a mean over items: most and fewest, and the
#: items that all summaries together read before there are fewer.
_FOLDS: Final = 50
_FEWEST_FOLDS: Final = 20
_MOST_READ: Final = 1_000_000
_LETTERED: Final = re.compile(r"^\s*\(?([A-Z])[.):]", re.MULTILINE)


@dataclass(frozen=True)
class Reply:
    """What is known of an item's reply. `prediction` is the raw text; `reasoning` what the server sent apart from it;
    `usage` its tokens and frames. `error` says why the prediction is missing, also where the item was never asked."""

    prediction: str | None = None
    error: str | None = None
    reasoning: str | None = None
    usage: Mapping[str, Any] | None = None
    missing: bool = False


MISSING: Final = Reply(error="not asked yet", missing=True)


def score_items(task: Task, items: Sequence[EvalItem], replies: Sequence[Reply], scorer: str) -> list[ScoredItem]:
    """The items with their scores; those without a prediction score 0."""
    return [_score_item(task, item, reply, scorer) for item, reply in zip(items, replies, strict=True)]


def _score_item(task: Task, item: EvalItem, reply: Reply, scorer: str) -> ScoredItem:
    if reply.prediction is None:
        return ScoredItem(item, None, 0.0, error=reply.error or "no reply")
    if not item.has_gold:
        return ScoredItem(item, reply.prediction, 0.0)
    score = task.score_with(scorer, item.document, reply.prediction)
    return scored_item(item, reply.prediction, score)


def scored_item(item: EvalItem, prediction: str, score: ItemScore) -> ScoredItem:
    return ScoredItem(
        item, prediction, score.score, score.extracted, random=score.random, judge_needed=score.judge_needed
    )


def build_result(
    task: Task,
    items: Sequence[EvalItem],
    replies: Sequence[Reply],
    scored: Mapping[str, Sequence[ScoredItem]],
    **facts: Any,
) -> dict[str, Any]:
    """The result of the items with their replies and each scorer's scores. `facts` are added as they are: model,
    settings, digests of what is known elsewhere, seconds."""
    total = len(items)
    failed = sum(reply.error is not None and not reply.missing for reply in replies)
    missing = sum(reply.missing for reply in replies)
    withheld = _withheld(total, failed, missing)
    digests = {
        "prompts": None, "data": digest_of((item.id, item.document) for item in items),
        "plans": digest_of(plans) if (plans := sorted(set(_usages(replies, "plan")))) else None,
        "scorers": scorer_digest(), "keye": __version__,
    }  # fmt: skip
    judged = sum(str(row.extracted).startswith(VERDICT) for rows in scored.values() for row in rows)
    return {
        "format": FORMAT, "task": task.name, "title": task.title, "metric": task.metric, "dimension": task.dimension,
        "model": facts.pop("model", None), "settings": facts.pop("settings", None),
        "items": total, "clusters": len({item.cluster for item in items}),
        "complete": not failed and not missing, "withheld": withheld,
        "scorers": {
            name: _scorer_figures(task, name, rows, withheld is not None) for name, rows in scored.items()
        },
        "shares": {
            "failed": _share(failed, total), "missing": _share(missing, total),
            "unparsed": _share(_unparsed(scored.get(STRICT, ())), total), "judged": _share(judged, total),
            "reasoning_apart": _share(sum(bool(reply.reasoning) for reply in replies), total),
        },
        "published": [entry.to_dict() for entry in find_published(task.published_as or task.name)],
        "errors": _errors(items, replies),
        "frames": spread(_usages(replies, "frames")),
        "tokens": {name: spread(_usages(replies, name)) for name in ("prompt", "media", "reply", "reasoning")},
        "cached_tokens": sum(_usages(replies, "cached")),
        "digests": {**digests, **facts.pop("digests", {})},
        **facts,
    }  # fmt: skip


def _withheld(total: int, failed: int, missing: int) -> str | None:
    if failed + missing <= MOST_FAILED * total:
        return None
    parts = [f"{failed:,} failed" if failed else "", f"{missing:,} have no reply yet" if missing else ""]
    return f"of {total:,} items {' and '.join(filter(None, parts))}, more than {MOST_FAILED:.0%}"


def _scorer_figures(task: Task, scorer: str, rows: Sequence[ScoredItem], withheld: bool) -> dict[str, Any]:
    """One scorer's figures. `unparsed`, `random` and `judge_needed` are shares of the items with a prediction;
    `random_expected` is what drawing an option would add on average, in points; `official` are the metrics of the
    original's own aggregation, where all items have a reply."""
    name = STRICT if scorer.startswith(JUDGED) else scorer
    summary = task.summarise(rows, name)
    with_reply = [row for row in rows if row.prediction is not None and row.item.has_gold]
    drawn = [row for row in with_reply if row.random]
    counted, notes = sum(row.item.has_gold for row in rows), list(summary.notes)
    if summary.value is None and summary.n:
        plain = 100 * math.fsum(row.score for row in rows if row.item.has_gold) / counted
        notes.append(f"{summary.name} needs groups or labels that these items lack; their mean score is {plain:.2f}")
    chances = [chance for row in drawn if (chance := chance_of(row.item.document)) is not None]
    return {
        "metric": summary.name, "value": None if withheld else summary.value, "lower_bound": summary.value,
        "interval": None if withheld else interval_of(task, name, rows, summary), "n": summary.n,
        "unparsed": _share(_unparsed(with_reply), len(with_reply)), "random": _share(len(drawn), len(with_reply)),
        "random_expected": 100 * math.fsum(chances) / counted if counted else 0.0,
        "judge_needed": _share(sum(row.judge_needed for row in with_reply), len(with_reply)),
        "official": task.official_metrics(name, rows),
        "parts": {label: dict(values) for label, values in summary.parts.items()}, "notes": notes,
    }  # fmt: skip


def interval_of(task: Task, scorer: str, rows: Sequence[ScoredItem], summary: Summary) -> list[float] | None:
    """The 95 % interval of the headline with items of one cluster going together; None for a single cluster.

    For a mean over items the error is that of `keye.scoring.metrics.clustered_error`; else a jackknife, which leaves
    out clusters in up to 50 groups, 20 of very many items. Where all items are right, or all wrong, the bound is that
    of the rule of three: 3 / clusters."""
    if summary.value is None:
        return None
    counted = [row for row in rows if row.item.has_gold]
    plain = 100 * math.fsum(row.score for row in counted) / len(counted) if counted else math.nan
    if abs(plain - summary.value) < 1e-9:
        if (clusters := len({row.item.cluster for row in counted})) > 1 and plain in (0.0, 100.0):
            reach = min(100.0, 300 / clusters)
            return [100.0 - reach, 100.0] if plain else [0.0, reach]
        error = 100 * clustered_error([[(row.item.cluster, row.score) for row in counted]])
    else:
        error = _jackknife(lambda rest: task.summarise(rest, scorer).value, counted)
    if math.isnan(error):
        return None
    return [max(0.0, summary.value - Z95 * error), min(100.0, summary.value + Z95 * error)]


def _jackknife(measure: Callable[[Sequence[ScoredItem]], float | None], rows: Sequence[ScoredItem]) -> float:
    clusters = sorted({row.item.cluster for row in rows})
    random.Random(0).shuffle(clusters)
    folds = min(_FOLDS, max(_FEWEST_FOLDS, _MOST_READ // len(rows)), len(clusters)) if rows else 0
    if folds < 2:
        return math.nan
    fold_of = {cluster: number % folds for number, cluster in enumerate(clusters)}
    values = []
    for fold in range(folds):
        value = measure([row for row in rows if fold_of[row.item.cluster] != fold])
        if value is None:
            return math.nan
        values.append(value)
    center = statistics.fmean(values)
    return math.sqrt((folds - 1) / folds * math.fsum((value - center) ** 2 for value in values))


def chance_of(document: Mapping[str, Any]) -> float | None:
    """The probability that an option drawn at random is right; None where the number of options is not known."""
    for name in ("options", "choices", "candidates"):
        options = document.get(name)
        count = len(options) if isinstance(options, list | tuple) else 0
        if isinstance(options, str):
            count = len(set(_LETTERED.findall(options)))
        if count:
            return 1 / count
    return None


def _unparsed(rows: Sequence[ScoredItem]) -> int:
    """Replies in which no answer was read."""
    return sum(
        row.prediction is not None and row.item.has_gold and not row.score and _is_nothing(row.extracted)
        for row in rows
    )


def _is_nothing(extracted: object) -> bool:
    return extracted is None or (isinstance(extracted, str | list) and (not extracted or extracted in _NOTHING))


def _share(part: int, total: int) -> float:
    return round(part / total, 6) if total else 0.0


def _usages(replies: Iterable[Reply], name: str) -> Iterable[Any]:
    for reply in replies:
        if reply.usage is not None and (value := reply.usage.get(name)) is not None:
            yield value


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Mean, median and greatest value; None without values."""
    known = list(values)
    if not known:
        return None
    return {"mean": round(statistics.fmean(known), 3), "p50": statistics.median(known), "max": max(known)}


def _errors(items: Sequence[EvalItem], replies: Sequence[Reply], most: int = 5) -> list[dict[str, Any]]:
    """The most frequent errors, with how many items have each and one of them."""
    counts: dict[str, list[Any]] = {}
    for item, reply in zip(items, replies, strict=True):
        if reply.error is not None:
            entry = counts.setdefault(_unnumbered(reply.error), [0, item.id, reply.error])
            entry[0] += 1
    ranked = sorted(counts.values(), key=lambda entry: -entry[0])[:most]
    return [{"count": count, "item": name, "message": message[:300]} for count, name, message in ranked]


def _unnumbered(message: str) -> str:
    """A message without the numbers and names that differ from item to item."""
    return re.sub(r"\S*[/\d]\S*", "#", message)[:200]


@functools.cache
def scorer_digest() -> str:
    """A digest of the source text of all scorers of this version."""
    total, folder = hashlib.sha256(), Path(keye.scoring.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def write_result(folder: Path, result: Mapping[str, Any], scored: Mapping[str, Sequence[ScoredItem]]) -> None:
    """Writes `result.json`, and `scores.jsonl` with each item's scores, as complete files."""
    with complete_file(folder / SCORES_NAME) as draft, draft.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in _score_rows(scored))
    with complete_file(folder / RESULT_NAME) as draft:
        draft.write_text(json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _score_rows(scored: Mapping[str, Sequence[ScoredItem]]) -> Iterable[dict[str, Any]]:
    for rows in zip(*scored.values(), strict=True):
        item = rows[0].item
        yield {
            "id": item.id, "cluster": item.cluster, "labels": dict(item.labels), "error": rows[0].error,
            "has_gold": item.has_gold,
            "scores": {name: round(row.score, 9) for name, row in zip(scored, rows, strict=True)},
            "extracted": {name: _plain(row.extracted) for name, row in zip(scored, rows, strict=True)},
        }  # fmt: skip


def _plain(value: object) -> object:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value


def read_result(folder: Path) -> dict[str, Any]:
    """The result in a folder, or in the file itself. `KeyeError` where there is none."""
    path = folder / RESULT_NAME if folder.is_dir() else folder
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KeyeError(f"{path} cannot be read ({error.strerror}): name a folder that keye eval wrote") from None
    except (ValueError, RecursionError):
        result = None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise KeyeError(f"{path} is not a result of keye eval: name a folder that it wrote")
    return result
