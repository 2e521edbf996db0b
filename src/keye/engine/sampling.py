"""How the next token is drawn, and when to stop. Knows logits and token ids; no text but the stop strings."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard

import torch
from torch import Tensor

from keye.errors import KeyeError, is_number, is_whole

MAX_SEED = 2**63 - 1
#: Temperatures below this are greedy: dividing by them would leave the range of numbers.
GREEDY_BELOW = 1e-5
#: What parts the seeds of the choices of one request: an odd number far from any that people choose.
_CHOICE_STEP = 0x9E3779B97F4A7C15
_NOTHING_LEFT = "allowed_token_ids and the form of the reply leave no token to go on; leave one of them out"


#: Most entries of a list of tokens, and most texts of `stop` and of `bad_words`.
MAX_LISTED, MAX_TEXTS = 4096, 256
#: A reply is looked at after each so many tokens.
LOOP_INTERVAL: Final = 16
#: How often its last part must have been repeated, and how long all repetitions must be, in tokens: half of what may be
#: written, within these bounds.
_LOOP_TIMES: Final = 8
_LOOP_LEAST: Final = 48
_LOOP_MOST: Final = 256
#: The longer end of a reply that is searched for long repetitions, in lengths of the shorter.
_LOOP_LONGER: Final = 4


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one generation. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 switch a filter off.

    `repetition_penalty` above 1 divides positive and multiplies negative logits of tokens of the reply so far;
    `frequency_penalty` is subtracted once for each time a token stands in it, `presence_penalty` once if it does.
    `logit_bias` ({token id: -100 to 100}) is added to logits, and only `allowed_token_ids` are drawn where these are
    given. `stop` strings end the reply and are left out of it unless `include_stop_str_in_output`; so do tokens of
    `stop_token_ids`, whose text is never shown otherwise. Before `min_tokens` tokens nothing ends a reply. `bad_words`
    are texts that the reply does not hold, as far as their usual tokens go. After `thinking_token_budget` tokens of
    reasoning its end is written. Raises `KeyeError` that names the field and its range.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    bad_words: tuple[str, ...] = ()
    thinking_token_budget: int | None = None

    def __post_init__(self) -> None:
        number, integer, listed = is_number, is_whole, f"at most {MAX_LISTED:,} token ids"
        numbers = "a whole number from"
        checks = (
            ("max_tokens", lambda v: integer(v) and v >= 1, "a whole number of at least 1"),
            ("temperature", lambda v: number(v) and 0 <= v <= 100, "a number between 0 and 100"),
            ("top_p", lambda v: number(v) and 0 < v <= 1, "a number above 0 and at most 1"),
            ("top_k", lambda v: integer(v) and v >= 0, "a whole number, 0 (off) or more"),
            ("min_p", lambda v: number(v) and 0 <= v <= 1, "a number between 0 and 1"),
            ("repetition_penalty", lambda v: number(v) and 0 < v <= 100, "a number above 0 and at most 100"),
            ("frequency_penalty", lambda v: number(v) and -2 <= v <= 2, "a number between -2 and 2"),
            ("presence_penalty", lambda v: number(v) and -2 <= v <= 2, "a number between -2 and 2"),
            ("logit_bias", _is_bias, f"numbers between -100 and 100 for {listed}"),
            ("allowed_token_ids", lambda v: v is None or (_are_tokens(v) and len(v) > 0), f"{listed}, and some"),
            ("seed", lambda v: v is None or (integer(v) and 0 <= v <= MAX_SEED), f"{numbers} 0 to {MAX_SEED}"),
            ("stop", _are_texts, f"at most {MAX_TEXTS} strings that are not empty"),
            ("stop_token_ids", _are_tokens, listed),
            ("include_stop_str_in_output", lambda v: isinstance(v, bool), "true or false"),
            ("min_tokens", lambda v: integer(v) and v >= 0, "a whole number, 0 or more"),
            ("bad_words", _are_texts, f"at most {MAX_TEXTS} strings that are not empty"),
            ("thinking_token_budget", lambda v: v is None or (integer(v) and v >= 0), "a whole number, 0 or more"),
        )
        for name, fine, rule in checks:
            if not fine(getattr(self, name)):
                value = repr(getattr(self, name))
                value = value if len(value) <= 200 else value[:200] + "..."
                raise KeyeError("{}", f"{name} is {value}; it must be {rule}")
        if self.min_tokens > self.max_tokens:
            raise KeyeError(f"min_tokens is {self.min_tokens}, above max_tokens, which is {self.max_tokens}")

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        """Names of all settings."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @property
    def token_ids(self) -> Iterator[tuple[str, int]]:
        """Every token that a setting names, with the setting's name."""
        for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
            for token in getattr(self, name) or ():
                yield name, token

    @property
    def takes_logits_as_they_are(self) -> bool:
        """Whether nothing changes the logits before a token is drawn from them."""
        return (
            self.repetition_penalty == 1.0
            and not (self.frequency_penalty or self.presence_penalty or self.logit_bias or self.bad_words)
            and self.allowed_token_ids is None
            and not self.min_tokens
        )


