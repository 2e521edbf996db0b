"""What the routes ask of the engine, and what comes back while it works: plain data, the same for every route."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from keye.chat import Segment
from keye.engine.guide import Guide
from keye.engine.sampling import SamplingParams
from keye.models.attention import AttentionMode


@dataclass(frozen=True)
class Job:
    """One request: a rendered prompt and how to continue it, `n` times.

    `logprobs` is the number of alternatives wanted beside each token, None for no probabilities at all. `salt` keeps
    what is cached for one owner from all others. `skip_special` leaves control tokens out of the text.
    """

    prompt: Sequence[Segment]
    params: SamplingParams
    n: int = 1
    logprobs: int | None = None
    ignore_eos: bool = False
    skip_special: bool = True
    guide: Guide | None = None
    attention: AttentionMode | None = None
    evidence: bool = False
    salt: bytes = b""
    seconds: float | None = None


@dataclass(frozen=True)
class Progress:
    """How far a request has come before its first token."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class TokenProb:
    """A token that was drawn or could have been, with its natural log-probability."""

    text: str
    raw: bytes
    logprob: float
    top: tuple[TokenProb, ...] = ()


@dataclass(frozen=True)
class Delta:
    """More of choice `index`: text, and its tokens if probabilities were asked for. `tokens` counts them."""

    index: int
    text: str
    tokens: int = 1
    probs: tuple[TokenProb, ...] = ()


@dataclass(frozen=True)
class Ended:
    """Choice `index` is complete: `reason` is "stop" or "length"."""

    index: int
    reason: str


@dataclass(frozen=True)
class Finished:
    """The whole request is complete. `media` are the plans, `seconds` wall time by phase."""

    prompt_tokens: int
    media_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    media: tuple[Mapping[str, Any], ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    attention: str = "sparse"
    evidence: tuple[Mapping[str, Any], ...] | None = None


Event = Progress | Delta | Ended | Finished


class Engine(Protocol):
    """What the server needs of an engine."""

    def run(self, job: Job) -> AsyncGenerator[Event, None]:
        """Works on a job. Closing the generator at any stage gives up the job and frees all it held."""

    def start(self) -> None: ...

    async def drain(self, seconds: float) -> None:
        """Refuses new jobs and waits for the running ones, but not for longer than this."""

    def close(self) -> None: ...

    def gauges(self) -> Mapping[str, float]:
        """Numbers for /metrics, by name."""
