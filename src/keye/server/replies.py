"""The events of a job, gathered into choices: text, reasoning, calls of tools, probabilities, usage.

The same for every route that has a chat behind it; what a route's objects look like, it knows itself.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from keye.chat import Medium, ReplyPiece, ReplyStream, merge_intervals, parse_intervals, parse_regions
from keye.engine.evidence import Evidence
from keye.engine.request import Delta, Ended, Event, Finished, TokenProb
from keye.engine.request import Request as Job
from keye.errors import KeyeError
from keye.server.audit import CURRENT
from keye.server.context import Context
from keye.server.errors import ApiError
from keye.server.prepare import Prepared


async def events_of(context: Context, job: Job) -> AsyncGenerator[Event, None]:
    """The events of a job, counted in the metrics. Closing this at any time gives the job up."""
    watch = context.metrics.watch()
    try:
        async with aclosing(context.engine.run(job)) as events:
            async for event in events:
                watch.see(event)
                if isinstance(event, Finished) and (record := CURRENT.get()) is not None:
                    record.prompt_tokens += event.prompt_tokens
                    record.completion_tokens += event.completion_tokens
                yield event
    except (KeyeError, ApiError):
        watch.end("refused")
        raise
    except Exception:
        watch.end("failed")
        raise
    finally:
        watch.end("cancelled")


@dataclass
class Choice:
    """One reply while it grows. `calls` are the id, the name and the JSON text of the arguments of each call."""

    stream: ReplyStream
    text: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)
    probs: list[TokenProb] = field(default_factory=list)
    reasoning_tokens: int = 0
    reason: str | None = None

    @classmethod
    def of(cls, prepared: Prepared) -> Choice:
        return cls(ReplyStream(tools=prepared.tools, reasoning=prepared.reasoning))

    def add(self, delta: Delta) -> list[ReplyPiece]:
        """Takes a delta of the engine; returns the pieces that are certain now."""
        if self.stream.reasons:
            self.reasoning_tokens += len(delta.tokens)
        self.probs += delta.probs
        return self._keep(self.stream.push(delta.text))

    def end(self, ended: Ended) -> list[ReplyPiece]:
        """The reply is complete; returns what was held back."""
        pieces = self._keep(self.stream.finish())
        self.reason = "tool_calls" if self.calls and ended.reason == "stop" else ended.reason
        return pieces

    def _keep(self, pieces: list[ReplyPiece]) -> list[ReplyPiece]:
        for piece in pieces:
            if piece.kind == "content":
                self.text += piece.text
            elif piece.kind == "reasoning":
                self.reasoning += piece.text
            elif piece.kind == "call":
                self.calls.append([f"call_{secrets.token_hex(12)}", piece.text, ""])
            else:
                self.calls[piece.index][2] += piece.text
        return pieces


async def whole(context: Context, prepared: Prepared) -> tuple[list[Choice], Finished]:
    """All choices of a request, complete, and how it finished."""
    choices = [Choice.of(prepared) for _ in range(prepared.job.n)]
    finished: Finished | None = None
    async with aclosing(events_of(context, prepared.job)) as events:
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


def findings_of(finished: Finished, text: str, notes: Sequence[str], *, merged: bool = False) -> dict[str, Any]:
    """keye's own fields of an answer: what it marks, what it rests on, and what was not honoured."""
    intervals = parse_intervals(text) or []
    found: dict[str, Any] = {
        "intervals": [list(pair) for pair in (merge_intervals(intervals) if merged else intervals)],
        "regions": [region.to_dict() for region in parse_regions(text)],
        "seconds": dict(finished.seconds),
        "attention": finished.attention,
    }
    if finished.evidence is not None:
        found["evidence"] = _evidence_objects(finished.evidence, len(finished.media))
    if notes:
        found["notes"] = list(notes)
    return found


def _evidence_objects(evidence: Evidence, media: int) -> list[dict[str, Any]]:
    """One object for each medium; without any selection all of them give the reason."""
    if evidence.reason is not None:
        nothing: dict[str, Any] = {"times": [], "share": [], "lift": [], "top": [], "reason": evidence.reason}
        return [nothing] * media
    return [
        {
            "kind": one.kind, "name": one.name, "times": list(one.times), "share": list(one.shares),
            "lift": list(one.lifts), "top": one.top(), "share_of_media": one.share, "reason": None,
        }
        for one in evidence.media
    ]  # fmt: skip


def prob_object(prob: TokenProb, *, top: bool = True) -> dict[str, Any]:
    """A token's probability as chats have it."""
    data: dict[str, Any] = {"token": prob.text, "logprob": prob.logprob, "bytes": list(prob.raw)}
    if top:
        data["top_logprobs"] = [prob_object(other, top=False) for other in prob.top]
    return data


def head(prefix: str, kind: str, model: str) -> Mapping[str, Any]:
    """The fields that every object of a reply begins with."""
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}
