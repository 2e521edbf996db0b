"""Requests on an engine in tests: a reference without engine or caches, prompts, and what came of a request."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from keye import Frames, Keye
from keye.chat.messages import Medium, Message
from keye.engine.media import as_medium
from keye.engine.prompt import Prompt
from keye.engine.request import Delta, Event, Failed, Finished, GenerationRequest
from tests.support.reference import PlainSequence

WORDS = ("what", "red circle", "when is it visible", "how many", "blue", "the left square and the right one")
TEXT = [Message("user", ("what is red?",))]


class Inbox:
    """Events of one request, in order."""

    def __init__(self) -> None:
        self.events: deque[Event] = deque()

    def __call__(self, event: Event) -> None:
        self.events.append(event)


def lay_out(model: Keye, request: GenerationRequest) -> GenerationRequest:
    """The request with its prompt laid out and its media decoded."""
    return replace(request, prompt=model.runtime.prompts.lay_out(request.prompt))  # type: ignore[arg-type]


def generate_alone(model: Keye, messages: list[Message], max_tokens: int = 6) -> list[int]:
    """Greedy tokens of the reference."""
    prompt = lay_out(model, greedy(model, messages)).prompt
    assert isinstance(prompt, Prompt)
    return PlainSequence(model.model).prefill(prompt).greedy(max_tokens)


def clip(seed: int, frames: int = 8) -> Frames:
    """Noise, two frames a second."""
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, 56, 56, 3), dtype=np.uint8)
    return Frames(pixels, tuple(i / 2 for i in range(frames)))


def about(medium: object, question: str = "what is red?") -> list[Message]:
    return [Message("user", (as_medium(medium), question))]


def conversation(seed: int) -> list[Message]:
    """A question of some length, about a clip of some length or about nothing."""
    rng = random.Random(seed)
    question = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 30)))
    media = (Medium("video", clip(seed, rng.randint(2, 12))),) if seed % 3 else ()
    return [Message("user", (*media, question))]


def greedy(model: Keye, messages: list[Message], max_tokens: int = 6, **options: Any) -> GenerationRequest:
    """A request for exactly so many tokens."""
    return model.request(messages, max_tokens=max_tokens, ignore_eos=True, **options)


def add(model: Keye, request: GenerationRequest) -> Inbox:
    inbox = Inbox()
    model.core.add(request, inbox)
    return inbox


def step(model: Keye) -> bool:
    """One step, or a short wait; whether anything was computed."""
    computed = model.core.step()
    if not computed:
        model.core.wait_for_work()
    return computed


def run(model: Keye) -> None:
    """Steps until every request has ended."""
    while not model.core.is_idle():
        step(model)


def run_all(model: Keye, *requests: GenerationRequest) -> list[Inbox]:
    """Runs requests together."""
    inboxes = [add(model, request) for request in requests]
    run(model)
    return inboxes


def finish(inbox: Inbox) -> Finished:
    """The last event of a request that did not fail."""
    assert isinstance(inbox.events[-1], Finished), inbox.events[-1]
    return inbox.events[-1]


def tokens_of(inbox: Inbox) -> list[int]:
    """Tokens of the first choice of a complete request."""
    finish(inbox)
    return [
        token
        for event in inbox.events
        if isinstance(event, Delta) and event.choice_index == 0
        for token in event.tokens
    ]


def failure(inbox: Inbox) -> str:
    last = inbox.events[-1]
    assert isinstance(last, Failed)
    return str(last.error)


def is_clean(model: Keye) -> bool:
    """Whether nothing is reserved once the caches are cleared."""
    model.clear_caches()
    return model.runtime.ledger.accounts() == {}


def memory_for(model: Keye, slabs: int) -> int:
    """Bytes of so many slabs and of the smallest step."""
    return slabs * model.runtime.store.slab_bytes + model.core.scheduler.scratch.least


def write_clip(path: Path) -> Path:
    """A video of eight frames in four seconds."""
    from keye.data.frameforge import make_clip, write_mp4

    write_mp4(make_clip(3, frames=8, objects=2, start=0.0, step=0.5), path, (112, 112))
    return path


def run_together(model: Keye, requests: list[GenerationRequest]) -> tuple[list[list[int]], list[Finished]]:
    """Tokens of the first choice of requests that run at once, and how each finished."""
    inboxes = run_all(model, *requests)
    return [tokens_of(inbox) for inbox in inboxes], [finish(inbox) for inbox in inboxes]
