"""Prefill and decode of one sequence: token ids in, token ids out. Knows nothing of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise

import torch
from torch import Tensor

from keye.cache.sequence import KVCache
from keye.cache.slabs import KVStore
from keye.cache.vision import VisionCache
from keye.engine.prompt import Prompt
from keye.engine.request import Progress
from keye.engine.sampling import Sampler, SamplingParams
from keye.engine.turns import Turn
from keye.engine.vision import VisionJob
from keye.errors import KeyeWarning
from keye.models.attention import AttentionMode, CachedStep, Selection, Span
from keye.models.keye import KeyeModel, visual_mask

#: Prompt tokens that pass through the decoder at once.
PREFILL_CHUNK = 1024


class Decoding:
    """One sequence being continued: its cache, its position and the logits of its next token. Keys and values go to
    `cache`, or to a new one in `store`, or to one of its own.

    With `room` for so many tokens, `counts` int64 [layers, room] counts which keys were selected in the steps that
    produced a token of the reply, and `counted` those steps that had more than k tokens before them (`evidence`).
    """

    def __init__(
        self,
        model: KeyeModel,
        *,
        mode: AttentionMode = "sparse",
        select: Selection = "indexer",
        cache: KVCache | None = None,
        store: KVStore | None = None,
        room: int = 0,
    ) -> None:
        self.model, self.mode, self.select = model, mode, select
        text = model.config.text
        self.cache = KVCache(text.num_hidden_layers, store) if cache is None else cache
        sparse = room > 0 and mode == "sparse" and text.sparse is not None
        self.counts: Tensor | None = None
        if sparse:
            self.counts = torch.zeros(text.num_hidden_layers, room, dtype=torch.int64, device=model.device)
        self.counted = 0
        self.position = 0
        self.logits = torch.empty(0)
        #: What was tolerated of media when their frames were read.
        self.notes: list[KeyeWarning] = []

    @torch.inference_mode()
    def prefill(
        self,
        prompt: Prompt,
        *,
        vision: VisionCache | None = None,
        turn: Turn = nullcontext,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """Computes the prompt in chunks, what is in its past excepted, the media as they are decoded; afterwards
        `logits` are those of the first token of the reply. `vision` has and keeps visual tokens of media with a key.
        `turn` is entered for each piece of work on the model, `on_progress` called after each chunk. `OutOfMemory`,
        before any work, where the prompt has no room in the store."""
        done = 0
        if prompt.past is not None:
            self.cache, done = prompt.past.fork(), prompt.past.length(0)
        if self.cache.store is not None:
            self.cache.reserve(prompt.token_ids.shape[0])
        device, ids = self.model.device, prompt.token_ids
        is_visual = prompt.is_visual
        hidden, seen = torch.empty(0), 0
        job = VisionJob(self.model, prompt.media, cache=vision)
        try:
            # The step that produces the first token of the reply is that of the last token of the prompt: if selections
            # are counted, it goes alone.
            ends = {*range(done + PREFILL_CHUNK, ids.shape[0], PREFILL_CHUNK), ids.shape[0]}
            if self.counts is not None and ids.shape[0] > done + 1:
                ends.add(ids.shape[0] - 1)
            for start, end in pairwise([done, *sorted(ends)]):
                part = slice(start, end)
                needed = seen + int(is_visual[part].sum())
                job.run_until(needed, turn)
                with turn():
                    x = self.model.embed(ids[part].to(device), job.tokens(seen, needed))
                    job.forget(needed)
                    seen = needed
                    hidden = self._forward(x, prompt.position_ids[:, part].to(device), replies=end == ids.shape[0])
                if on_progress is not None:
                    on_progress(Progress("prefill", end, ids.shape[0]))
            job.add_notes(self.notes)
        finally:
            job.close()
        with turn():
            self.logits = self.model.logits(hidden[-1:])[0]
        self.position = prompt.next_position

    @torch.inference_mode()
    def extend(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        visual: Tensor,
        next_position: int,
        *,
        turn: Turn = nullcontext,
    ) -> None:
        """Appends tokens int64 [n] at `position_ids` [3, n] whose visual tokens [m, d] are known, in chunks, each in a
        turn of its own."""
        device, is_visual = self.model.device, visual_mask(self.model.config, token_ids)
        seen = 0
        for start in range(0, token_ids.shape[0], PREFILL_CHUNK):
            part = slice(start, start + PREFILL_CHUNK)
            needed = seen + int(is_visual[part].sum())
            with turn():
                x = self.model.embed(token_ids[part].to(device), visual[seen:needed])
                self._forward(x, position_ids[:, part].to(device), replies=False)
            seen = needed
        self.position = next_position

    def append(self, tokens: Sequence[int]) -> None:
        """Appends tokens of text, at least one, and computes the logits after the last. That one goes alone where
        selections are counted, since it produces a token of the reply."""
        if self.counts is not None and len(tokens) > 1:
            self._append(tokens[:-1], replies=False)
            tokens = tokens[-1:]
        self._append(tokens, replies=True)

    def feed(self, token: int) -> None:
        """Appends one token and computes the logits after it."""
        self._append([token], replies=True)

    @torch.inference_mode()
    def _append(self, tokens: Sequence[int], *, replies: bool) -> None:
        device = self.model.device
        x = self.model.model.embed_tokens(torch.tensor(tokens, device=device))
        places = torch.arange(self.position, self.position + len(tokens), device=device).expand(3, -1)
        hidden = self._forward(x, places, replies=replies)
        self.logits = self.model.logits(hidden[-1:])[0]
        self.position += len(tokens)

    def _forward(self, x: Tensor, positions: Tensor, *, replies: bool) -> Tensor:
        """`replies` says that the step produces a token of the reply."""
        counts, sparse = self.counts if replies else None, self.model.config.text.sparse
        if counts is not None and sparse is not None and self.cache.length(0) + x.shape[0] > sparse.topk:
            self.counted += 1
        span = Span(0, x.shape[0], self.cache, counts)
        step = CachedStep([span], self.model.config.text, mode=self.mode, select=self.select)
        hidden = self.model(x, positions, step)
        if self.cache.damage is not None:
            raise self.cache.damage
        return hidden


def generate(decoding: Decoding, params: SamplingParams, eos: tuple[int, ...]) -> Iterator[int]:
    """Yields the tokens of the reply after a prefill; ends before an end-of-sequence token or at `max_tokens`.
    `KeyeError` when the model computes NaN."""
    sampler, reply = Sampler(params), list[int]()
    while len(reply) < params.max_tokens:
        token = sampler.draw(decoding.logits, reply).token
        if token in eos:
            return
        reply.append(token)
        yield token
        if len(reply) < params.max_tokens:
            decoding.feed(token)
