"""The engine of one model: the lowest entry points, by token ids and media, and the one way to run requests.

    engine = keye.load("nano").engine
    (result,) = engine.generate([[151644, 872, 198]], SamplingParams(max_tokens=32, temperature=1.0, seed=0))
    (scores,) = engine.score([[151644, 872, 198]], top_logprobs=5)
    engine.update_weights(trainer.state_dict())

Everything that answers is built on it: chat, live sessions, indexes, evaluation, the transformers bridge. Knows token
ids and requests, no messages. `AsyncEngine` has the same entry points for programs with an event loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from keye.cache.sequence import KVCache
from keye.engine.core import EngineCore
from keye.engine.prompt import Prompt
from keye.engine.request import Delta, Ended, Event, Failed, Finished, GenerationRequest, Progress, TokenRecord
from keye.engine.runtime import Runtime
from keye.engine.sampling import SamplingParams
from keye.errors import KeyeError
from keye.media.processor import MediaItem
from keye.models.adapters import Adapter
from keye.models.attention import AttentionMode, Selection
from keye.models.load import update_tensors


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt by token ids, placeholders of visual tokens included, and the media that stand at them, in order (see
    `keye.media.processor.MediaItem`, whose `pixels` may be patches with their grid)."""

    token_ids: Sequence[int]
    media: Sequence[MediaItem] = ()


#: Most log-probabilities of other tokens that the scores of one sequence may have: 1.2 GB with their ids.
MAX_SCORES: Final = 100_000_000
#: What the entry points take: token ids of text, token ids with media, or a prompt that was laid out before.
AnyPrompt = Sequence[int] | TokenPrompt | Prompt


@dataclass(frozen=True)
class Completion:
    """One continuation of n tokens, the token that ended it included.

    `logprobs` float32 [n] are natural log-probabilities in the distribution that each token was sampled from: after
    temperature, top-k, top-p, min-p, penalties, bias, allowed tokens and guide; 0 for greedy and forced tokens.
    `raw_logprobs` float32 [n] are those of the model's own distribution. `weights_versions` int64 [n] is the version
    of the weights that computed each token.

    On request: `experts` int16 [n, routed layers, experts per token] and `indexer_sets` int32 [n, layers, k] are those
    of the forward pass that produced each token, that is of the token before it; positions ascend, -1 fills up. They
    are None for models without routed experts and for dense attention.
    """

    token_ids: tuple[int, ...]
    logprobs: Tensor
    raw_logprobs: Tensor
    weights_versions: Tensor
    finish_reason: str
    experts: Tensor | None = None
    indexer_sets: Tensor | None = None


@dataclass(frozen=True)
class GenerationResult:
    """The continuations of one prompt. `weights_version` is that of the last token. `prompt_experts` int16 [T, routed
    layers, experts per token] on request."""

    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    weights_version: int
    prompt_experts: Tensor | None = None


@dataclass(frozen=True)
class ScoreResult:
    """Natural log-probabilities of given tokens in the model's own distribution, on the CPU: `logprobs` float32 [T - 1]
    of the tokens from the second on, `top_ids` int64 [T - 1, k] and `top_logprobs` float32 [T - 1, k] of the likeliest
    tokens at their places. `experts` int16 [T, routed layers, experts per token] on request."""

    token_ids: tuple[int, ...]
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    weights_version: int
    experts: Tensor | None = None


