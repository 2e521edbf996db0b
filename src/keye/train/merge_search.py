"""Searching the weights of an average of models by what it scores on held-out data.

The search is deterministic and asks for one score after another: each model alone, their plain mean, then steps from
the best weights so far towards and away from each model, half as long whenever none of them is better.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from keye.api import Keye
from keye.data.samples import Sample
from keye.data.sources import DataSet, open_samples
from keye.engine.prompt import PromptBuilder
from keye.scoring.metrics import text_matches
from keye.train.layout import Layout
from keye.train.merge import Average, MergeError
from keye.train.tree import IGNORE

Score = Literal["exact", "loss"]
#: The log of a search in its output folder.
TRIALS_FILE: Final = "trials.jsonl"
#: The first step, and the shortest.
_STEP: Final = 0.5
_LAST_STEP: Final = 0.02
#: Conversations that are answered at once.
_TOGETHER: Final = 32


@dataclass(frozen=True)
class Trial:
    """Weights that were tried and their score, larger is better."""

    weights: tuple[float, ...]
    score: float
    seconds: float


def search_weights(
    models: int, evaluate: Callable[[tuple[float, ...]], float], *, trials: int,
    known: Mapping[tuple[float, ...], Trial] | None = None, on_trial: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:  # fmt: skip
    """The trials of a search of at most `trials` evaluations; those `known` from a run before are taken from there. The
    best one is that of the highest score, the earliest among equals. `MergeError` where not even each model and the
    mean of all can be tried."""
    if trials < models + 1:
        raise MergeError(f"{trials} trials are fewer than {models} models and their mean; give at least {models + 1}")
    done: dict[tuple[float, ...], Trial] = {}

    def try_weights(weights: tuple[float, ...]) -> None:
        if weights in done or len(done) >= trials:
            return
        trial = (known or {}).get(weights)
        if trial is None:
            begin = time.monotonic()
            trial = Trial(weights, evaluate(weights), time.monotonic() - begin)
        done[weights] = trial
        on_trial(trial)

    for model in range(models):
        try_weights(tuple(float(model == other) for other in range(models)))
    try_weights(_round([1 / models] * models))
    step = _STEP
    while step >= _LAST_STEP and len(done) < trials:
        best = find_best(done.values())
        for neighbour in _neighbours(best.weights, step):
            try_weights(neighbour)
        if find_best(done.values()) is best:
            step /= 2
    return list(done.values())


def find_best(trials: Iterable[Trial]) -> Trial:
    """The trial with the highest score, the earliest among equals."""
    return max(trials, key=lambda trial: trial.score)


def _neighbours(weights: Sequence[float], step: float) -> Iterator[tuple[float, ...]]:
    """Weights a step towards each model, then away from it; none is negative."""
    for model in range(len(weights)):
        yield _round([(1 - step) * weight + step * (model == other) for other, weight in enumerate(weights)])
    for model, own in enumerate(weights):
        if 0 < own < 1:
            yield _round([weight * (1 - step * (model == other)) for other, weight in enumerate(weights)])


def _round(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights that add up to 1 and are written with four digits."""
    rounded = [round(weight / sum(weights), 4) for weight in weights]
    largest = max(range(len(rounded)), key=rounded.__getitem__)
    rounded[largest] = round(rounded[largest] + 1 - sum(rounded), 4)
    return tuple(rounded)


class HeldOut(Protocol):
    """What models are scored on. `digest` tells it from other data, `score` names what is measured."""

    @property
    def digest(self) -> str: ...

    @property
    def score(self) -> str: ...

    def evaluate(self, model: Keye) -> float:
        """The score of a model; larger is better."""


