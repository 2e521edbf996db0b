"""What a benchmark is to the runner: items read from a folder of public data, a strict score for each reply, the
official scorers by name, and the rule of its headline metric.

    task = find_task("timelens_charades")
    report = task.check(folder)                  # what is missing, before anything runs
    items = list(task.read(folder, TaskSettings()))
    score = task.score(items[0].document, "The event happens in 3.0 - 7.5 seconds.")

A user's task is a subclass of `Task` with `read` and `score`; it is named by `FILE.py:NAME`, or by the entry point of
an installed package (group `keye.tasks`). Knows no model, no server and no files of a particular benchmark.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, Literal

from keye.errors import KeyeError, brief, closest
from keye.evals.published import DIMENSIONS
from keye.scoring.official.registry import Document, find_scorer, list_implementations

GROUP: Final = "keye.tasks"
STRICT: Final = "strict"
#: Modules of `keye.evals.tasks` that have `TASKS`.
_MODULES: Final = (
    "generated", "grounding", "video_choices", "videomme_v2", "subjects", "tempcompass", "kc_mmbench", "image_choices",
    "maths", "pictures", "texts",
)  # fmt: skip


@dataclass(frozen=True)
class TaskSettings:
    """How the items are asked.

    reasoning: ask for reasoning before the answer, where the benchmark has such a prompt.
    subtitles: put subtitles before the question, where the benchmark has them.
    frames: pictures among which subtitles are interleaved (LongVideoBench with subtitles), 16 as in lmms-eval.
    scratch: folder for pictures that lie inside tables; `keye-media` in the data's folder by default.
    """

    reasoning: bool = False
    subtitles: bool = False
    frames: int = 16
    scratch: Path | None = None


@dataclass(frozen=True)
class EvalItem:
    """One question.

    id: unique in the task, and the same whenever the data are read.
    cluster: the video or picture that it shares with others; intervals and reuse of media go by it.
    content: parts of the user's message as OpenAI has them; media by absolute paths ({"type": "video", "video": path}).
    document: the fields that scorers read, as the golden files of the task have them.
    labels: names of parts of a report (category, subject, duration ...) and the item's value.
    has_gold: False where the data withhold the answer: such items are asked, and no score counts them.
    """

    id: str
    cluster: str
    content: tuple[Mapping[str, Any], ...]
    document: Document
    labels: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    has_gold: bool = True


@dataclass(frozen=True)
class ItemScore:
    """What a scorer says of one reply. `score` is 0 to 1; `extracted` is the answer that it read, None for none.
    `random` says that the original draws an option at random, `judge_needed` that it would ask a judge: both score 0
    points."""

    score: float
    extracted: Any = None
    random: bool = False
    judge_needed: bool = False


@dataclass(frozen=True)
class ScoredItem:
    """An item with its reply and score. `prediction` is None where no reply came, and `error` says why."""

    item: EvalItem
    prediction: str | None
    score: float
    extracted: Any = None
    error: str | None = None
    random: bool = False
    judge_needed: bool = False


@dataclass(frozen=True)
class Summary:
    """The headline metric `name` and its value, 0 to 100 (None where nothing could be counted), over `n` items; means
    of parts by label and value; and what had to be decided on the way, a sentence each."""

    name: str
    value: float | None
    n: int
    parts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataReport:
    """What of a task's data is in a folder.

    counts, expected: rows and media by kind ("rows", "media"); expected has those whose published number is known.
    missing_fields: columns that the rows lack. missing_media: all files that rows name and that are not there.
    problems: a sentence for each thing that is wrong, the most important first.
    notes: what is worth knowing and does not stop a run (repeated rows, answers withheld).
    """

    task: str
    folder: str
    counts: Mapping[str, int] = field(default_factory=dict)
    expected: Mapping[str, int] = field(default_factory=dict)
    missing_fields: tuple[str, ...] = ()
    missing_media: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether a run would be one of the whole benchmark."""
        return not (self.problems or self.missing_fields or self.missing_media)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "task": self.task, "folder": self.folder, "complete": self.is_complete, "counts": dict(self.counts),
            "expected": dict(self.expected), "missing_fields": list(self.missing_fields),
            "missing_media": list(self.missing_media), "problems": list(self.problems), "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A benchmark.

    source: id of the data on the Hugging Face hub. licence, gate: of the data; the gate says what must be accepted.
    official: implementations that score it, the one of the reports first. scored_as, kind: its name and kind among the
    official scorers. available: why it cannot be run yet, None where it can. metric: name of the headline metric.
    max_tokens: the longest reply by default. published_as: the name under which `keye.evals.published` has its scores.
    """

    name: str
    title: str
    measures: str
    source: str
    licence: str
    gate: str | None = None
    media: Literal["video", "image", "text"]
    dimension: str | None = None
    official: tuple[str, ...] = ()
    scored_as: str = ""
    kind: str = "item"
    available: str | None = None
    metric: str = "accuracy"
    max_tokens: int = 1024
    published_as: str = ""

    @abstractmethod
    def read(self, folder: Path, settings: TaskSettings) -> Iterator[EvalItem]:
        """The items in the order of the data. `KeyeError` names the file and field that stop it."""

    @abstractmethod
    def score(self, document: Document, prediction: str) -> ItemScore:
        """The strict score of a reply."""

    def item_of(self, row: Mapping[str, Any], number: int) -> EvalItem:
        """The item of a row of the public data, or of a table of predictions that others made, without its media;
        `number` is the row's, from 0 on. `KeyeError` names the fields that it lacks."""
        raise KeyeError(f"{self.title} cannot be read from tables of predictions; give a file that keye wrote")

    def check(self, folder: Path) -> DataReport:
        """What is missing. A task without files of its own has nothing to check."""
        return DataReport(self.name, str(folder))

    @property
    def scorers(self) -> tuple[str, ...]:
        """Names of scorers that can be used now."""
        known = list_implementations(self.scored_as or self.name, self.kind)
        return (STRICT, *(name for name in self.official if name in known))

    def score_with(self, scorer: str, document: Document, prediction: str) -> ItemScore:
        """The score by `strict` or by an official implementation."""
        if scorer == STRICT:
            return self.score(document, prediction)
        fields = find_scorer(self.scored_as or self.name, self.kind, scorer)(document, prediction)
        return self.read_fields(fields, document)

    def read_fields(self, fields: Mapping[str, Any], document: Document) -> ItemScore:
        """The score in what an official scorer returned."""
        value = fields.get("score", 0)
        is_open = bool(fields.get("random") or fields.get("judge_needed") or fields.get("error"))
        return ItemScore(
            0.0 if is_open or not isinstance(value, int | float) else float(value), fields.get("extracted"),
            bool(fields.get("random")), bool(fields.get("judge_needed")),
        )  # fmt: skip

    def official_metrics(self, scorer: str, scored: Sequence[ScoredItem]) -> dict[str, float]:
        """What the aggregation of an official implementation makes of the replies, its rules for groups, rounding and
        denominators included, which the headline does not share. Empty where it has none, where it fails, and where an
        item has no reply, since it would not have finished."""
        task = self.scored_as or self.name
        is_known = scorer != STRICT and scorer in list_implementations(task, "aggregate")
        if not is_known or not scored or any(entry.prediction is None for entry in scored):
            return {}
        pairs = [(entry.item.document, entry.prediction) for entry in scored]
        fields = find_scorer(task, "aggregate", scorer)(self.official_input(scored), pairs)
        return dict(_flatten(fields.get("metrics", {})))

    def official_input(self, scored: Sequence[ScoredItem]) -> Document:
        """What official aggregations read besides the documents and replies: ids, or records."""
        return {"items": [entry.item.id for entry in scored]}

    def summarise(self, scored: Sequence[ScoredItem], scorer: str = STRICT) -> Summary:
        """The headline metric: the mean over all items that have a gold answer, failed ones included as wrong."""
        counted, notes = split_gold(scored)
        return Summary(self.metric, mean_percent(counted), len(counted), parts_of(counted), notes)