def _are_texts(value: object) -> bool:
    return _is_list(value, MAX_TEXTS) and all(isinstance(text, str) and text for text in value)


def _are_tokens(value: object) -> bool:
    return _is_list(value, MAX_LISTED) and all(is_whole(token) and token >= 0 for token in value)


def _is_list(value: object, most: int) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple) and len(value) <= most


def _is_bias(value: object) -> bool:
    if not isinstance(value, Mapping) or not _are_tokens(list(value)):
        return False
    return all(is_number(bias) and -100 <= bias <= 100 for bias in value.values())


def check_logits(logits: Tensor) -> None:
    """`KeyeError` where logits hold NaN: any token drawn from them would be noise."""
    if bool(logits.isnan().any()):
        raise KeyeError(
            "the model computes NaN (not a number): its weights are damaged or too large for its number format; fetch "
            "the checkpoint again, or load it with dtype float32"
        )


class Sampler:
    """Draws tokens under fixed settings; the same seed, index and logits give the same tokens. `index` parts the
    choices of one request, `ends` are the tokens that may not come before `min_tokens`, `banned` sequences of tokens
    whose last one may not follow the others."""

    def __init__(
        self,
        params: SamplingParams,
        index: int = 0,
        *,
        ends: Collection[int] = (),
        banned: Sequence[Sequence[int]] = (),
    ) -> None:
        self.params, self._ends, self._banned = params, sorted({*ends, *params.stop_token_ids}), banned
        self._counts, self._counted = Counter[int](), 0
        self._generator = torch.Generator()
        if params.seed is not None:
            self._generator.manual_seed((params.seed + index * _CHOICE_STEP) & MAX_SEED)
        else:
            self._generator.seed()

    def takes_best(self) -> bool:
        """Whether the next token is simply the likeliest."""
        return self.params.temperature < GREEDY_BELOW and self.params.takes_logits_as_they_are

    def draw(self, logits: Tensor, history: Sequence[int], mask: Tensor | None = None) -> tuple[int, float]:
        """`logits` float32 [V], the tokens of the reply so far (which grows from call to call), and which tokens may
        come (bool [V], None for all) -> the next token, and its natural log-probability in the distribution that it was
        drawn from, 0 for a greedy one; `KeyeError` for NaN, and where no token is left."""
        check_logits(logits)
        if not self.params.takes_logits_as_they_are:
            logits = self._adjusted(logits, history)
        if mask is not None:
            logits = logits.masked_fill(~mask.to(logits.device), -torch.inf)
        if not self.params.takes_logits_as_they_are:
            lasts = [
                words[-1]
                for words in self._banned
                if len(words) == 1 or list(history[-(len(words) - 1) :]) == list(words[:-1])
            ]
            logits = _without(logits, lasts)
            if len(history) < self.params.min_tokens:  # a reply does not end yet, unless a form allows nothing else
                logits = _without(logits, self._ends)
        if self.params.temperature < GREEDY_BELOW:
            token = int(logits.argmax())
            if logits[token] == -torch.inf:
                raise KeyeError(_NOTHING_LEFT)
            return token, 0.0
        probabilities = filtered_probabilities(logits.cpu(), self.params)
        token = int(torch.multinomial(probabilities, 1, generator=self._generator))
        return token, float(probabilities[token].log())

    def _adjusted(self, logits: Tensor, history: Sequence[int]) -> Tensor:
        """Logits after penalties and bias, those of tokens that are not allowed minus infinity."""
        self._counts.update(history[self._counted :])  # the reply has only grown since the last time
        self._counted = len(history)
        params, counts = self.params, self._counts
        if counts and (params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty):
            ids = torch.tensor(list(counts), device=logits.device)
            seen = logits[ids]
            seen = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
            times = torch.tensor(list(counts.values()), device=logits.device, dtype=seen.dtype)
            logits = logits.index_copy(0, ids, seen - params.frequency_penalty * times - params.presence_penalty)
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits.device)
            bias = torch.tensor(list(params.logit_bias.values()), device=logits.device, dtype=logits.dtype)
            logits = logits.index_add(0, ids, bias)
        if params.allowed_token_ids is not None:
            ids = torch.tensor(params.allowed_token_ids, device=logits.device)
            logits = torch.full_like(logits, -torch.inf).index_copy(0, ids, logits[ids])
        return logits


