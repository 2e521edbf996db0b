"""From what a model says to probabilities that hold: logistic models of a few log-odds, fitted once for each model.

A model folder may bring `search.json`, which `benchmarks/find.py --fit` writes from films with known answers:

    {"moment": {"bias": -1.2, "weights": {"coarse": 0.2, "close": 0.7, "alone": 0.5}},
     "presence": {"bias": -0.8, "weights": {"best": 0.9, "coarse": 0.1}}, "threshold": 0.5}

Without it a search has no probabilities, and a moment counts as found where a second question agreed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keye.config import ConfigError, read_json
from keye.errors import is_number
from keye.sessions.search.questions import clip_log_odds, to_probability
from keye.sessions.search.zoom import Candidate

#: The file in a model's folder.
CALIBRATION_FILE: Final = "search.json"
#: What a weight may be of.
MOMENT_FEATURES: Final = ("coarse", "close", "alone", "disagree", "seconds")
PRESENCE_FEATURES: Final = ("best", "second", "coarse")
#: The threshold of models without a calibration, whose moments have no probability.
DEFAULT_THRESHOLD: Final = 0.5


@dataclass(frozen=True)
class Logistic:
    """The probability sigmoid(bias + sum of weights times features); features without a weight do not count."""

    bias: float
    weights: Mapping[str, float]

    def log_odds(self, features: Mapping[str, float]) -> float:
        return clip_log_odds(self.bias + sum(weight * features[name] for name, weight in self.weights.items()))


@dataclass(frozen=True)
class Calibration:
    """The probability of a moment and of the presence of the event, and from which on a moment counts as found."""

    moment: Logistic
    presence: Logistic
    threshold: float

    def moment_log_odds(self, candidate: Candidate) -> float:
        """How sure it is that the event happens in a candidate that was looked at closely, as log-odds."""
        return self.moment.log_odds(moment_features(candidate))

    def presence_probability(self, moments: list[float], coarse: float | None) -> float:
        """The probability that the event is anywhere: by the log-odds of the moments, and of the best window."""
        return to_probability(self.presence.log_odds(presence_features(moments, coarse)))


def moment_features(candidate: Candidate) -> dict[str, float]:
    """What the probability of a candidate may depend on."""
    coarse, close, alone = (0.0 if odds is None else odds for odds in (candidate.coarse, candidate.close,
                                                                      candidate.alone))  # fmt: skip
    disagree = float((close > 0) != (alone > 0))
    return {"coarse": coarse, "close": close, "alone": alone, "disagree": disagree,
            "seconds": min(candidate.seconds, 10.0)}  # fmt: skip


def presence_features(moments: list[float], coarse: float | None) -> dict[str, float]:
    """What the probability of presence may depend on: log-odds of the best two moments and of the best window."""
    best = sorted(moments, reverse=True) + [clip_log_odds(-100.0)] * 2
    return {"best": best[0], "second": best[1], "coarse": 0.0 if coarse is None else coarse}


def load_calibration(folder: Path | None) -> Calibration | None:
    """The calibration in a model's folder; None where there is none. `ConfigError` for one that keye does not write."""
    if folder is None or not (folder / CALIBRATION_FILE).exists():
        return None
    path = folder / CALIBRATION_FILE
    raw = read_json(path)
    threshold = raw.get("threshold", DEFAULT_THRESHOLD)
    if not is_number(threshold) or not 0 <= threshold <= 1:
        raise ConfigError(f"{path} has threshold {threshold!r}; it must be a number from 0 to 1")
    return Calibration(
        _read_logistic(path, raw, "moment", MOMENT_FEATURES), _read_logistic(path, raw, "presence", PRESENCE_FEATURES),
        float(threshold),
    )  # fmt: skip


def _read_logistic(path: Path, raw: Mapping[str, Any], name: str, known: tuple[str, ...]) -> Logistic:
    part = raw.get(name)
    weights = part.get("weights") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not is_number(part.get("bias")) or not isinstance(weights, Mapping):
        raise ConfigError(f"{path} has {name} {part!r}; it must have a bias and weights")
    if set(weights) - set(known) or not all(map(is_number, weights.values())):
        raise ConfigError(f"{path} has weights {dict(weights)!r} of {name}; numbers of {', '.join(known)} are known")
    return Logistic(float(part["bias"]), {feature: float(weight) for feature, weight in weights.items()})
