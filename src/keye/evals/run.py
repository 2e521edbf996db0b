"""Runs a task: its items are the questions of a batch, so a run that was killed goes on where it was, each item has one
record, and questions about one video meet it in one place. Then everything is scored from the records.

    OUTPUT/<task>/run.json           what was asked of which model: a later run must agree
    OUTPUT/<task>/predictions.jsonl  one record for each item, written as replies come
    OUTPUT/<task>/scores.jsonl       each item's scores
    OUTPUT/<task>/result.json        the result (`keye.evals.results.result`)

An item that fails is asked again by the next run, and counts as wrong until it succeeds.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from keye.batch.journal import Journal, check_same
from keye.batch.manifest import BadLine
from keye.batch.run import Batch
from keye.errors import KeyeError, Option
from keye.evals.judge import Judge, judge_items
from keye.evals.results.predictions import write_predictions
from keye.evals.results.result import JUDGED, MISSING, Reply, build_result, score_items, write_result
from keye.evals.settings import RunSettings, build_lines, digest_prompts, missing_media
from keye.evals.task import EvalItem, Task, TaskSettings
from keye.files import complete_file
from keye.units import listed

if TYPE_CHECKING:
    from keye.batch.workers import Worker

PREDICTIONS_NAME: Final = "predictions.jsonl"
RUN_NAME: Final = "run.json"
#: Parts of a weight file of which a digest is taken, and bytes of each.
_SAMPLES: Final = 16
_SAMPLE_BYTES: Final = 1 << 16
#: Files of a model on which replies depend: weights, settings, vocabularies and chat templates.
_WEIGHTS: Final = (".json", ".safetensors", ".gguf", ".jinja", ".txt", ".model")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ModelFacts:
    """What answers: `name`, and the digest of its `weights` where they are on this machine. `engine` are the settings
    under which keye loads it (number formats, adapter ...); `server` is the address of one that is asked instead."""

    name: str
    weights: str | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    server: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "engine": dict(self.engine), "server": self.server}


@dataclass(frozen=True)
class RunOptions:
    """How the work is done, which changes no score. `open_workers` makes the workers of one task; `allow_missing`
    media, whose items then fail; `judge` answers where the strict scorer read nothing."""

    open_workers: Callable[[], Sequence[Worker]]
    model: ModelFacts
    allow_missing: bool = False
    judge: Judge | None = None
    progress: Progress = field(default=lambda *_: None)


def run_task(task: Task, folder: Path, settings: RunSettings, output: Path, options: RunOptions) -> dict[str, Any]:
    """Asks what `output/<task name>` does not hold yet, scores everything and writes the result, which is returned.

    `KeyeError` before anything is asked: for a task that cannot run, data that lack fields or media, or records in the
    output that belong to another model or other settings. Where no worker is left, the result says in `stopped` why,
    and the items that were not asked are counted as missing."""
    items = read_items(task, folder, settings, allow_missing=options.allow_missing)
    place = output / task.name
    place.mkdir(parents=True, exist_ok=True)
    lines = build_lines(items, settings, folder, max_tokens=task.max_tokens)
    facts = {
        "task": task.name, "model": options.model.name, "weights": options.model.weights,
        "engine": dict(options.model.engine), "settings": {**settings.to_dict(), "limit": None},
    }  # fmt: skip
    begin, stopped = time.monotonic(), None
    with Journal(place / PREDICTIONS_NAME) as journal:
        _settle_run(place / RUN_NAME, facts, fresh=not journal.done)
        check_same([(line.id, line.digest) for line in lines], journal.done, journal.path)
        records = _Shape(items)
        workers = options.open_workers() if _left(lines, journal) else ()
        batch = Batch(workers, journal, progress=options.progress, shape=records)
        try:
            asyncio.run(batch.run(lines, retry_errors=True))
        except KeyeError as error:
            if not journal.done:
                raise
            stopped = str(error)
    replies = read_replies(place / PREDICTIONS_NAME)
    return score_run(
        task, items, [replies.get(item.id, MISSING) for item in items], judge=options.judge, folder=place,
        model=options.model.to_dict(), settings=settings.to_dict(),
        digests={"prompts": digest_prompts(items), "weights": options.model.weights},
        seconds=round(time.monotonic() - begin, 3), asked=batch.report.ok + batch.report.errors,
        items_per_second=round(batch.report.items_per_second, 3), stopped=stopped,
    )  # fmt: skip


def score_run(
    task: Task, items: Sequence[EvalItem], replies: Sequence[Reply], *, folder: Path | None,
    judge: Judge | None = None, scorers: Sequence[str] | None = None, **facts: Any,
) -> dict[str, Any]:  # fmt: skip
    """The result of items and their replies by all scorers of the task, or by `scorers`; written to `folder`."""
    names = scorers if scorers is not None else task.scorers
    scored = {name: score_items(task, items, replies, name) for name in names}
    if judge is not None and folder is not None:
        try:
            scored[f"{JUDGED}({judge.model or 'server'})"] = judge_items(task, items, replies, judge, folder)
        except KeyeError as error:  # what was asked of the model is not lost with the judge
            facts["judge_error"] = str(error)
    result = build_result(task, items, replies, scored, **facts)
    if folder is not None:
        write_result(folder, result, scored)
    return result


def read_items(task: Task, folder: Path, settings: RunSettings, *, allow_missing: bool = False) -> list[EvalItem]:
    """The items of a run. `KeyeError` for a task that cannot be run, rows that lack fields, two items of one id, and
    media that are not there, which are named and counted."""
    if task.available is not None:
        raise KeyeError(f"{task.name} cannot be run yet: {task.available}")
    try:
        task_settings = TaskSettings(**{**_frames_of(settings), **settings.prompt})
    except TypeError:
        known = ", ".join(TaskSettings.__dataclass_fields__)
        raise KeyeError(f"prompt holds {sorted(settings.prompt)}; settings of prompts are {known}") from None
    items = list(itertools.islice(task.read(folder, task_settings), settings.limit))
    _check_prompt(task, folder, settings, task_settings, items)
    if not items:
        raise KeyeError(
            f"{folder} has no items of {task.name}: `keye eval prepare {task.name} --from {folder}` says why"
        )
    twice = [name for name, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise KeyeError(f"{task.name} has {len(twice)} ids twice, such as {twice[0]!r}: give each row its own")
    if not allow_missing:
        names = dict.fromkeys(name for item in items for name in missing_media(item))
        lost = sum(bool(missing_media(item)) for item in items) if names else 0
        if lost:
            examples = listed([Path(name).name for name in names])
            raise KeyeError(
                "{}: add them, or give {} to count those items as failed",
                f"{len(names):,} media of {lost:,} items of {task.name} are not in {folder} ({examples})",
                Option("allow_missing"),
            )
    return items


def _check_prompt(
    task: Task, folder: Path, settings: RunSettings, requested: TaskSettings, items: Sequence[EvalItem]
) -> None:
    """`KeyeError` for subtitles or reasoning that are asked for and change no prompt: a result must not claim them."""
    for name, other in (
        ("subtitles", replace(requested, subtitles=False)),
        ("reasoning", replace(requested, reasoning=False)),
    ):
        if not getattr(requested, name) or not items:
            continue
        without = itertools.islice(task.read(folder, other), settings.limit)
        if digest_prompts(without) == digest_prompts(items):
            lost = f", or its files are not in {folder}" if name == "subtitles" else ""
            raise KeyeError("{} changes no prompt of {}: the task has none" + lost, Option(name), task.name)


def _frames_of(settings: RunSettings) -> dict[str, int]:
    """The number of frames, for prompts that depend on it."""
    frames = settings.media.get("nframes")
    return {"frames": frames} if isinstance(frames, int) else {}


class _Shape:
    """Makes the records of a run from those of a batch: raw text, reasoning, tokens and frames, and the document."""

    def __init__(self, items: Iterable[EvalItem]) -> None:
        self._items = {item.id: item for item in items}

    def __call__(self, name: str, record: dict[str, Any]) -> dict[str, Any]:
        item = self._items[name]
        return {
            "line_digest": record["line_digest"], "id": name, "cluster": item.cluster,
            "prediction": record.get("text"), "reasoning": record.get("reasoning"), "error": record["error"],
            "finish_reason": record.get("finish_reason"), "usage": _usage(record.get("usage")),
            "seconds": record.get("seconds"), "document": dict(item.document), "labels": dict(item.labels),
            "has_gold": item.has_gold,
        }  # fmt: skip


def _usage(usage: Any) -> dict[str, Any] | None:
    """Tokens, frames and the digest of the plans in an answer's usage, as far as the server tells them."""
    if not isinstance(usage, Mapping):
        return None
    prompt, reply = (_fields(usage.get(f"{name}_tokens_details")) for name in ("prompt", "completion"))
    media = [_fields(medium) for medium in usage.get("media") or ()]
    frames = [medium.get("frames", 1) for medium in media]
    plans = [{key: value for key, value in medium.items() if key not in ("name", "options")} for medium in media]
    values = {
        "prompt": usage.get("prompt_tokens"), "reply": usage.get("completion_tokens"),
        "cached": prompt.get("cached_tokens"), "media": prompt.get("media_tokens"),
        "reasoning": reply.get("reasoning_tokens"),
        "frames": sum(frames) if frames and all(isinstance(count, int) for count in frames) else None,
        "plan": hashlib.sha256(json.dumps(plans, sort_keys=True).encode()).hexdigest()[:16] if plans else None,
    }  # fmt: skip
    return {name: value for name, value in values.items() if value is not None}