def _without(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Logits without `tokens`; as they were where nothing would be left."""
    if not tokens:
        return logits
    left = logits.index_fill(0, torch.tensor(tokens, device=logits.device), -torch.inf)
    return logits if bool((left == -torch.inf).all()) else left


def filtered_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [V] after temperature, top-k, min-p and top-p, in this order; they sum to 1."""
    scores = logits.double()
    # Without the shift a temperature near 0 would make infinite scores of the likeliest tokens.
    if (highest := scores.max()) == -torch.inf:
        raise KeyeError(_NOTHING_LEFT)
    probs = ((scores - highest) / params.temperature).softmax(-1)
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


class StopText:
    """Withholds the end of a text stream while it could be the beginning of a stop string; `met` is the one that was
    seen. With `shows` it is part of the text, too."""

    def __init__(self, stop: Sequence[str], *, shows: bool = False) -> None:
        self._stop, self._shows, self._withheld = tuple(stop), shows, ""
        self.met: str | None = None

    def push(self, text: str) -> str:
        """Adds text and returns what can be emitted."""
        text = self._withheld + text
        if matches := [(at, s) for s in self._stop if (at := text.find(s)) >= 0]:
            at, self.met = min(matches)
            self._withheld = ""
            return text[: at + (len(self.met) if self._shows else 0)]
        count = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._withheld = text[len(text) - count :]
        return text[: len(text) - count]

    def skip(self, text: str) -> str:
        """Adds text in which no stop string is looked for; returns what can be emitted."""
        text, self._withheld = self._withheld + text, ""
        return text

    def finish(self) -> str:
        """What was withheld when the stream ended without a stop string."""
        return self.skip("")


def is_loop(reply: Sequence[int], max_tokens: int) -> bool:
    """Whether a reply of token ids ends in a part that was repeated at least 8 times in a row.

    Short parts (words, times, a sentence) count once the repetitions fill `max_tokens` / 2, at least 48 and at most 256
    tokens; longer parts once they fill four times that. Looked at every 16 tokens; linear in those numbers.
    """
    if len(reply) % LOOP_INTERVAL:
        return False
    length = min(max(_LOOP_LEAST, max_tokens // 2), _LOOP_MOST)
    return any(len(reply) >= n and _period(reply[-n:]) * _LOOP_TIMES <= n for n in (length, _LOOP_LONGER * length))


def _period(tokens: Sequence[int]) -> int:
    """The shortest part of which `tokens` is a repetition, the last one cut perhaps (Knuth, Morris and Pratt)."""
    borders = [0] * len(tokens)
    border = 0
    for i in range(1, len(tokens)):
        while border and tokens[i] != tokens[border]:
            border = borders[border - 1]
        border += tokens[i] == tokens[border]
        borders[i] = border
    return len(tokens) - border