class DevSet:
    """Held-out conversations that a model is scored on: the share of last replies that it gives in the same words
    (`exact`, greedy), or the mean log-probability of their tokens (`loss`)."""

    def __init__(self, data: Sequence[DataSet], score: Score) -> None:
        stream = open_samples(data, seed=0, epochs=1)
        self.samples = [sample for sample in stream if sample.messages[-1].role == "assistant" and sample.learn[-1]]
        self.skipped = len(stream.skipped)
        self.score: Score = score
        if not self.samples:
            raise MergeError("the held-out data has no conversation that ends with a reply; give others with --search")

    @property
    def digest(self) -> str:
        """A hash of what is asked and expected."""
        text = "\n".join(repr((sample.messages, sample.tools)) for sample in self.samples)
        return hashlib.sha256(f"{self.score}\n{text}".encode()).hexdigest()[:16]

    def evaluate(self, model: Keye) -> float:
        """The score of a model; larger is better."""
        return self._exact(model) if self.score == "exact" else self._log_probability(model)

    def _exact(self, model: Keye) -> float:
        right = 0
        for first in range(0, len(self.samples), _TOGETHER):
            some = self.samples[first : first + _TOGETHER]
            answers = model.batch([sample.messages[:-1] for sample in some], temperature=0.0)
            right += sum(text_matches(answer.text, _reply(own)) for answer, own in zip(answers, some, strict=True))
        return right / len(self.samples)

    def _log_probability(self, model: Keye) -> float:
        builder = PromptBuilder(model.config, model.tokenizer, model.processor)
        layout, total, count = Layout(builder, model.runtime.template), 0.0, 0
        for sample in self.samples:
            path = layout.lay_out(sample).paths[0]
            prompt = builder.lay_out(builder.render(sample.messages, template=layout.template))
            scores = model.engine.score([prompt])[0].logprobs[: len(path.token_ids) - 1]
            learnt = path.labels[:-1] != IGNORE
            total, count = total + float(scores[learnt].sum()), count + int(learnt.sum())
        return total / count


def _reply(sample: Sample) -> str:
    return "".join(part for part in sample.messages[-1].parts if isinstance(part, str))


def _read_trials(file: Path, header: Mapping[str, Any]) -> dict[tuple[float, ...], Trial]:
    """The trials of a log, whose first line is `header`; an incomplete last line is cut off. `MergeError` for the log
    of another search."""
    if not file.exists():
        file.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return {}
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        file.write_text("".join(lines), encoding="utf-8")
    try:
        first, *rest = map(json.loads, lines)
        if first != header:
            raise MergeError(f"{file} is the log of a search of other models or data: name another folder")
        trials = [Trial(tuple(trial["weights"]), trial["score"], trial["seconds"]) for trial in rest]
    except (ValueError, KeyError, TypeError):
        raise MergeError(f"{file} is not the log of a search: name another folder") from None
    return {trial.weights: trial for trial in trials}


@dataclass(frozen=True)
class SearchResult:
    """What a search found, and all that it tried."""

    best: Trial
    trials: tuple[Trial, ...]

    def to_dict(self) -> dict[str, Any]:
        """As `--json` has it."""
        trials = [asdict(trial) for trial in self.trials]
        return {"weights": list(self.best.weights), "score": self.best.score, "trials": trials}


def search_average(
    average: Average, dev: HeldOut, output: Path, *, trials: int, open_model: Callable[[Path], Keye],
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> SearchResult:  # fmt: skip
    """Searches the weights of an average. Every trial is a line of `TRIALS_FILE` in `output`; a search of the same
    models and data that was interrupted goes on there. The weights of one model in memory, which `open_model` loads,
    are replaced tensor by tensor."""
    output.mkdir(parents=True, exist_ok=True)
    header = {"models": [str(folder) for folder in average.folders], "data": dev.digest, "score": dev.score}
    known = _read_trials(output / TRIALS_FILE, header)
    loaded: list[Keye] = []  # once something has to be evaluated

    def evaluate(weights: tuple[float, ...]) -> float:
        model = loaded[0] if loaded else open_model(average.folders[0])
        loaded[:] = [model]
        own = set(model.model.state_dict())
        for name in average.names:
            if name in own:
                model.engine.update_weights({name: average.tensor(name, weights)})
        return dev.evaluate(model)

    with (output / TRIALS_FILE).open("a", encoding="utf-8") as file:

        def record(trial: Trial) -> None:
            if trial.weights not in known:
                file.write(json.dumps(asdict(trial)) + "\n")
                file.flush()
            on_trial(trial)

        done = search_weights(len(average.folders), evaluate, trials=trials, known=known, on_trial=record)
    return SearchResult(find_best(done), tuple(done))
