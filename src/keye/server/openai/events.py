"""The events of a job, gathered into choices: text, reasoning, calls of tools, probabilities, usage.

The same for every route that has a chat behind it; what a route's objects look like, it knows itself.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from keye.chat.grounding import parse_regions
from keye.chat.messages import Medium
from keye.chat.moments import keep_moments, keep_regions
from keye.chat.stream import ReplyPiece, ReplyStream
from keye.chat.times import merge_intervals, parse_intervals
from keye.engine.request import Delta, Ended, Event, Finished, Prefilled, Progress, TokenProb
from keye.engine.request import Request as Job
from keye.errors import KeyeError
from keye.server.context import Context
from keye.server.edge.audit import CURRENT
from keye.server.edge.errors import ApiError
from keye.server.edge.ids import new_id
from keye.server.errors import spelled
from keye.server.openai.prepare import Prepared, ShownReasoning
from keye.server.openai.sse import event
from keye.sessions.answer import LOOPED


async def events_of(context: Context, job: Job) -> AsyncGenerator[list[Event], None]:
    """The events of a job, those that are there together, counted in the metrics; an empty list says that nothing has
    come for as long as clients should wait without a word. Closing this at any time gives the job up."""
    watch = context.metrics.watch()
    try:
        running = context.engine.submit(job)
        try:
            while (events := await running.some(context.settings.keep_alive_seconds)) is not None:
                for event in events:
                    watch.see(event)
                    if isinstance(event, Finished) and (record := CURRENT.get()) is not None:
                        record.prompt_tokens += event.prompt_tokens
                        record.completion_tokens += event.completion_tokens
                yield events
        finally:
            running.abort()
    except (KeyeError, ApiError):
        watch.end("refused")
        raise
    except Exception:
        watch.end("failed")
        raise
    finally:
        watch.end("cancelled")


async def each(context: Context, job: Job) -> AsyncGenerator[Event, None]:
    """The events of a job one by one."""
    async with aclosing(events_of(context, job)) as batches:
        async for batch in batches:
            for event in batch:
                yield event


async def written(context: Context, job: Job, told: Callable[[Event], Iterable[bytes]]) -> AsyncGenerator[bytes, None]:
    """What `told` makes of the events of a job: those that are there together as one piece, an empty one where clients
    should hear that the job lives."""
    async with aclosing(events_of(context, job)) as batches:
        async for batch in batches:
            piece = b"".join(chain.from_iterable(map(told, batch)))
            if piece or not batch:
                yield piece


@dataclass
class Choice:
    """One reply while it grows. `calls` are the id, the name and the JSON text of the arguments of each call; `ended`
    says why and by what the reply came to its end, `reason` the same as OpenAI does."""

    stream: ReplyStream
    shown: ShownReasoning = "apart"
    echo: str = ""
    text: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)
    probs: list[TokenProb] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    reasoning_tokens: int = 0
    reason: str | None = None
    ended: Ended | None = None
    _thinks: bool = False

    @classmethod
    def of(cls, prepared: Prepared) -> Choice:
        stream = ReplyStream(tools=prepared.tools, reasoning=prepared.reasoning, continues=prepared.continues)
        return cls(stream, prepared.shown, prepared.echo)

    def add(self, delta: Delta) -> list[ReplyPiece]:
        """Takes a delta of the engine; returns the pieces that are certain now."""
        if self.stream.reasons:
            self.reasoning_tokens += len(delta.tokens)
        self.probs += delta.probs
        self.tokens += delta.tokens
        return self._keep(self.stream.push(delta.text))

    def end(self, ended: Ended) -> list[ReplyPiece]:
        """The reply is complete; returns what was held back."""
        pieces = self._keep(self.stream.finish())
        self.reason, self.ended = "tool_calls" if self.calls and ended.reason == "stop" else ended.openai_reason, ended
        return pieces

    def _keep(self, pieces: list[ReplyPiece]) -> list[ReplyPiece]:
        pieces = [*self._repeated(), *(shown for piece in pieces for shown in self._shown(piece))]
        for piece in pieces:
            if piece.kind == "content":
                self.text += piece.text
            elif piece.kind == "reasoning":
                self.reasoning += piece.text
            elif piece.kind == "call":
                self.calls.append([new_id("call_"), piece.text, ""])
            else:
                self.calls[piece.index][2] += piece.text
        return pieces

    def _repeated(self) -> Iterator[ReplyPiece]:
        """The text that the reply goes on with, once."""
        if self.echo:
            yield ReplyPiece("content", self.echo)
        self.echo = ""

    def _shown(self, piece: ReplyPiece) -> Iterator[ReplyPiece]:
        """What clients see of a piece: reasoning may stand in the answer, between its marks, or nowhere."""
        if self.shown == "apart" or (piece.kind != "reasoning" and not self._thinks):
            yield piece
        elif self.shown == "nowhere":
            return
        elif piece.kind == "reasoning":
            yield ReplyPiece("content", piece.text if self._thinks else f"<think>\n{piece.text}")
            self._thinks = True
        else:
            self._thinks = False
            yield ReplyPiece("content", "\n</think>\n\n")
            yield piece


async def whole(context: Context, prepared: Prepared) -> tuple[list[Choice], Finished]:
    """All choices of a request, complete, and how it finished."""
    choices = [Choice.of(prepared) for _ in range(prepared.job.n)]
    finished: Finished | None = None
    async with aclosing(each(context, prepared.job)) as events:
        async for one in events:
            if isinstance(one, Delta):
                choices[one.index].add(one)
            elif isinstance(one, Ended):
                choices[one.index].end(one)
            elif isinstance(one, Finished):
                finished = one
    assert finished is not None
    return choices, finished


def usage_of(finished: Finished, choices: Sequence[Choice], prepared: Prepared) -> dict[str, Any]:
    """Usage as OpenAI has it, and of each medium its plan and the settings that it came with."""
    asked = [segment.value.options for segment in prepared.prompt if isinstance(segment.value, Medium)]
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens, "media_tokens": finished.media_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)},
        "media": [{**plan, "options": dict(own)} for plan, own in zip(finished.media, asked, strict=True)],
    }


class RunningUsage:
    """Counts tokens while a reply grows, for chunks that each tell how many there are, and keeps the engine's notes."""

    def __init__(self, told: bool) -> None:
        self._told, self._prompt, self._reply = told, 0, 0
        self.notes: list[str] = []

    def see(self, event: Event) -> None:
        """Takes an event of the engine."""
        if isinstance(event, Prefilled):
            self._prompt += event.prompt_tokens
            self.notes += [warning.worded(spelled) for warning in event.notes]
        elif isinstance(event, Delta):
            self._reply += len(event.tokens)
        elif isinstance(event, Ended) and event.reason == "loop" and str(LOOPED) not in self.notes:
            self.notes.append(str(LOOPED))

    def fields(self) -> dict[str, Any]:
        """The usage so far as a field of a chunk; nothing where it is not wanted."""
        if not self._told:
            return {}
        total = self._prompt + self._reply
        usage = {"prompt_tokens": self._prompt, "completion_tokens": self._reply, "total_tokens": total}
        return {"usage": usage}