def _flatten(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers among metrics, those of tables inside them under both names; texts such as "16.19%" as numbers."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, str) and value.endswith("%"):
            yield f"{prefix}{name}", float(value[:-1])
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)


def split_gold(scored: Sequence[ScoredItem]) -> tuple[list[ScoredItem], tuple[str, ...]]:
    """The items that have a gold answer, and the sentence on the others."""
    counted = [entry for entry in scored if entry.item.has_gold]
    missing = len(scored) - len(counted)
    return counted, ((f"{missing} items have no gold answer and are not counted",) if missing else ())


def mean_percent(scored: Sequence[ScoredItem]) -> float | None:
    """The mean score, 0 to 100."""
    return 100 * math.fsum(entry.score for entry in scored) / len(scored) if scored else None


def mean_over(scored: Sequence[ScoredItem], label: str) -> float | None:
    """The unweighted mean of the means of a label's values, 0 to 100; values without items do not count."""
    groups: dict[str, list[float]] = defaultdict(list)
    for entry in scored:
        if (value := entry.item.labels.get(label)) is not None:
            groups[value].append(entry.score)
    means = [100 * math.fsum(scores) / len(scores) for _, scores in sorted(groups.items())]
    return math.fsum(means) / len(means) if means else None


def parts_of(scored: Sequence[ScoredItem]) -> dict[str, dict[str, float]]:
    """The mean score (0 to 100) of the items with each value of each label, values in alphabetical order."""
    groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for entry in scored:
        for label, value in entry.item.labels.items():
            groups[label][value].append(entry.score)
    return {
        label: {value: 100 * math.fsum(scores) / len(scores) for value, scores in sorted(values.items())}
        for label, values in groups.items()
    }


