"""Replies of a model in training, sampled by the engine: for distillation, preference pairs and labels of modes.

Knows samples and their prompts, and nothing of what is learnt from the replies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch.distributed.tensor import DTensor

from keye.cache.slabs import KVOptions
from keye.config import load_generation_config
from keye.data.samples import Sample
from keye.engine.engine import Engine
from keye.engine.prompt import ContextBudget, Prompt
from keye.engine.runtime import Runtime
from keye.engine.sampling import SamplingParams
from keye.models.attention import AttentionMode
from keye.models.keye import KeyeModel
from keye.train.layout import Layout

#: A reply loops where a part of at most so many tokens comes so often in a row, at least so many tokens in all.
_LOOP_PART, _LOOP_TIMES, _LOOP_TOKENS = 64, 4, 12
#: What the prompt of a mode begins the reply with, where the template opens the block of reasoning.
OPENED: Final = "<think>\n"


@dataclass(frozen=True)
class Rollout:
    """A reply: its tokens, the one that ended it among them, its text as it is read after its prompt (with the block
    that the prompt has opened), and whether it came to an end by itself."""

    token_ids: tuple[int, ...]
    text: str
    is_complete: bool

    @property
    def is_looping(self) -> bool:
        """Whether it repeats itself."""
        return find_loop(self.token_ids) is not None


class Sampler:
    """The engine around a model in training; it reads the weights that the model has now."""

    def __init__(self, model: KeyeModel, folder: Path, *, attention: AttentionMode, max_tokens: int) -> None:
        """`folder` has the tokenizer and the template; prompts and replies of more than `max_tokens` are errors."""
        assert not any(isinstance(p, DTensor) for p in model.parameters()), "the model is divided among processes"
        self.model, self.max_tokens = model, max_tokens
        self.layout = Layout.of_folder(folder)
        builder = self.layout.builder
        runtime = Runtime.create(
            "the model in training", model, builder.tokenizer, builder.processor, load_generation_config(folder),
            attention=attention, template=self.layout.template, kv=KVOptions(),
        )  # fmt: skip
        self.engine = Engine(runtime)

    def lay_out(self, sample: Sample, thinking: bool | None) -> Prompt:
        """The prompt of a sample's last reply."""
        builder, template = self.layout.builder, self.layout.template
        segments = builder.render(sample.messages[:-1], template=template, thinking=thinking, tools=sample.tools)
        # With keys of their content, by which packs tell media apart.
        return builder.lay_out(segments, budget=ContextBudget(self.max_tokens, 1), stream=True)

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, replies: int, *, thinking: bool | None = None
    ) -> list[list[Rollout]]:
        """So many replies to each prompt; `thinking` is what the prompts were laid out with."""
        with generating(self.model):
            self.engine.update_weights({})  # forgets what was computed with the weights before
            results = self.engine.generate(prompts, params, n=replies)
        opened = OPENED if thinking and self.layout.builder.config.release.thinking == "prefill" else ""
        decode = self.layout.builder.tokenizer.decode
        return [
            [
                Rollout(c.token_ids, opened + decode(c.token_ids), c.finish_reason == "stop")
                for c in result.completions
            ]
            for result in results
        ]  # fmt: skip


@contextmanager
def generating(model: KeyeModel) -> Iterator[None]:
    """Within this context a model computes as in inference."""
    before = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(before)


def find_loop(token_ids: Sequence[int]) -> int | None:
    """The first token of the repetitions in a reply that repeats one part at least 4 times in a row; None in others."""
    for size in range(1, min(_LOOP_PART, len(token_ids) // _LOOP_TIMES) + 1):
        needed = max(_LOOP_TIMES * size, _LOOP_TOKENS) - size
        equal = 0
        for place in range(size, len(token_ids)):
            equal = equal + 1 if token_ids[place] == token_ids[place - size] else 0
            if equal == needed:
                return place + 1 - needed - size
    return None
