"""One sequence computed by the plainest loop: the oracle of the engine, with no batching, caches or scheduling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from keye.cache.sequence import KVCache
from keye.engine.prompt import Prompt
from keye.models.attention import AttentionMode, CachedStep, Span
from keye.models.keye import KeyeModel

CHUNK = 1024


class PlainSequence:
    """`logits` float32 [V] are those after the last token. With `count`, `counts` int64 [layers, positions] counts the
    selected keys of each call of `append` for its last token, and of the last token of a prompt."""

    def __init__(
        self, model: KeyeModel, mode: AttentionMode = "sparse", *, cache: KVCache | None = None, position: int = 0,
        count: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.mode, self.position = model, mode, position
        self.cache = KVCache(model.config.text.num_hidden_layers) if cache is None else cache
        self.counts = torch.zeros(model.config.text.num_hidden_layers, 4096, dtype=torch.int64) if count else None
        self.logits = torch.empty(0)

    @torch.inference_mode()
    def prefill(self, prompt: Prompt) -> PlainSequence:
        """Computes a prompt, what is in its past excepted, all media encoded beforehand."""
        done, length = 0, prompt.length
        if prompt.past is not None:
            self.cache, done = prompt.past.fork(), prompt.past.length(0)
        patches = prompt.vision()
        visual = None if patches is None else self.model.encode_vision(*patches)
        x = self.model.embed(prompt.token_ids[done:], visual)
        last = length - 1 if self.counts is not None else length
        ends = sorted({*range(done + CHUNK, last, CHUNK), last, length})
        for start, end in zip([done, *ends], ends, strict=False):
            self._forward(x[start - done : end - done], prompt.position_ids[:, start:end], end == length)
        self.position = prompt.next_position
        return self

    @torch.inference_mode()
    def append(self, tokens: Sequence[int]) -> PlainSequence:
        """Appends tokens of text."""
        if self.counts is not None and len(tokens) > 1:
            self._append(tokens[:-1], counted=False)
            tokens = tokens[-1:]
        self._append(tokens, counted=True)
        return self

    def greedy(self, count: int, ends: Sequence[int] = ()) -> list[int]:
        """The next tokens, up to one of `ends`."""
        tokens: list[int] = []
        while len(tokens) < count and (token := int(self.logits.argmax())) not in ends:
            tokens.append(token)
            self.append([token])
        return tokens

    def _append(self, tokens: Sequence[int], *, counted: bool) -> None:
        positions = torch.arange(self.position, self.position + len(tokens)).expand(3, -1)
        self._forward(self.model.model.embed_tokens(torch.tensor(tokens)), positions, counted)
        self.position += len(tokens)

    def _forward(self, x: Tensor, positions: Tensor, counted: bool) -> None:
        span = Span(0, x.shape[0], self.cache, self.counts if counted else None)
        hidden = self.model(x, positions, CachedStep([span], self.model.config.text, mode=self.mode))
        if self.cache.damage is not None:
            raise self.cache.damage
        self.logits = self.model.logits(hidden[-1:])[0]
