"""A request and what comes back while it is worked on: plain data, the same for every front.

`Request` is what is asked, the events are what is told; `Task` and `Choice` are how far it has come, for the engine
alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, get_args

from torch import Tensor

from keye.cache.saved import SavedCaches
from keye.cache.sequence import KVCache
from keye.chat.template import Segment
from keye.chat.tokenizer import StreamDecoder
from keye.engine.evidence import Evidence
from keye.engine.prompt import Prompt
from keye.engine.sampling import Sampler, SamplingParams, StopText
from keye.engine.vision import VisionJob
from keye.errors import KeyeError, KeyeWarning
from keye.models.attention import AttentionMode

#: Most choices of one request, and most alternatives told beside a token.
MAX_CHOICES, MAX_LOGPROBS = 128, 20


class Guide(Protocol):
    """What holds a reply to a form: which tokens may come next (bool [V], None for all), what stands in place of one
    that was drawn, told of each that came."""

    def mask(self) -> Tensor | None: ...

    def settle(self, token: int) -> int: ...

    def advance(self, token: int) -> None: ...

    def fork(self) -> Guide: ...


@dataclass(frozen=True)
class Request:
    """A rendered prompt (or one laid out before), and how to continue it, `n` times.

    `logprobs` is the number of alternatives wanted beside each token, None for no probabilities; `prompt_logprobs` the
    same for each token of the prompt. Probabilities are those of the model, before temperature, penalties, bias and
    forms. `ignore_eos` goes on to `max_tokens`. `skip_special` leaves control tokens out of the text. `deterministic`
    makes the tokens independent of whatever else is computed, at a cost. `stop_loops` ends a reply that repeats itself
    without end. `notes` are warnings on the request itself. `salt` keeps what is cached for one owner from all others.
    `seconds` is the longest the request may take. With `clamp` a `max_tokens` beyond the context's end becomes what is
    left of it, else it is an error. `reasoning` says that the prompt has opened a block of reasoning.
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

    def __post_init__(self) -> None:
        check_attention(self.attention)
        if type(self.n) is not int or not 1 <= self.n <= MAX_CHOICES:
            raise KeyeError(f"n is {self.n!r}; choose 1 to {MAX_CHOICES}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
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
    """More of choice `index`: text, and the tokens of it; `probs` if they were asked for."""

    index: int
    text: str
    tokens: tuple[int, ...] = ()
    probs: tuple[TokenProb, ...] = ()


@dataclass(frozen=True)
class Ended:
    """Choice `index` is complete: `reason` is "stop", "length", or "loop" for one that repeated itself. `met` is the
    string or the token that stopped it; `asked` says that it was one of the request's own, and no end-of-sequence
    token."""

    index: int
    reason: str
    met: str | int | None = None
    asked: bool = False

    @property
    def openai_reason(self) -> str:
        """The reason in the words of OpenAI's protocol, which has none for loops."""
        return "length" if self.reason == "loop" else self.reason


@dataclass(frozen=True)
class Finished:
    """The whole request is complete. `media` are the plans, `seconds` wall time by phase. `prompt_probs` has one entry
    for each token of the prompt but the first. `looped` tells that a choice was ended because it repeated itself,
    `notes` what of the request was not honoured."""

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


@dataclass(frozen=True)
class Failed:
    """The request ended with an error; nothing more comes."""

    error: BaseException


Event = Progress | Prefilled | Delta | Ended | Finished | Failed


class Stage(Enum):
    """Where a task stands. WAITING: not begun; PREPARING: its media are opened in a thread; READY: laid out, waits for
    room; PREFILLING: its prompt is being computed, media encoded; DECODING: it writes; ENDED: it holds nothing."""

    WAITING = "waiting"
    PREPARING = "preparing"
    READY = "ready"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    ENDED = "ended"


@dataclass(eq=False)
class Choice:
    """One continuation: `pending` tokens are not computed yet; the first of them sits at `position`. `thought` counts
    the tokens of reasoning so far while it is inside a block of reasoning."""

    index: int
    sampler: Sampler
    decoder: StreamDecoder
    stop: StopText
    guide: Guide | None
    cache: KVCache | None = None
    pending: list[int] = field(default_factory=list)
    position: int = 0
    reply: list[int] = field(default_factory=list)
    reason: str | None = None
    logits: Tensor | None = None
    thought: int | None = None


@dataclass(eq=False)
class Task:
    """A request on its way. `done` tokens of the prompt are in `cache`, of which `cached` were there before. `tell` is
    called with every event, in the thread that steps."""

    number: int
    request: Request
    tell: Callable[[Event], None]
    created: float
    stage: Stage = Stage.WAITING
    prompt: Prompt | None = None
    cache: KVCache | None = None
    vision: VisionJob | None = None
    visual: Tensor | None = None
    done: int = 0
    cached: int = 0
    choices: list[Choice] = field(default_factory=list)
    counts: Tensor | None = None
    counted: int = 0
    prompt_probs: list[TokenProb] = field(default_factory=list)
    notes: list[KeyeWarning] = field(default_factory=list)
    #: Those after the last token of the prompt, until the choices take them over.
    logits: Tensor | None = None
    #: What it and its choices had stored when it was preempted, and whose each of the sequences is.
    saved: SavedCaches | None = None
    holders: list[Task | Choice] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    aborted: bool = False
    #: Whether it made room for itself although nobody else was there, because its blocks lay scattered.
    retried: bool = False
    #: How many requests had ended when it found no room.
    waits_since: int | None = None
    #: Number of the pass that last computed something of it.
    turn: int = 0

    @property
    def live(self) -> list[Choice]:
        """Choices that still write."""
        return [choice for choice in self.choices if choice.reason is None]

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        assert self.prompt is not None
        return self.prompt.token_ids.shape[0]


class Inbox:
    """Events for one reader, in order. Filled in the engine's thread, read in any."""

    def __init__(self) -> None:
        self.events: deque[Event] = deque()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
