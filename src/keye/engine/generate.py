"""Prefill and decode of one sequence: token ids in, token ids out. Knows nothing of text."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from keye.engine.kvcache import KVCache
from keye.engine.kvstore import KVStore
from keye.engine.prompt import Prompt
from keye.engine.sampling import Sampler, SamplingParams
from keye.engine.vision import VisionJob
from keye.engine.vision_cache import VisionCache
from keye.models.attention import AttentionMode, CachedStep, Selection, Span
from keye.models.keye import KeyeModel

#: Prompt tokens that pass through the decoder at once.
PREFILL_CHUNK = 1024


class Decoding:
    """One sequence being continued: its cache, its position and the logits of its next token. Keys and values go to
    `store`, or to one of its own."""

    def __init__(
        self,
        model: KeyeModel,
        *,
        mode: AttentionMode = "sparse",
        select: Selection = "indexer",
        store: KVStore | None = None,
    ) -> None:
        self.model, self.mode, self.select = model, mode, select
        self.cache = KVCache(model.config.text.num_hidden_layers, store)
        self.position = 0
        self.logits = torch.empty(0)

    @torch.inference_mode()
    def prefill(self, prompt: Prompt, *, vision: VisionCache | None = None) -> None:
        """Computes the prompt in chunks, what is in its past excepted, the media as they are decoded; afterwards
        `logits` are those of the first token of the reply. `vision` has and keeps visual tokens of media with a key.
        `OutOfMemory`, before any work, where the prompt has no room in the store."""
        done = 0
        if prompt.past is not None:
            self.cache, done = prompt.past.fork(), prompt.past.length(0)
        if self.cache.store is not None:
            self.cache.reserve(prompt.token_ids.shape[0])
        config, device, ids = self.model.config, self.model.device, prompt.token_ids
        is_visual = (ids == config.image_token_id) | (ids == config.video_token_id)
        hidden, seen = torch.empty(0), 0
        job = VisionJob(self.model, prompt, cache=vision)
        try:
            for start in range(done, ids.shape[0], PREFILL_CHUNK):
                part = slice(start, min(start + PREFILL_CHUNK, ids.shape[0]))
                needed = seen + int(is_visual[part].sum())
                job.run_until(needed)
                x = self.model.embed(ids[part].to(device), job.tokens(seen, needed))
                job.forget(needed)
                seen = needed
                hidden = self._forward(x, prompt.position_ids[:, part].to(device))
        finally:
            job.close()
        self.logits = self.model.logits(hidden[-1:])[0]
        self.position = prompt.next_position

    @torch.inference_mode()
    def feed(self, token: int) -> None:
        """Appends one token and computes the logits after it."""
        device = self.model.device
        x = self.model.model.embed_tokens(torch.tensor([token], device=device))
        position = torch.full((3, 1), self.position, dtype=torch.int64, device=device)
        self.logits = self.model.logits(self._forward(x, position))[0]
        self.position += 1

    def _forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        span = Span(0, x.shape[0], self.cache)
        step = CachedStep([span], self.model.config.text, mode=self.mode, select=self.select)
        return self.model(x, positions, step)


def generate(decoding: Decoding, params: SamplingParams, eos: tuple[int, ...]) -> Iterator[int]:
    """Yields the tokens of the reply after a prefill; ends before an end-of-sequence token or at `max_tokens`.
    `KeyeError` when the model computes NaN."""
    sampler, reply = Sampler(params), list[int]()
    while len(reply) < params.max_tokens:
        token = sampler(decoding.logits, reply)
        if token in eos:
            return
        reply.append(token)
        yield token
        if len(reply) < params.max_tokens:
            decoding.feed(token)