class Engine:
    """Computes requests on one model together. Its methods may be called from any thread; the thread that waits for a
    result computes steps meanwhile."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    @cached_property
    def core(self) -> EngineCore:
        """The scheduler and its step; created when it is first needed."""
        return EngineCore(self.runtime)

    def generate(
        self, prompts: Sequence[AnyPrompt], sampling: SamplingParams | Sequence[SamplingParams], **options: Any
    ) -> list[GenerationResult]:
        """Continues prompts under one `sampling` or one for each; results are in the order of the prompts. Options are
        those of `generate_request`. `KeyeError` for a prompt that the model does not have, or that does not fit its
        context or memory; it ends all."""
        params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(params) != len(prompts):
            raise KeyeError(f"sampling has {len(params)} entries for {len(prompts)} prompts; give one for each, or one")
        pairs = zip(prompts, params, strict=True)
        requests = [self.generate_request(prompt, params, **options) for prompt, params in pairs]
        return [builder.build_result() for builder in self._build(requests)]

    def score(self, token_ids: Sequence[AnyPrompt], **options: Any) -> list[ScoreResult]:
        """The log-probability of every token of each sequence but its first. Options are those of `score_request`.
        Computed in chunks: the logits of a sequence are never held together. Errors as in `generate`."""
        requests = [self.score_request(prompt, **options) for prompt in token_ids]
        return [builder.build_scores() for builder in self._build(requests)]

    def generate_request(
        self,
        prompt: AnyPrompt,
        sampling: SamplingParams,
        *,
        n: int = 1,
        experts: bool = False,
        indexer_sets: bool = False,
        ignore_eos: bool = False,
        attention: AttentionMode | None = None,
        select: Selection = "indexer",
        deterministic: bool = False,
        seconds: float | None = None,
        adapter: str | None = None,
    ) -> GenerationRequest:
        """A request of `n` continuations by token ids. It has no text: stop strings and bad words are rejected, and
        replies that repeat themselves go on; `ignore_eos` goes on to `max_tokens`. `experts` and `indexer_sets` are
        recorded on request (`Completion`). `attention` is the model's by default; `select` other than "indexer"
        replaces the choice of keys, as a control. `deterministic` makes the tokens independent of whatever else is
        computed. `seconds` is the longest that the request may take. `adapter` is the name of one that was loaded."""
        if sampling.stop or sampling.bad_words:
            raise KeyeError("stop and bad_words are texts, which token ids are not compared with; use stop_token_ids")
        return GenerationRequest(
            self._lay_out(prompt, sampling.max_tokens), sampling, self.runtime.resolve_attention(attention), n=n,
            ignore_eos=ignore_eos, select=select, deterministic=deterministic, seconds=seconds, detokenize=False,
            stop_loops=False, records=True, experts=experts, indexer_sets=indexer_sets,
            adapter=self.runtime.resolve_adapter(adapter),
        )  # fmt: skip

    def score_request(
        self,
        prompt: AnyPrompt,
        *,
        top_logprobs: int = 0,
        experts: bool = False,
        attention: AttentionMode | None = None,
        deterministic: bool = False,
        adapter: str | None = None,
    ) -> GenerationRequest:
        """A request for the log-probabilities of given tokens, and of the `top_logprobs` likeliest at each place."""
        vocabulary = self.runtime.config.text.vocab_size
        if type(top_logprobs) is not int or not 0 <= top_logprobs <= vocabulary:
            raise KeyeError(f"top_logprobs is {top_logprobs!r}; choose 0 to {vocabulary}")
        laid_out = self._lay_out(prompt, 0)
        if laid_out.length * top_logprobs > MAX_SCORES:
            raise KeyeError(f"top_logprobs of {laid_out.length:,} tokens, {top_logprobs:,} with each, are more than "
                            f"{MAX_SCORES:,} numbers; ask for fewer, or score the sequence in parts")  # fmt: skip
        return GenerationRequest(
            laid_out, SamplingParams(max_tokens=1), self.runtime.resolve_attention(attention),
            prompt_logprobs=top_logprobs, prefill_only=True, detokenize=False, deterministic=deterministic,
            experts=experts, adapter=self.runtime.resolve_adapter(adapter),
        )  # fmt: skip

    def prefill(
        self,
        prompt: Prompt,
        *,
        attention: AttentionMode | None = None,
        select: Selection = "indexer",
        adapter: str | Adapter | None = None,
        seconds: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        check: Callable[[], None] | None = None,
    ) -> tuple[KVCache, Finished]:
        """Computes a prompt and returns what is stored of it, which the caller frees: other prompts continue it as
        their `past`, with the same `adapter`. It is stored behind the prompt's own `past`, in that store. `on_progress`
        and `check`, which is called again and again also while nothing is computed, may raise to end the work;
        `seconds` is the longest that it may take."""
        request = GenerationRequest(
            prompt, SamplingParams(max_tokens=1), self.runtime.resolve_attention(attention), select=select,
            seconds=seconds, prefill_only=True, detokenize=False, adapter=self.runtime.resolve_adapter(adapter),
        )  # fmt: skip
        with closing(self.run([request], check)) as events:
            for _, event in events:
                if isinstance(event, Progress) and on_progress is not None:
                    on_progress(event)
        assert isinstance(event, Finished) and event.sequence is not None
        return event.sequence, event

    def update_weights(self, state: Mapping[str, Tensor]) -> int:
        """Replaces weights in place, between two steps, with tensors under official names: all or some of the model's.
        Returns the new version of the weights, which results carry.

        Prompts in the prefix cache, visual tokens and the fingerprint that indexes are checked against are forgotten.
        Requests that have begun to generate go on: what they have stored stays, their next tokens are those of the new
        weights, and `weights_versions` says which. Prompts that are being computed begin again. Live sessions have to
        be opened again. `KeyeError` that names the tensor, and nothing is changed, for a name that the model does not
        have, another shape, and numbers that are not floating-point."""
        with self.core.exclusive():
            version = update_tensors(self.runtime.model, state)
            self.core.restart_prompts()
            self.runtime.forget_weights()
        return version

    def load_adapter(self, path: str | Path, name: str, *, replace: bool = False) -> Adapter:
        """Loads a LoRA adapter from a folder that PEFT wrote, between two steps; with `replace` in the place of one
        that is called so. `KeyeError` in one sentence where it cannot be read, was made for another model, or does not
        fit in memory."""
        return self.runtime.adapters.load(path, name, self.core.exclusive, replace=replace)

    def exclusive(self) -> AbstractContextManager[None]:
        """Entered around work on the model that is not a request: no step runs meanwhile."""
        return self.core.exclusive()

    def run(
        self, requests: Sequence[GenerationRequest], check: Callable[[], None] | None = None
    ) -> Generator[tuple[int, Event]]:
        """Computes requests together, step by step as their events are read; each event comes with the number of its
        request, and `Finished` is the last one of each. Raises what made a request fail. Closing the iterator aborts
        what has not finished. `check` is called again and again while this waits, and may raise."""
        events = deque[tuple[int, Event]]()

        def receive(number: int, event: Event) -> None:
            events.append((number, event))

        tasks = [self.core.add(request, partial(receive, number)) for number, request in enumerate(requests)]
        unfinished = len(tasks)
        try:
            while unfinished:
                while not events:
                    if check is not None:
                        check()
                    if not self.core.step() and not events:
                        self.core.wait_for_work()
                number, event = events.popleft()
                if isinstance(event, Failed):
                    try:
                        raise event.error
                    finally:
                        del event  # in a cycle with its traceback it would keep alive what callers hold
                unfinished -= isinstance(event, Finished)
                yield number, event
        finally:
            for task in tasks:
                if not task.has_ended:
                    self.core.abort(task)

    def _build(self, requests: Sequence[GenerationRequest]) -> list[ResultBuilder]:
        builders = [ResultBuilder(request) for request in requests]
        with closing(self.run(requests)) as events:
            for number, event in events:
                builders[number].add(event)
        return builders

    def _lay_out(self, prompt: AnyPrompt, reply: int) -> Prompt:
        if isinstance(prompt, Prompt):
            return prompt
        if not isinstance(prompt, TokenPrompt):
            prompt = TokenPrompt(prompt)
        return self.runtime.prompts.of_tokens(prompt.token_ids, prompt.media, reply=reply)


@dataclass
class ResultBuilder:
    """Builds the result of one request of `Engine.generate` or `Engine.score` from its events."""

    request: GenerationRequest
    finished: Finished | None = None
    records: list[list[TokenRecord]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.records, self.reasons = [[] for _ in range(self.request.n)], [""] * self.request.n

    def add(self, event: Event) -> None:
        """Takes the next event."""
        if isinstance(event, Delta):
            self.records[event.choice_index] += event.records
        elif isinstance(event, Ended):
            self.reasons[event.choice_index] = event.reason
            if event.record is not None:
                self.records[event.choice_index].append(event.record)
        elif isinstance(event, Finished):
            self.finished = event

    def build_result(self) -> GenerationResult:
        """The result after `Finished`."""
        assert self.finished is not None
        return GenerationResult(
            tuple(self.finished.prompt.token_ids.tolist()),
            tuple(map(_build_completion, self.records, self.reasons)),
            self.finished.weights_version,
            self.finished.prompt_experts,
        )

    def build_scores(self) -> ScoreResult:
        """The result after `Finished`."""
        assert self.finished is not None
        if self.finished.sequence is not None:
            self.finished.sequence.free()
        ids, scores = self.finished.prompt.token_ids, self.finished.scores
        assert scores is not None
        return ScoreResult(
            tuple(ids.tolist()), scores.logprobs, scores.top_ids, scores.top_logprobs, self.finished.weights_version,
            self.finished.prompt_experts,
        )  # fmt: skip


def _build_completion(records: Sequence[TokenRecord], reason: str) -> Completion:
    experts = [record.experts for record in records if record.experts is not None]
    sets = [record.indexer_set for record in records if record.indexer_set is not None]
    return Completion(
        tuple(record.token for record in records),
        torch.tensor([record.logprob for record in records], dtype=torch.float32),
        torch.tensor([record.raw_logprob for record in records], dtype=torch.float32),
        torch.tensor([record.weights_version for record in records]),
        reason,
        torch.stack(experts) if experts else None,
        torch.stack(sets) if sets else None,
    )
