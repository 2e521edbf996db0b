"""Requests, the events that they emit, and where they stand: plain data, the same for every front.

A `GenerationRequest` and its events are what callers see. `Task` is a request in the engine; its `state` is one class
per stage of its life, with the fields that exist in it:

    Waiting -> LoadingMedia -> Ready -> Prefilling -> Generating -> Closed

A preempted task is `Ready` again and keeps the state to resume from. Every state releases what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args

from torch import Tensor

from keye.cache.sequence import KVCache
from keye.chat.template import Segment
from keye.chat.tokenizer import StreamDecoder
from keye.engine.prompt import Prompt
from keye.engine.sampling import Sampler, SamplingParams, StopText
from keye.engine.vision import VisionJob
from keye.errors import KeyeError, KeyeWarning
from keye.models.adapters import Adapter
from keye.models.attention import AttentionMode, Selection

if TYPE_CHECKING:
    from keye.cache.saved import SavedCaches
    from keye.engine.evidence import Evidence

#: Most choices of one request, and most alternatives reported with a token.
MAX_CHOICES, MAX_LOGPROBS = 128, 20


class Guide(Protocol):
    """Holds a reply to a form: `mask` says which tokens may come next (bool [V], None for all), `settle` which one
    replaces a drawn one; `advance` is called with each."""

    def mask(self) -> Tensor | None: ...

    def settle(self, token: int) -> int: ...

    def advance(self, token: int) -> None: ...

    def fork(self) -> Guide: ...


@dataclass(frozen=True)
class GenerationRequest:
    """A rendered prompt (or one laid out before), and how to continue it, `n` times.

    `logprobs` is the number of alternatives wanted beside each token, None for no probabilities; `prompt_logprobs` the
    same for each token of the prompt. Probabilities are those of the model, before temperature, penalties, bias and
    forms. `ignore_eos` goes on to `max_tokens`. `skip_special` leaves control tokens out of the text. `deterministic`
    makes the tokens independent of whatever else is computed, at a cost. `stop_loops` ends a reply that repeats itself
    without end. `notes` are warnings on the request itself. `salt` keeps what is cached for one owner from all others.
    `seconds` is the longest the request may take. With `clamp` a `max_tokens` beyond the context's end becomes what is
    left of it, else it is an error. `reasoning` says that the prompt has opened a block of reasoning. A `prefill_only`
    request is complete when its prompt is computed, and `Finished` hands over its stored sequence. `records` asks for a
    `TokenRecord` of each token; `experts` for those that computed each token, also of the prompt, and `indexer_sets`
    for the positions that were attended to. Without `detokenize` no text comes, and no stop string ends it.
    `select` other than "indexer" replaces the choice of keys in sparse attention, as a control. `adapter` changes what
    the model computes of it; None for the model's default.
    """

    prompt: Sequence[Segment] | Prompt
    params: SamplingParams
    attention: AttentionMode
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    skip_special: bool = True
    guide: Guide | None = None
    evidence: bool = False
    deterministic: bool = False
    salt: bytes = b""
    seconds: float | None = None
    stop_loops: bool = True
    notes: tuple[KeyeWarning, ...] = ()
    clamp: bool = False
    reasoning: bool = False
    prefill_only: bool = False
    records: bool = False
    experts: bool = False
    indexer_sets: bool = False
    detokenize: bool = True
    select: Selection = "indexer"
    adapter: Adapter | None = None

    @property
    def vision_salt(self) -> bytes:
        """Keeps the visual tokens of one owner from those of all others, and those that an adapter changes from those
        that none does."""
        return self.salt + self.adapter.vision_salt if self.adapter is not None else self.salt

    @property
    def is_stored(self) -> bool:
        """Whether the prompt is computed to be stored, for a stream or an index: no reply and no scores are wanted."""
        return self.prefill_only and self.prompt_logprobs is None

    @property
    def counts_selections(self) -> bool:
        """Whether the selections of each step that produces a token are counted."""
        return self.evidence or self.indexer_sets

    def __post_init__(self) -> None:
        check_attention(self.attention)
        if type(self.n) is not int or not 1 <= self.n <= MAX_CHOICES:
            raise KeyeError(f"n is {self.n!r}; choose 1 to {MAX_CHOICES}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if name == "prompt_logprobs" and self.prefill_only:
                continue  # `Engine.score` returns tensors, which take far less memory than `TokenProb`
            if value is not None and (type(value) is not int or not 0 <= value <= MAX_LOGPROBS):
                raise KeyeError(f"{name} is {value!r}; choose 0 to {MAX_LOGPROBS}")


def check_attention(attention: object) -> None:
    """`KeyeError` for anything but "sparse" and "dense"."""
    if attention not in get_args(AttentionMode):
        raise KeyeError(f"attention is {attention!r}; choose sparse or dense")


@dataclass(frozen=True)
class Progress:
    """How far a request has come before its first token: `phase` is media, encode or prefill. `cached` tokens of a
    prompt were computed before."""

    phase: str
    done: int
    total: int
    cached: int = 0


@dataclass(frozen=True)
class TokenProb:
    """A token that was drawn or could have been, with its natural log-probability. `rank` counts from 1, the likeliest
    token; only tokens of a prompt have it."""

    token: int
    text: str
    raw: bytes
    logprob: float
    top: tuple[TokenProb, ...] = ()
    rank: int | None = None


#: Of the forward pass of one token, where its request asks for it: the selected experts int16 [routed layers, experts
#: per token], and the positions that it attended to, int32 [layers, k], ascending and -1 after the last.
Routing = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class TokenRecord:
    """A generated token: its natural log-probability in the distribution that it was sampled from (after temperature,
    filters, penalties and guide; 0 for greedy and forced tokens) and in the model's own, the version of the weights
    that computed it, and the `Routing` of the forward pass that produced it."""

    token: int
    logprob: float
    raw_logprob: float
    weights_version: int
    experts: Tensor | None
    indexer_set: Tensor | None


@dataclass(frozen=True)
class PromptScores:
    """Log-probabilities of the tokens of a prompt but the first. `token_ids`, `ranks` (from 1, the likeliest token)
    int64 [T - 1]; `logprobs` float32 [T - 1]; the likeliest tokens at each place `top_ids` int64 [T - 1, k] and their
    `top_logprobs` float32 [T - 1, k]. On the CPU."""

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


@dataclass(frozen=True)
class Prefilled:
    """The prompt, which begins with `first_token`, is computed; replies follow. `prompt_probs` and `notes` as in
    `Finished`."""

    prompt_tokens: int
    first_token: int
    prompt_probs: tuple[TokenProb, ...] | None = None
    notes: tuple[KeyeWarning, ...] = ()


@dataclass(frozen=True)
class Delta:
    """More of choice `choice_index`: text, and the tokens of it; `probs` and `records` if they were asked for."""

    choice_index: int
    text: str
    tokens: tuple[int, ...] = ()
    probs: tuple[TokenProb, ...] = ()
    records: tuple[TokenRecord, ...] = ()


@dataclass(frozen=True)
class Ended:
    """Choice `choice_index` is complete: `reason` is "stop", "length", or "loop" for one that repeated itself. `met` is
    the string or the token that stopped it; `is_requested` says that the request named it, and that it is not the
    model's end-of-sequence token. `record` is that of the token, which no `Delta` has."""

    choice_index: int
    reason: str
    met: str | int | None = None
    is_requested: bool = False
    record: TokenRecord | None = None

    @property
    def openai_reason(self) -> str:
        """The reason in the words of OpenAI's protocol, which has none for loops."""
        return "length" if self.reason == "loop" else self.reason


