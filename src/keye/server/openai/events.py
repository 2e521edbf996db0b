"""From the engine's events to replies: text, reasoning, tool calls, probabilities, usage. The same for every route; a
route knows what its own objects look like."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

from fastapi import Request

from keye.chat.messages import Medium
from keye.chat.replies import keep_moments, keep_regions, parse_regions
from keye.chat.stream import ReplyPiece, ReplyStream
from keye.chat.times import merge_intervals, parse_intervals
from keye.engine.request import Delta, Ended, Event, Finished, GenerationRequest, Prefilled, Progress, TokenProb
from keye.errors import KeyeError
from keye.models.adapters import Adapter
from keye.moments import FindNote
from keye.server.context import Context, context_of
from keye.server.edge.audit import CURRENT, new_id
from keye.server.edge.errors import ApiError
from keye.server.errors import spelled
from keye.server.metrics import RequestWatch
from keye.server.openai.http import cancel_on_disconnect
from keye.server.openai.http import event as sse
from keye.server.openai.prepare import PreparedChat, ReasoningPlace
from keye.sessions.answer import LOOPED
from keye.sessions.coverage import coverage_of, moments_of

Encode = Callable[[Event], Iterable[bytes]]


async def _event_batches(context: Context, request: GenerationRequest) -> AsyncGenerator[list[Event], None]:
    """The events of a request as they come, counted in the metrics; an empty list where a keep-alive is due. Closing
    this aborts the request."""
    watch = RequestWatch(context.metrics)
    try:
        running = context.engine.submit(request)
        try:
            while (events := await running.next_events(context.settings.keep_alive_seconds)) is not None:
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


async def encode_events(context: Context, *requests: tuple[GenerationRequest, Encode]) -> AsyncGenerator[bytes, None]:
    """The events of requests, one request after another, each as its function encodes them; empty where a keep-alive is
    due. Closing this aborts the request that runs."""
    for request, encode in requests:
        async with aclosing(_event_batches(context, request)) as batches:
            async for batch in batches:
                piece = b"".join(chain.from_iterable(map(encode, batch)))
                if piece or not batch:
                    yield piece


async def collect(
    context: Context,
    request: GenerationRequest,
    replies: Sequence[ChatReply | Continuation],
    on_event: Callable[[Event], object] = lambda _: None,
) -> Finished:
    """Runs a request to its end, one of `replies` for each choice."""
    finished: Finished | None = None
    async with aclosing(_event_batches(context, request)) as batches:
        async for event in (event async for batch in batches for event in batch):
            on_event(event)
            if isinstance(event, Delta | Ended):
                replies[event.choice_index].take(event)
            elif isinstance(event, Finished):
                finished = event
    assert finished is not None
    return finished


@dataclass
class Continuation:
    """A reply without a chat around it, as it grows."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    probs: list[TokenProb] = field(default_factory=list)
    ended: Ended | None = None

    def take(self, event: Delta | Ended) -> None:
        if isinstance(event, Ended):
            self.ended = event
            return
        self.text += event.text
        self.tokens += event.tokens
        self.probs += event.probs


@dataclass
class ChatReply:
    """A reply of a chat as it grows. `calls` are the id, the name and the JSON text of the arguments of each tool call;
    `ended` says how the reply ended, `reason` the same in OpenAI's words."""

    stream: ReplyStream
    place: ReasoningPlace = "apart"
    echo: str = ""
    text: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)
    probs: list[TokenProb] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    reasoning_tokens: int = 0
    reason: str | None = None
    ended: Ended | None = None
    _in_reasoning: bool = False

    @classmethod
    def of(cls, chat: PreparedChat) -> ChatReply:
        stream = ReplyStream(tools=chat.tools, reasoning=chat.request.reasoning, continues=chat.continues)
        return cls(stream, chat.reasoning_place, chat.echo)

    def take(self, event: Delta | Ended) -> list[ReplyPiece]:
        """Takes an event of the engine; returns the pieces that are certain now."""
        if isinstance(event, Delta):
            self.reasoning_tokens += len(event.tokens) if self.stream.reasons else 0
            self.probs += event.probs
            self.tokens += event.tokens
        pieces = self.stream.push(event.text) if isinstance(event, Delta) else self.stream.finish()
        if self.place != "apart":
            pieces = [placed for piece in pieces for placed in self._place_reasoning(piece)]
        if self.echo:
            pieces, self.echo = [ReplyPiece("content", self.echo), *pieces], ""
        for piece in pieces:
            if piece.kind == "content":
                self.text += piece.text
            elif piece.kind == "reasoning":
                self.reasoning += piece.text
            elif piece.kind == "call":
                self.calls.append([new_id("call_"), piece.text, ""])
            else:
                self.calls[piece.index][2] += piece.text
        if isinstance(event, Ended):
            self.ended = event
            self.reason = "tool_calls" if self.calls and event.reason == "stop" else event.openai_reason
        return pieces

    def _place_reasoning(self, piece: ReplyPiece) -> Iterator[ReplyPiece]:
        """Reasoning that is not apart: in the answer between its marks, or nowhere."""
        if piece.kind == "reasoning":
            if self.place == "inside":
                yield ReplyPiece("content", piece.text if self._in_reasoning else f"<think>\n{piece.text}")
                self._in_reasoning = True
            return
        if self._in_reasoning:
            self._in_reasoning = False
            yield ReplyPiece("content", "\n</think>\n\n")
        yield piece