def notes_of(finished: Finished) -> list[str]:
    """What the engine tolerated or did not honour, as clients read it."""
    looped = (LOOPED,) if finished.looped else ()
    return [warning.worded(spelled) for warning in (*finished.prompt.notes, *finished.notes, *looped)]


def findings_of(finished: Finished, text: str, notes: Sequence[str], *, merged: bool = False) -> dict[str, Any]:
    """keye's own fields of an answer: what it marks, what it rests on, and what was not honoured."""
    windows = finished.prompt.windows
    intervals, noted = keep_moments(parse_intervals(text) or [], windows)
    found: dict[str, Any] = {
        "intervals": [list(pair) for pair in (merge_intervals(intervals) if merged else intervals)],
        "regions": [region.to_dict() for region in keep_regions(parse_regions(text), windows)],
        "seconds": dict(finished.seconds),
        "attention": finished.attention,
    }
    if finished.evidence is not None:
        found["evidence"] = finished.evidence.to_dict()
    if listed := list(dict.fromkeys((*notes, *notes_of(finished), *(warning.worded(spelled) for warning in noted)))):
        found["notes"] = listed
    return found


def prob_object(prob: TokenProb, *, top: bool = True) -> dict[str, Any]:
    """A token's probability as chats have it."""
    data: dict[str, Any] = {"token": prob.text, "logprob": prob.logprob, "bytes": list(prob.raw)}
    if top:
        data["top_logprobs"] = [prob_object(other, top=False) for other in prob.top]
    return data


def stop_of(ended: Ended | None) -> dict[str, Any]:
    """What ended a reply, in the fields of vLLM (the request's own stops) and of SGLang (those of the model, too)."""
    if ended is None:
        return {"stop_reason": None, "matched_stop": None}
    return {"stop_reason": ended.met if ended.asked else None, "matched_stop": ended.met}


def prompt_probs_of(probs: Sequence[TokenProb] | None) -> list[dict[str, Any] | None] | None:
    """Probabilities of a prompt's tokens as vLLM has them, by token id; none of the first token, which follows none."""
    if probs is None:
        return None
    return [None, *({str(one.token): _ranked(one) for one in (*prob.top, prob)} for prob in probs)]


def _ranked(prob: TokenProb) -> dict[str, Any]:
    return {"logprob": prob.logprob, "rank": prob.rank, "decoded_token": prob.text}


def progress_of(step: Progress) -> dict[str, Any]:
    """How far a request has come before it writes, in keye's own field."""
    return {"progress": {"phase": step.phase, "done": step.done, "total": step.total}}


def growing(
    choice: Choice, begin: Mapping[str, Any], finish: Callable[[Finished], Mapping[str, Any]]
) -> Callable[[Event], Iterator[bytes]]:
    """What keye's own streams tell of a reply: how far the request has come, more of the reasoning and of the text, at
    last the whole that the same request has without a stream."""

    def told(one: Event) -> Iterator[bytes]:
        if isinstance(one, Progress):
            yield event({**begin, "keye": progress_of(one)})
        elif isinstance(one, Delta | Ended):
            for piece in choice.add(one) if isinstance(one, Delta) else choice.end(one):
                if piece.kind in ("content", "reasoning"):
                    name = "content" if piece.kind == "content" else "reasoning_content"
                    yield event({**begin, "delta": {name: piece.text}})
        elif isinstance(one, Finished):
            yield event(finish(one))

    return told


def head(prefix: str, kind: str, context: Context) -> Mapping[str, Any]:
    """The fields that every object of a reply begins with."""
    return {
        "id": new_id(f"{prefix}-"), "object": kind, "created": int(time.time()), "model": context.name,
        "system_fingerprint": context.fingerprint,
    }  # fmt: skip
