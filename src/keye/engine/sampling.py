"""How the next token is drawn, and when to stop. Knows logits and token ids; no text but the stop strings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keye.checks import is_number, is_whole
from keye.errors import KeyeError

MAX_SEED = 2**63 - 1
#: Temperatures below this are greedy: dividing by them would leave the range of numbers.
GREEDY_BELOW = 1e-5
#: What parts the seeds of the choices of one request: an odd number far from any that people choose.
_CHOICE_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one generation. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 switch a filter off.

    `repetition_penalty` above 1 divides positive and multiplies negative logits of tokens of the reply so far. `stop`
    strings end the reply and are left out of it. Raises `KeyeError` that names the field and its range.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        number, whole = is_number, is_whole
        checks = (
            ("max_tokens", lambda v: whole(v) and v >= 1, "a whole number of at least 1"),
            ("temperature", lambda v: number(v) and 0 <= v <= 100, "a number between 0 and 100"),
            ("top_p", lambda v: number(v) and 0 < v <= 1, "a number above 0 and at most 1"),
            ("top_k", lambda v: whole(v) and v >= 0, "a whole number, 0 (off) or more"),
            ("min_p", lambda v: number(v) and 0 <= v <= 1, "a number between 0 and 1"),
            ("repetition_penalty", lambda v: number(v) and 0 < v <= 100, "a number above 0 and at most 100"),
            ("seed", lambda v: v is None or (whole(v) and 0 <= v <= MAX_SEED), f"a whole number from 0 to {MAX_SEED}"),
            ("stop", _are_texts, "strings that are not empty"),
        )
        for name, fine, rule in checks:
            if not fine(getattr(self, name)):
                raise KeyeError(f"{name} is {getattr(self, name)!r}; it must be {rule}")

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        """Names of all settings."""
        return tuple(field.name for field in dataclasses.fields(cls))


def _are_texts(stop: object) -> bool:
    return isinstance(stop, list | tuple) and all(isinstance(text, str) and text for text in stop)


def check_logits(logits: Tensor) -> None:
    """`KeyeError` where logits hold NaN: any token drawn from them would be noise."""
    if bool(logits.isnan().any()):
        raise KeyeError(
            "the model computes NaN (not a number): its weights are damaged or too large for its number format; fetch "
            "the checkpoint again, or load it with dtype float32"
        )


class Sampler:
    """Draws tokens under fixed settings; the same seed, index and logits give the same tokens. `index` parts the
    choices of one request."""

    def __init__(self, params: SamplingParams, index: int = 0) -> None:
        self.params = params
        self._generator = torch.Generator()
        if params.seed is not None:
            self._generator.manual_seed((params.seed + index * _CHOICE_STEP) & MAX_SEED)
        else:
            self._generator.seed()

    def takes_best(self, history: Sequence[int]) -> bool:
        """Whether the next token is simply the likeliest."""
        return self.params.temperature < GREEDY_BELOW and (self.params.repetition_penalty == 1.0 or not history)

    def __call__(self, logits: Tensor, history: Sequence[int]) -> int:
        """`logits` float32 [V] and the tokens of the reply so far -> the next token id; `KeyeError` for NaN."""
        check_logits(logits)
        params = self.params
        if params.repetition_penalty != 1.0 and history:
            logits = _penalise(logits, history, params.repetition_penalty)
        if params.temperature < GREEDY_BELOW:
            return int(logits.argmax())
        probabilities = filtered_probabilities(logits.cpu(), params)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def filtered_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [V] after temperature, top-k, min-p and top-p, in this order; they sum to 1."""
    scores = logits.double()
    # Without the shift a temperature near 0 would make infinite scores of the likeliest tokens.
    probs = ((scores - scores.max()) / params.temperature).softmax(-1)
    if 0 < params.top_k < probs.numel():
        kth = probs.topk(params.top_k).values[-1]
        probs = probs.masked_fill(probs < kth, 0.0)
    if params.min_p > 0:
        probs = probs.masked_fill(probs < params.min_p * probs.max(), 0.0)
    if params.top_p < 1:
        ordered, order = probs.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        cut = before >= params.top_p * ordered.sum()
        probs = probs.index_fill(0, order[cut], 0.0)
    return probs / probs.sum()


def _penalise(logits: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    ids = torch.tensor(sorted(set(history)), device=logits.device)
    seen = logits[ids]
    return logits.index_copy(0, ids, torch.where(seen > 0, seen / penalty, seen * penalty))


class StopText:
    """Holds back the end of a text stream while it could be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self._held, self.stopped = tuple(stop), "", False

    def push(self, text: str) -> str:
        """Adds text and returns what may be shown; sets `stopped` once a stop string was seen."""
        self._held += text
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """What was held back when the stream ended without a stop string."""
        held, self._held = self._held, ""
        return held