async def collect_chat(request: Request, chat: PreparedChat) -> tuple[list[ChatReply], Finished]:
    """All replies of a chat, complete, and how it finished. Cancelled when the client disconnects."""
    replies = [ChatReply.of(chat) for _ in range(chat.request.n)]
    return replies, await cancel_on_disconnect(request, collect(context_of(request), chat.request, replies))


def usage_of(finished: Finished, replies: Sequence[ChatReply], chat: PreparedChat) -> dict[str, Any]:
    """Usage as OpenAI has it, and of each medium its plan and the options that it came with."""
    options = [segment.value.options for segment in chat.prompt if isinstance(segment.value, Medium)]
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens, "media_tokens": finished.media_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(reply.reasoning_tokens for reply in replies)},
        "media": [{**plan, "options": dict(own)} for plan, own in zip(finished.media, options, strict=True)],
    }


class RunningUsage:
    """Counts tokens while a reply grows, for chunks with usage if `in_chunks`, and collects the engine's notes."""

    def __init__(self, in_chunks: bool) -> None:
        self._in_chunks, self._prompt, self._reply = in_chunks, 0, 0
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
        """The usage so far as a field of a chunk; nothing unless `in_chunks`."""
        if not self._in_chunks:
            return {}
        total = self._prompt + self._reply
        usage = {"prompt_tokens": self._prompt, "completion_tokens": self._reply, "total_tokens": total}
        return {"usage": usage}


def notes_of(finished: Finished) -> list[str]:
    """What the engine tolerated or did not honour, as sentences."""
    looped = (LOOPED,) if finished.looped else ()
    return [warning.worded(spelled) for warning in (*finished.prompt.notes, *finished.notes, *looped)]


def keye_fields(finished: Finished, text: str, chat: PreparedChat, *, merged: bool = False) -> dict[str, Any]:
    """keye's own fields of an answer: what it marks, what it rests on, and what was not honoured."""
    windows = finished.prompt.windows
    intervals, warnings = keep_moments(parse_intervals(text) or [], windows)
    intervals = merge_intervals(intervals) if merged else intervals
    coverage = coverage_of(finished.media, finished.prompt_tokens - finished.media_tokens)
    fields: dict[str, Any] = {
        "intervals": [list(pair) for pair in intervals],
        "moments": [moment.to_dict() for moment in moments_of(intervals)],
        "coverage": None if coverage is None else coverage.to_dict(),
        "regions": [region.to_dict() for region in keep_regions(parse_regions(text), windows)],
        "seconds": dict(finished.seconds),
        "attention": finished.attention,
    }
    if finished.evidence is not None:
        fields["evidence"] = finished.evidence.to_dict()
    outside = [warning.worded(spelled) for warning in warnings]
    if all_notes := dict.fromkeys((*chat.notes, *notes_of(finished), *outside)):
        fields["notes"] = list(all_notes)
    codes = dict.fromkeys(all_notes, ("note", "request")) | dict.fromkeys(outside, ("outside_time", "moment"))
    codes |= {str(LOOPED): ("loop", "reply")}
    coded = [FindNote(codes[note][0], note, codes[note][1]) for note in all_notes]
    fields["coded_notes"] = [asdict(note) for note in (*coded, *chat.scope_notes(finished))]
    return fields


def prob_object(prob: TokenProb, *, top: bool = True) -> dict[str, Any]:
    """A token's probability in the form of chats."""
    data: dict[str, Any] = {"token": prob.text, "logprob": prob.logprob, "bytes": list(prob.raw)}
    if top:
        data["top_logprobs"] = [prob_object(other, top=False) for other in prob.top]
    return data


