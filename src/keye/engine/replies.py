"""From logits to text: draws tokens, decides when a choice is complete, words the events. Holds no state."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from keye.config import GenerationConfig, KeyeConfig
from keye.engine.evidence import make_evidence
from keye.engine.loops import is_loop
from keye.engine.request import Choice, Delta, Ended, Finished, Request, Task, TokenProb
from keye.engine.sampling import Sampler, StopText, check_logits
from keye.errors import KeyeError
from keye.tokenizer import StreamDecoder, Tokenizer


def _may_stop(request: Request) -> bool:
    """Whether a reply that repeats itself is ended: not one that has to go on, or that is held to a form."""
    return request.stop_loops and not request.ignore_eos and request.guide is None


class Writer:
    """Writes the replies of one model."""

    def __init__(self, config: KeyeConfig, tokenizer: Tokenizer, generation: GenerationConfig) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.stop_ids = frozenset(generation.eos_token_ids or config.eos_token_ids)

    def choices(self, task: Task) -> list[Choice]:
        """The continuations of a task, none of them begun. Each draws by itself: its numbers depend on the seed and its
        index alone."""
        request = task.request
        return [
            Choice(
                index,
                Sampler(request.params, index),
                StreamDecoder(self.tokenizer, skip_special=request.skip_special),
                StopText(request.params.stop),
                None if request.guide is None else request.guide.fork(),
            )
            for index in range(request.n)
        ]

    def counts(self, task: Task, length: int, new: int) -> Tensor | None:
        """Where the selections of `new` tokens, the last of the first `length`, are counted for evidence; None where
        nothing is selected."""
        sparse = self.config.text.sparse
        if sparse is None or task.mode == "dense":
            return None
        if task.counts is None:
            size = task.length + task.request.params.max_tokens
            task.counts = torch.zeros(self.config.text.num_hidden_layers, size, dtype=torch.int64)
        task.counted += min(new, max(0, length - sparse.topk))
        return task.counts

    def write(self, tasks: Sequence[Task]) -> list[tuple[Task, Exception]]:
        """Draws the next token of every choice that has logits and tells of it; returns the tasks that cannot go on."""
        rows = [(task, choice) for task in tasks for choice in task.live if choice.logits is not None]
        if not rows:
            return []
        stacked = torch.stack([choice.logits for _, choice in rows])  # type: ignore[misc]
        broken = stacked.isnan().any(-1).tolist()
        best = stacked.argmax(-1).tolist()
        failed: dict[int, tuple[Task, Exception]] = {}
        for (task, choice), bad, token in zip(rows, broken, best, strict=True):
            if task.number in failed:
                continue
            try:
                if bad:
                    check_logits(choice.logits)  # type: ignore[arg-type]
                self._next(task, choice, token)
            except (KeyeError, RuntimeError) as error:  # RuntimeError: torch, of probabilities that are none
                failed[task.number] = task, error
        return list(failed.values())

    def _next(self, task: Task, choice: Choice, best: int) -> None:
        logits, request = choice.logits, task.request
        assert logits is not None
        choice.logits = None
        mask = None if choice.guide is None else choice.guide.mask()
        if mask is None and choice.sampler.takes_best(choice.reply):
            token = best
        else:
            shown = logits if mask is None else logits.masked_fill(~mask.to(logits.device), -torch.inf)
            token = choice.sampler(shown, choice.reply)
        if choice.guide is not None:
            choice.guide.advance(token)
        if token in self.stop_ids and not request.ignore_eos:
            self._complete(task, choice, "stop")
            return
        choice.reply.append(token)
        choice.pending = [token]
        probs = () if request.logprobs is None else (self._prob(logits, token, request.logprobs),)
        text = choice.stop.push(choice.decoder.push(token))
        task.tell(Delta(choice.index, text, (token,), probs))
        if choice.stop.stopped:
            choice.reason = "stop"
            task.tell(Ended(choice.index, "stop"))
        elif len(choice.reply) >= request.params.max_tokens:
            self._complete(task, choice, "length")
        elif _may_stop(request) and is_loop(choice.reply, request.params.max_tokens):
            self._complete(task, choice, "loop")

    def _complete(self, task: Task, choice: Choice, reason: str) -> None:
        """Tells the text that was held back; a stop string at the very end still counts."""
        rest = choice.stop.push(choice.decoder.finish())
        rest += "" if choice.stop.stopped else choice.stop.finish()
        if rest:
            task.tell(Delta(choice.index, rest))
        choice.reason = reason
        task.tell(Ended(choice.index, reason))

    def _prob(self, logits: Tensor, token: int, top: int) -> TokenProb:
        logs = logits.float().log_softmax(-1)
        others = logs.topk(top).indices.tolist() if top else ()
        return self._named(logs, token, tuple(self._named(logs, other) for other in others))

    def _named(self, logs: Tensor, token: int, top: tuple[TokenProb, ...] = ()) -> TokenProb:
        raw = self.tokenizer.token_bytes(token)
        return TokenProb(token, raw.decode("utf-8", "replace"), raw, float(logs[token]), top)

    def probe(self, task: Task, logits: Tensor) -> None:
        """Notes the probabilities of prompt tokens; `logits` [n, V] are those after the tokens just computed."""
        assert task.prompt is not None
        first = task.done - logits.shape[0]
        for row, token in enumerate(task.prompt.token_ids[first + 1 : task.done + 1].tolist()):
            task.prompt_probs.append(self._prob(logits[row], token, task.request.logprobs or 0))

    def finished(self, task: Task) -> Finished:
        """What is told when all choices are complete."""
        prompt, now = task.prompt, time.perf_counter()
        assert prompt is not None
        laid, filled = task.times["laid out"], task.times["prefilled"]
        seconds = {"media": laid - task.created, "prefill": filled - laid, "decode": now - filled}
        evidence = None
        if task.request.evidence:
            evidence = make_evidence(task.counts, task.counted, prompt, self.config)
        return Finished(
            prompt_tokens=task.length,
            media_tokens=prompt.visual_tokens,
            completion_tokens=sum(len(choice.reply) for choice in task.choices),
            cached_tokens=task.cached,
            media=prompt.plans,
            seconds={name: round(value, 4) for name, value in seconds.items()},
            attention=task.mode,
            prompt=prompt,
            evidence=evidence,
            prompt_probs=tuple(task.prompt_probs) if task.request.prompt_logprobs else None,
            looped=any(choice.reason == "loop" for choice in task.choices),
        )