def _fields(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _left(lines: Sequence[Any], journal: Journal) -> bool:
    """Whether workers are needed."""
    return any(
        not isinstance(line, BadLine) and not (line.id in journal.done and journal.done[line.id].ok) for line in lines
    )


def _settle_run(path: Path, facts: Mapping[str, Any], *, fresh: bool) -> None:
    """Writes what the records belong to, or `KeyeError` where they belong to something else."""
    try:
        before = {} if fresh else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        before = {}
    for name in facts:
        if name in before and before[name] != facts[name]:
            what, then, now = name, before[name], facts[name]
            if isinstance(then, Mapping) and isinstance(now, Mapping):
                what = next(key for key in now if then.get(key) != now[key])
                then, now = then.get(what), now[what]
            raise KeyeError(
                f"{path.parent} holds replies with {what} {_brief(then)}, and this run has {_brief(now)}: "
                "choose another folder with -o"
            )
    with complete_file(path) as draft:
        draft.write_text(json.dumps(facts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _brief(value: object) -> str:
    return "not set" if value is None else str(value)[:100]


def read_replies(path: Path) -> dict[str, Reply]:
    """The replies of a file of records, by item."""
    replies = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            error = record.get("error")
            replies[record["id"]] = Reply(
                record.get("prediction") if error is None else None,
                None if error is None else str(_fields(error).get("message") or error),
                record.get("reasoning"), record.get("usage"),
            )  # fmt: skip
    return replies


def export_predictions(folder: Path, form: str) -> Path:
    """Writes the predictions of a task's folder in the form of others (`results.predictions`), in the order in which
    they came, and returns the path."""
    path = folder / ("samples.jsonl" if form == "lmms-eval" else "predictions.tsv")
    with (folder / PREDICTIONS_NAME).open(encoding="utf-8") as file, complete_file(path) as draft:
        write_predictions(draft, form, map(json.loads, file))
    return path


def digest_weights(folder: Path) -> str:
    """A digest of a model's files: small ones as a whole, of weights the size, the beginning and blocks in between, so
    that 60 GB take a second."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in _WEIGHTS or not path.is_file():
            continue
        size = path.stat().st_size
        total.update(f"{path.name} {size}\0".encode())
        with path.open("rb") as file:
            for number in range(_SAMPLES if size > _SAMPLES * _SAMPLE_BYTES else 1):
                file.seek(number * (size // _SAMPLES) if size > _SAMPLES * _SAMPLE_BYTES else 0)
                total.update(file.read(_SAMPLE_BYTES if size > _SAMPLES * _SAMPLE_BYTES else size))
    return total.hexdigest()[:16]
