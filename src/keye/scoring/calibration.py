"""Probabilities from scores: logistic models of a few features, fitted by Newton's method.

Pure functions of numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_STEPS = 60


@dataclass(frozen=True)
class LogisticFit:
    """The probability of a row x is sigmoid(bias + weights . x)."""

    bias: float
    weights: tuple[float, ...]

    def probability(self, row: Sequence[float]) -> float:
        """Of the outcome for the features of one row."""
        return float(_sigmoid(np.array(self.bias + float(np.dot(self.weights, row)))))


def fit_logistic(rows: Sequence[Sequence[float]], outcomes: Sequence[bool], penalty: float = 1.0) -> LogisticFit:
    """The weights [d] for features `rows` [n, d] that make `outcomes` likeliest.

    Outcomes are softened to (k + 1) / (k + 2) and 1 / (k + 2) for k outcomes of a kind, as Platt proposes: where the
    features part all rows, probabilities stay off 0 and 1. `penalty` is half the squared weights' share in the loss, in
    units of the features' deviations; the bias has none. At least one row.
    """
    x, truth = np.array(rows, float), np.array(outcomes, bool)
    yes, no = int(truth.sum()), int((~truth).sum())
    targets = np.where(truth, (yes + 1) / (yes + 2), 1 / (no + 2))
    center, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    design = np.column_stack([np.ones(len(x)), (x - center) / scale])
    ridge = np.diag([1e-6, *[penalty] * x.shape[1]])
    weights = np.zeros(design.shape[1])
    for _ in range(_STEPS):
        chances = _sigmoid(design @ weights)
        gradient = design.T @ (chances - targets) + ridge @ weights
        curvature = (design * (chances * (1 - chances))[:, None]).T @ design + ridge
        step = np.linalg.solve(curvature, gradient)
        weights -= step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))  # far steps overshoot
        if np.abs(step).max() < 1e-9:
            break
    slopes = weights[1:] / scale
    return LogisticFit(float(weights[0] - slopes @ center), tuple(slopes.tolist()))


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))
