"""A finished reply, and how it is put together from the engine's events."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from keye.chat.messages import ToolCall
from keye.chat.replies import Region, is_malformed, keep_moments, keep_regions, parse_reply
from keye.config.model import Scope
from keye.engine.engine import Engine
from keye.engine.prompt import Prompt
from keye.engine.request import Delta, Ended, Event, Failed, Finished, GenerationRequest, Progress, TokenProb
from keye.errors import KeyeWarning, ScopeWarning, warn
from keye.sessions.scope import length_notes

if TYPE_CHECKING:
    from keye.engine.evidence import Evidence

#: The note on a reply that was ended because it repeated itself.
LOOPED = KeyeWarning("the reply repeated itself and was stopped; ask in another way, or set a repetition_penalty")
#: The note on a reply that cannot be an answer.
MALFORMED = KeyeWarning("the reply is malformed, as of a question or a video that the model does not know; do not rely "
                        "on it")  # fmt: skip


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: `media_tokens` of the `prompt_tokens` are visual, `cached_tokens` were computed before."""

    prompt_tokens: int
    media_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """A finished reply.

    `intervals` are the (start, end) seconds written in the answer, `regions` the points, boxes, outlines and clips that
    it marks, `tool_calls` the functions that the model wants called. `plan` says for each medium what was sampled and
    what it cost. `attention` is "sparse" or "dense"; dense above the model's top-k is another function than the model
    was trained for. `finish_reason` is "stop", "length", or "loop" for a reply that was ended because it repeated
    itself; `seconds` is wall time by phase. `notes` are sentences on what was not honoured, tolerated or left out, in
    the media, the settings and the reply: intervals outside what was sampled are not among `intervals`.
    Where they were asked for: `evidence` says which frames the answer rests on, `logprobs` has the probability of each
    token of the reply, `prompt_logprobs` of each of the prompt but the first, `alternatives` are the other choices.
    """

    text: str
    reasoning: str | None
    intervals: tuple[tuple[float, float], ...]
    usage: Usage
    plan: tuple[Mapping[str, Any], ...]
    model: str
    attention: str
    finish_reason: str
    seconds: Mapping[str, float]
    regions: tuple[Region, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    evidence: Evidence | None = None
    logprobs: tuple[TokenProb, ...] | None = None
    prompt_logprobs: tuple[TokenProb, ...] | None = None
    alternatives: tuple[Answer, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, text: str, prompt: Prompt, usage: Usage, *, scope: Scope | None = None, is_grounding: bool = False,
        **fields: Any,
    ) -> Answer:  # fmt: skip
        """The answer with `text` taken apart. Warns of times in it that are no moments, of a loop, of a reply that is
        malformed (where it `is_grounding`, also of one that lists no times), and of a video beyond `scope`."""
        reply = parse_reply(text)
        intervals, noted = keep_moments(reply.intervals, prompt.windows)
        if fields.get("finish_reason") == "loop":
            noted.append(LOOPED)
        elif is_malformed(reply.text, is_list=is_grounding) and fields.get("finish_reason") != "length":
            noted.append(MALFORMED)
        noted += [ScopeWarning("{}", note.text) for note in length_notes(scope, prompt.plans)]
        for warning in noted:
            warn(warning, stacklevel=2)
        notes = dict.fromkeys(map(str, (*fields.pop("notes", ()), *prompt.notes, *noted)))
        return cls(
            text=reply.text, reasoning=reply.reasoning, intervals=tuple(intervals),
            regions=tuple(keep_regions(reply.regions, prompt.windows)), tool_calls=reply.tool_calls, usage=usage,
            plan=prompt.plans, notes=tuple(notes), **fields,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: every field, those that have to be asked for only where they were."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        optional = {
            "evidence": None if self.evidence is None else self.evidence.to_dict(),
            "logprobs": _plain_probs(fields.pop("logprobs")),
            "prompt_logprobs": _plain_probs(fields.pop("prompt_logprobs")),
            "alternatives": [answer.to_dict() for answer in fields.pop("alternatives")] or None,
        }
        del fields["evidence"]
        return {
            **fields, "usage": asdict(self.usage), "seconds": dict(self.seconds),
            "intervals": [list(pair) for pair in self.intervals], "plan": list(self.plan),
            "regions": [region.to_dict() for region in self.regions], "notes": list(self.notes),
            "tool_calls": [call.to_dict() for call in self.tool_calls],
            **{name: value for name, value in optional.items() if value is not None},
        }  # fmt: skip


def _plain_probs(probs: tuple[TokenProb, ...] | None) -> list[dict[str, Any]] | None:
    if probs is None:
        return None
    return [
        {"token": prob.token, "text": prob.text, "logprob": round(prob.logprob, 6),
         "top": [{"token": o.token, "text": o.text, "logprob": round(o.logprob, 6)} for o in prob.top]}
        for prob in probs
    ]  # fmt: skip


class AnswerStream(Iterator[str]):
    """Iterates over the text as it is generated; `answer` is there once the iteration has ended. Closing it, or letting
    it go, gives the request up."""

    def __init__(self, pieces: Generator[str | Answer]) -> None:
        self._pieces = pieces
        self.answer: Answer | None = None

    def __next__(self) -> str:
        piece = next(self._pieces)
        if isinstance(piece, Answer):  # always the last
            self.answer = piece
            raise StopIteration
        return piece

    def finish(self) -> Answer:
        """Runs to the end and returns the answer."""
        for _ in self:
            pass
        assert self.answer is not None
        return self.answer

    def close(self) -> None:
        """Ends the iteration now."""
        self._pieces.close()


def stream_answer(
    engine: Engine, request: GenerationRequest, on_progress: Callable[[Progress], None] | None = None, *,
    is_grounding: bool = False,
) -> AnswerStream:  # fmt: skip
    """Computes one request, step by step as its answer is read; aborts it when the reader closes the stream. One that
    `is_grounding` asks for a list of times."""

    def pieces() -> Generator[str | Answer]:
        scope = engine.runtime.generation_config.scope
        collector = Collector(request, engine.runtime.name, on_progress, scope=scope, is_grounding=is_grounding)
        with closing(engine.run([request])) as events:
            for _, event in events:
                if text := collector.take(event):
                    yield text
        assert collector.answer is not None
        yield collector.answer

    return AnswerStream(pieces())


class Collector:
    """Puts an `Answer` together from the events of one request; `answer` is there after the last one."""

    def __init__(
        self, request: GenerationRequest, model: str, on_progress: Callable[[Progress], None] | None = None, *,
        scope: Scope | None = None, is_grounding: bool = False,
    ) -> None:  # fmt: skip
        self._scope, self._is_grounding = scope, is_grounding
        self._model, self._notes, self._on_progress = model, request.notes, on_progress
        self._texts: list[list[str]] = [[] for _ in range(request.n)]
        self._probs: list[list[TokenProb]] = [[] for _ in range(request.n)]
        self._reasons = ["stop"] * request.n
        self.answer: Answer | None = None

    def take(self, event: Event) -> str:
        """More of the first choice's text, if the event has any; raises what made the request fail."""
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Delta):
            self._texts[event.choice_index].append(event.text)
            self._probs[event.choice_index] += event.probs
            return event.text if event.choice_index == 0 else ""
        if isinstance(event, Progress) and self._on_progress is not None:
            self._on_progress(event)
        if isinstance(event, Ended):
            self._reasons[event.choice_index] = event.reason
        elif isinstance(event, Finished):
            usage = Usage(event.prompt_tokens, event.media_tokens, event.completion_tokens, event.cached_tokens)
            first, *others = (
                Answer.of(
                    "".join(text), event.prompt, usage, model=self._model, attention=event.attention,
                    finish_reason=reason, seconds=event.seconds, evidence=event.evidence,
                    logprobs=tuple(probs) or None, notes=(*self._notes, *event.notes), scope=self._scope,
                    is_grounding=self._is_grounding,
                )
                for text, reason, probs in zip(self._texts, self._reasons, self._probs, strict=True)
            )  # fmt: skip
            self.answer = replace(first, alternatives=tuple(others), prompt_logprobs=event.prompt_probs)
        return ""
