"""Names of official scorers: (task, kind, implementation) -> function.

An item scorer turns a document and a prediction into the fields that the original returns (`extracted`, `score`, `iou`,
`random`, `judge_needed`, `error` ...). A set scorer turns many into the original's metrics. A document is a mapping
with the fields of the benchmark's public rows that the original reads (`answer`, `options`, `span` ...).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from keye.errors import KeyeError
from keye.scoring.official.matching import remove_reasoning

Document = Mapping[str, Any]
Fields = dict[str, Any]
ItemScorer = Callable[[Document, Any], Fields]
"""(document, prediction) -> fields. The prediction is text; for calls a list of them; None for kinds without one."""
SetScorer = Callable[[Document, Sequence[tuple[Document, Any]]], Fields]
"""(input, items) -> fields. The items are those that the input names, in order; none where records stand in it."""

#: Kinds that score many predictions at once.
SET_KINDS: Final = ("aggregate",)
#: Modules of this package that register scorers.
_MODULES: Final = tuple(
    "calls instructions keye_repository longvideobench mathematics mmmu multiple_choice open_answers repository_tests"
    " timelens videomme_v2 yes_no".split()
)
#: The release of lmms-eval whose command line removes reasoning before it scores; its Python interface does not.
_COMMAND_LINE: Final = "lmms-eval-0.7.3"
#: Kinds that score something else than a reply of the model.
_OTHER_TEXTS: Final = ("group", "subtitles", "judge_reply", "captioning_judge_reply", "topic_judge_reply")

Scorer = TypeVar("Scorer", bound=Callable[..., Fields])

_scorers: dict[tuple[str, str, str], Callable[..., Fields]] = {}


def register(tasks: str, kind: str, *implementations: str) -> Callable[[Scorer], Scorer]:
    """Decorates a scorer; `tasks` are names divided by spaces."""

    def add(scorer: Scorer) -> Scorer:
        for task in tasks.split():
            for implementation in implementations:
                key = (task, kind, implementation)
                assert key not in _scorers, f"{key} is registered twice"
                _scorers[key] = scorer
                if implementation == _COMMAND_LINE and kind not in _OTHER_TEXTS:
                    _scorers[task, kind, f"{implementation}-cli"] = _score_without_reasoning(scorer, kind)
        return scorer

    return add


def _score_without_reasoning(scorer: Callable[..., Fields], kind: str) -> Callable[..., Fields]:
    def clean(prediction: Any) -> Any:
        return remove_reasoning(prediction) if isinstance(prediction, str) else prediction

    def score_item(document: Document, prediction: Any) -> Fields:
        return scorer(document, clean(prediction))

    def score_set(document: Document, items: Sequence[tuple[Document, Any]]) -> Fields:
        return scorer(document, [(item, clean(prediction)) for item, prediction in items])

    return score_set if kind in SET_KINDS else score_item


def find_scorer(task: str, kind: str, implementation: str) -> Callable[..., Fields]:
    """The scorer of a name; `KeyeError` that lists those of the task where there is none."""
    _load()
    scorer = _scorers.get((task, kind, implementation))
    if scorer is None:
        known = ", ".join(list_implementations(task, kind)) or "none"
        raise KeyeError(f"{implementation!r} does not score {task} ({kind}); those that do: {known}")
    return scorer


def list_implementations(task: str, kind: str = "item") -> list[str]:
    """Names of those that score a task, in alphabetical order."""
    _load()
    return sorted(name for known_task, known_kind, name in _scorers if (known_task, known_kind) == (task, kind))


def _load() -> None:
    for module in _MODULES:
        importlib.import_module(f"keye.scoring.official.{module}")