def stop_fields(ended: Ended | None) -> dict[str, Any]:
    """What ended a reply, in the fields of vLLM (the request's own stops) and of SGLang (those of the model, too)."""
    if ended is None:
        return {"stop_reason": None, "matched_stop": None}
    return {"stop_reason": ended.met if ended.is_requested else None, "matched_stop": ended.met}


def prompt_prob_objects(probs: Sequence[TokenProb] | None) -> list[dict[str, Any] | None] | None:
    """Probabilities of a prompt's tokens as vLLM has them, by token id; None for the first token."""
    if probs is None:
        return None
    objects: list[dict[str, Any] | None] = [None]
    for prob in probs:
        tokens = (*prob.top, prob)
        objects.append({str(t.token): {"logprob": t.logprob, "rank": t.rank, "decoded_token": t.text} for t in tokens})
    return objects


def progress_fields(step: Progress) -> dict[str, Any]:
    """How far a request has come before its first token, in keye's own field."""
    return {"progress": {"phase": step.phase, "done": step.done, "total": step.total}}


def keye_encoder(reply: ChatReply, begin: Mapping[str, Any], finish: Callable[[Finished], Mapping[str, Any]]) -> Encode:
    """Encodes the events of keye's own streams: progress, pieces of reasoning and text, at last the complete answer,
    made by `finish`. `begin` are fields of all events but the last."""

    def encode(event: Event) -> Iterator[bytes]:
        if isinstance(event, Progress):
            yield sse({**begin, "keye": progress_fields(event)})
        elif isinstance(event, Delta | Ended):
            for piece in reply.take(event):
                if piece.kind in ("content", "reasoning"):
                    name = "content" if piece.kind == "content" else "reasoning_content"
                    yield sse({**begin, "delta": {name: piece.text}})
        elif isinstance(event, Finished):
            yield sse(finish(event))

    return encode


def reply_head(prefix: str, kind: str, context: Context, adapter: Adapter | None) -> Mapping[str, Any]:
    """The fields that every object of a reply begins with."""
    return {
        "id": new_id(f"{prefix}-"), "object": kind, "created": int(time.time()), "model": context.name_of(adapter),
        "system_fingerprint": context.fingerprint,
    }  # fmt: skip


class Telemetry:
    """Follows the events of one request; `timings` and `progress` say which fields are wanted."""

    def __init__(self, timings: bool | None, progress: bool | None) -> None:
        self._timings, self._progress = bool(timings), bool(progress)
        self._begin = time.perf_counter()
        self._prefilled = self._begin
        self._prompt, self._cached, self._reply, self._reported = 0, 0, 0, False

    def see(self, event: Event) -> None:
        """Takes an event of the engine."""
        if isinstance(event, Progress) and event.phase == "prefill":
            self._cached = event.cached
        elif isinstance(event, Prefilled):
            self._prompt, self._prefilled = event.prompt_tokens, time.perf_counter()
        elif isinstance(event, Delta):
            self._reply += len(event.tokens)

    def timings(self) -> dict[str, Any]:
        """The speed so far as a field of a chunk; nothing where it is not wanted, or no token has come."""
        if not self._timings or not self._reply:
            return {}
        computed = self._prompt - self._cached
        timings = {
            "cache_n": self._cached,
            **_speed("prompt", computed, self._prefilled - self._begin),
            **_speed("predicted", self._reply, time.perf_counter() - self._prefilled),
        }
        return {"timings": timings}

    def progress(self, event: Progress) -> Iterator[dict[str, Any]]:
        """What a step of the prompt adds to a stream: before the first, what was computed before."""
        if not self._progress or event.phase != "prefill":
            return
        processed = [event.done] if self._reported else [event.cached, event.done]
        self._reported = True
        milliseconds = round(1000 * (time.perf_counter() - self._begin))
        for done in processed:
            step = {"total": event.total, "cache": event.cached, "processed": done, "time_ms": milliseconds}
            yield {"prompt_progress": step}


def _speed(name: str, tokens: int, seconds: float) -> dict[str, float]:
    milliseconds, count = 1000 * max(seconds, 1e-6), max(tokens, 1)
    return {
        f"{name}_n": tokens,
        f"{name}_ms": round(milliseconds, 3),
        f"{name}_per_token_ms": round(milliseconds / count, 3),
        f"{name}_per_second": round(1000 * count / milliseconds, 3),
    }