@dataclass(frozen=True)
class Finished:
    """The whole request is complete. `media` are the plans, `seconds` wall time by phase. `prompt_probs` has one entry
    for each token of the prompt but the first. `looped` tells that a choice was ended because it repeated itself,
    `notes` what of the request was not honoured. A `prefill_only` request hands over its `sequence`, which the receiver
    frees, and its `scores` if prompt_logprobs were asked for. `prompt_experts` int16 [prompt tokens, routed layers,
    experts per token] if the request asks for experts."""

    prompt_tokens: int
    media_tokens: int
    completion_tokens: int
    cached_tokens: int
    media: tuple[Mapping[str, Any], ...]
    seconds: Mapping[str, float]
    attention: AttentionMode
    prompt: Prompt
    evidence: Evidence | None = None
    prompt_probs: tuple[TokenProb, ...] | None = None
    looped: bool = False
    notes: tuple[KeyeWarning, ...] = ()
    weights_version: int = 0
    sequence: KVCache | None = None
    scores: PromptScores | None = None
    prompt_experts: Tensor | None = None


@dataclass(frozen=True)
class Failed:
    """The request ended with an error; nothing more comes."""

    error: BaseException


Event = Progress | Prefilled | Delta | Ended | Finished | Failed


@dataclass(eq=False)
class Choice:
    """One reply of a request: what it has generated and how it goes on. `reason` is set when it is complete; `thought`
    counts the tokens of reasoning while it is inside a block of reasoning."""

    choice_index: int
    sampler: Sampler
    decoder: StreamDecoder | None
    stop: StopText
    guide: Guide | None
    reply: list[int] = field(default_factory=list)
    reason: str | None = None
    thought: int | None = None


@dataclass(eq=False)
class Branch:
    """The sequence of a choice that is generating. `pending` tokens are not computed yet, the first of them is at
    `position`; `logits` and `routing` are those of the last computed token, until the next token is drawn."""

    choice: Choice
    cache: KVCache
    pending: list[int]
    position: int
    logits: Tensor | None
    routing: Routing = (None, None)


@dataclass(frozen=True)
class Waiting:
    """Not begun."""

    def release(self) -> None: ...