def list_tasks() -> list[Task]:
    """All tasks of keye and of installed packages, in the order of their names."""
    return sorted(_known().values(), key=lambda task: task.name)


def find_task(name: str) -> Task:
    """The task of a name, or `NAME` of a Python file given as `FILE.py:NAME`. `KeyeError` for an unknown one."""
    tasks = find_tasks(name)
    if len(tasks) > 1:
        raise KeyeError(f"{name} stands for several tasks; name one of {', '.join(task.name for task in tasks)}")
    return tasks[0]


def find_tasks(name: str) -> list[Task]:
    """The task of a name, or those of a family: `timelens` stands for all tasks whose names begin with `timelens_`."""
    if ".py:" in name:
        return [_load_file(name)]
    plain = name.lower().replace("-", "_")
    if plain in _own():
        return [_own()[plain]]
    tasks = _known()
    if plain in tasks:
        return [tasks[plain]]
    family = [task for key, task in sorted(tasks.items()) if key.startswith(f"{plain}_")]
    if plain and family:
        return family
    near = closest(name, tasks)
    hint = f"; did you mean {near}?" if near else ": `keye eval list` shows all"
    raise KeyeError(f"{brief(name)} is not a task{hint}")


@cache
def _own() -> Mapping[str, Task]:
    tasks: dict[str, Task] = {}
    for module in _MODULES:
        for task in importlib.import_module(f"keye.evals.tasks.{module}").TASKS:
            assert task.name not in tasks and task.dimension in (None, *DIMENSIONS), task.name
            tasks[task.name] = task
    return tasks


def _known() -> dict[str, Task]:
    """Tasks of keye and of packages; a name of keye's stays keye's."""
    tasks = dict(_own())
    for point in entry_points(group=GROUP):
        try:
            offered = point.load()
        except Exception as error:  # of the package
            raise KeyeError(f"the task {point.name} cannot be loaded ({error}): see its package") from error
        for task in offered if isinstance(offered, list | tuple) else (offered,):
            tasks.setdefault(_check(task, f"the entry point {point.name}").name, task)
    return tasks


def _load_file(name: str) -> Task:
    """A task in a Python file that the user names, which is run."""
    path, _, attribute = name.rpartition(":")
    spec = importlib.util.spec_from_file_location("keye_user_task", path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise KeyeError(f"{path} is not a file: name a task as FILE.py:NAME")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # of the user's file
        raise KeyeError(f"{path} cannot be loaded ({type(error).__name__}: {error})") from error
    if not hasattr(module, attribute):
        raise KeyeError(f"{path} has no {attribute}: give it a task of that name")
    return _check(getattr(module, attribute), name)


def _check(task: object, place: str) -> Task:
    if not isinstance(task, Task):
        raise KeyeError(f"{place} is a {type(task).__name__}; give an instance of a subclass of keye.evals.task.Task")
    return task