@dataclass(frozen=True)
class LoadingMedia:
    """A thread opens its media and lays out its prompt."""

    prompt: Future[Prompt]

    def release(self) -> None:
        """A thread at work ends by itself: what it lays out holds no decode worker yet."""
        self.prompt.cancel()


@dataclass(eq=False)
class Ready:
    """Laid out; waits for memory. `preempted` is what it goes on from, None at the beginning of the prompt. `blocked`
    is how many requests had ended when it last found no memory: it tries again when that has grown."""

    prompt: Prompt
    preempted: Preempted | None = None
    blocked: int | None = None

    def release(self) -> None:
        if self.preempted is not None:
            self.preempted.saved.free()


@dataclass(eq=False)
class Prefilling:
    """Its media are encoded and its prompt is computed. `logits` are those after the last token of the prompt, until
    the choices start from them."""

    prompt: Prompt
    cache: KVCache
    vision: VisionJob
    logits: Tensor | None = None
    routing: Routing = (None, None)

    @property
    def done(self) -> int:
        """Tokens of the prompt that are computed."""
        return self.cache.length(0)

    @property
    def caches(self) -> list[KVCache]:
        return [self.cache]

    def restore(self, caches: Sequence[KVCache]) -> None:
        (self.cache,) = caches

    def release(self) -> None:
        self.vision.close()
        self.cache.free()


@dataclass(eq=False)
class Generating:
    """Its choices generate; `branches` are those that are not complete."""

    prompt: Prompt
    branches: list[Branch]

    @property
    def caches(self) -> list[KVCache]:
        return [branch.cache for branch in self.branches]

    def restore(self, caches: Sequence[KVCache]) -> None:
        for branch, cache in zip(self.branches, caches, strict=True):
            branch.cache = cache

    def release(self) -> None:
        for branch in self.branches:
            branch.cache.free()


@dataclass(frozen=True)
class Closed:
    """The task has ended: it holds nothing and emits nothing more."""

    def release(self) -> None: ...


Running = Prefilling | Generating
RequestState = Waiting | LoadingMedia | Ready | Running | Closed


@dataclass(frozen=True)
class Preempted:
    """The state of a preempted task, and its sequences, which are on disk meanwhile."""

    state: Running
    saved: SavedCaches

    @classmethod
    def save(cls, state: Running, folder: Path) -> Preempted | None:
        """Copies the sequences of `state` to a file in `folder` and releases the state. None where nothing was computed
        or the disk has no room: the prompt and what was generated are computed again then."""
        preempted, past = None, state.prompt.past
        if any(cache.length(0) for cache in state.caches):
            with suppress(KeyeError):  # no room on the disk, or no such folder
                from keye.cache.saved import SavedCaches

                saved = SavedCaches.save(state.caches, folder, () if past is None else past.block_table)
                preempted = cls(state, saved)
        state.release()
        return preempted

    def resume(self) -> Running:
        """The state with its sequences in memory again. `OutOfMemory` where there is no room, and nothing changes."""
        self.state.restore(self.saved.restore())
        return self.state


@dataclass(eq=False)
class Task:
    """A request in the engine. `emit` is called with every event, in the thread that steps. `cached` tokens of the
    prompt were there before it started; `counts` and `counted` are the selections of `Evidence`."""

    request: GenerationRequest
    emit: Callable[[Event], None]
    created: float
    state: RequestState = field(default_factory=Waiting)
    cached: int = 0
    choices: list[Choice] = field(default_factory=list)
    counts: Tensor | None = None
    counted: int = 0
    #: Of the tokens of the prompt as far as it is computed, if the request asks for them: scores if it is
    #: `prefill_only`, else probabilities.
    prompt_scores: list[PromptScores] = field(default_factory=list)
    prompt_probs: list[TokenProb] = field(default_factory=list)
    #: Of the tokens of the prompt, in parts int16 [n, routed layers, experts per token], if the request asks for it.
    experts: list[Tensor] = field(default_factory=list)
    notes: list[KeyeWarning] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    aborted: bool = False
    #: Whether it was preempted although it ran alone, because its blocks were fragmented.
    retried: bool = False
    #: Number of the step that last computed something of it.
    last_step: int = 0

    def forget_computed(self) -> None:
        """Forgets what was recorded while its tokens were computed, which are computed again."""
        self.prompt_scores, self.prompt_probs, self.experts, self.counts, self.counted = [], [], [], None, 0

    @property
    def wanted_prompt_probs(self) -> tuple[TokenProb, ...] | None:
        """The probabilities of the prompt for an event; None where they were not asked for."""
        is_wanted = self.request.prompt_logprobs is not None and not self.request.prefill_only
        return tuple(self.prompt_probs) if is_wanted else None

    @property
    def has_ended(self) -> bool:
        return isinstance(self.state, Closed)

    @property
    def is_running(self) -> bool:
        """Whether it holds memory for keys and values."""
        return isinstance(self.state, Running)
