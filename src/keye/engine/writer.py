"""From logits to text: draws tokens, decides when a choice is complete, builds the events. Holds no state."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from keye.chat.tokenizer import StreamDecoder, Tokenizer
from keye.config import GenerationConfig, KeyeConfig
from keye.engine.evidence import make_evidence
from keye.engine.prompt import Prompt
from keye.engine.request import (
    Branch,
    Choice,
    Delta,
    Ended,
    Finished,
    Generating,
    Prefilled,
    Prefilling,
    Request,
    Task,
    TokenProb,
)
from keye.engine.sampling import Sampler, StopText, check_logits, is_loop
from keye.errors import KeyeError


def _may_stop(request: Request, length: int) -> bool:
    """Whether a reply that repeats itself is ended: not one that has to go on, or that is held to a form."""
    free = not request.ignore_eos and request.guide is None and length >= request.params.min_tokens
    return request.stop_loops and free


class Writer:
    """Writes the replies of one model."""

    def __init__(self, config: KeyeConfig, tokenizer: Tokenizer, generation: GenerationConfig) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.stop_ids = frozenset(generation.eos_token_ids or config.eos_token_ids)
        added = tokenizer.added_tokens
        self.thought_ids = added.get("<think>"), added.get("</think>")

    def choices(self, request: Request) -> list[Choice]:
        """The choices of a request, not begun. Each draws by itself: its numbers depend on the seed and its index
        alone."""
        params = request.params
        banned = self._banned(params.bad_words)
        return [
            Choice(
                index,
                Sampler(params, index, ends=self.stop_ids, banned=banned),
                StreamDecoder(self.tokenizer, skip_special=request.skip_special),
                StopText(params.stop, shows=params.include_stop_str_in_output),
                None if request.guide is None else request.guide.fork(),
                thought=0 if request.reasoning else None,
            )
            for index in range(request.n)
        ]

    def _banned(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text as they stand at the beginning of a text and after a space."""
        forms = [form for text in texts for form in (text, f" {text.lstrip()}")]
        return [ids for form in forms if (ids := self.tokenizer.encode(form))]

    def count_selections(self, task: Task, prompt: Prompt, length: int) -> Tensor | None:
        """Where the selections of the last of `length` tokens are counted for evidence, int64 [layers, positions]; None
        where nothing is selected."""
        sparse = self.config.text.sparse
        if sparse is None or task.request.attention == "dense":
            return None
        if task.counts is None:
            size = prompt.length + task.request.params.max_tokens
            task.counts = torch.zeros(self.config.text.num_hidden_layers, size, dtype=torch.int64)
        task.counted += length > sparse.topk
        return task.counts

    def write(self, generating: Sequence[tuple[Task, Generating]]) -> list[tuple[Task, Exception]]:
        """Draws the next token of every branch that has logits and emits it; returns the tasks that cannot go on."""
        rows = [
            (task, branch, branch.logits)
            for task, state in generating
            for branch in state.branches
            if branch.logits is not None
        ]
        if not rows:
            return []
        stacked = torch.stack([logits for _, _, logits in rows])
        broken = stacked.isnan().any(-1).tolist()
        best = stacked.argmax(-1).tolist()
        failed: dict[int, tuple[Task, Exception]] = {}
        for (task, branch, logits), bad, token in zip(rows, broken, best, strict=True):
            if task.number in failed:
                continue
            try:
                if bad:
                    check_logits(logits)
                branch.logits = None
                self._draw(task, branch, logits, token)
            except (KeyeError, RuntimeError) as error:  # RuntimeError: torch, of probabilities that are none
                failed[task.number] = task, error
        return list(failed.values())

    def _draw(self, task: Task, branch: Branch, logits: Tensor, best: int) -> None:
        choice, request = branch.choice, task.request
        mask = None if choice.guide is None else choice.guide.mask()
        if (forced := self._end_of_thought(choice, request.params.thinking_token_budget)) is not None:
            token = forced
        elif mask is None and choice.sampler.takes_best():
            token = best
        else:
            token = choice.sampler(logits, choice.reply, mask)
        if choice.guide is not None:
            token = choice.guide.settle(token)
            choice.guide.advance(token)
        params, asked = request.params, token in request.params.stop_token_ids
        if asked or (token in self.stop_ids and not request.ignore_eos):
            shown = self.tokenizer.decode([token], skip_special=False) if params.include_stop_str_in_output else ""
            self._complete(task, choice, Ended(choice.index, "stop", token, asked), shown if asked else "")
            return
        choice.reply.append(token)
        branch.pending = [token]
        self._count_thought(choice, token)
        probs = () if request.logprobs is None else (self._prob(logits, token, request.logprobs),)
        text = choice.decoder.push(token)
        text = choice.stop.push(text) if len(choice.reply) > params.min_tokens else choice.stop.skip(text)
        task.emit(Delta(choice.index, text, (token,), probs))
        if choice.stop.stopped:
            choice.reason = "stop"
            task.emit(Ended(choice.index, "stop", choice.stop.met, asked=True))
        elif len(choice.reply) >= params.max_tokens:
            self._complete(task, choice, Ended(choice.index, "length"))
        elif _may_stop(request, len(choice.reply)) and is_loop(choice.reply, params.max_tokens):
            self._complete(task, choice, Ended(choice.index, "loop"))

    def _complete(self, task: Task, choice: Choice, ended: Ended, more: str = "") -> None:
        """Emits the text that was held back, then `more`; a stop string at the very end still counts."""
        rest = choice.stop.push(choice.decoder.finish())
        rest += more if choice.stop.stopped else choice.stop.finish() + more
        if rest:
            task.emit(Delta(choice.index, rest))
        choice.reason = ended.reason
        task.emit(ended)

    def _end_of_thought(self, choice: Choice, budget: int | None) -> int | None:
        """The token that ends a block of reasoning, where a choice has written as much of it as it may."""
        enough = budget is not None and choice.thought is not None and choice.thought >= budget
        return self.thought_ids[1] if enough else None

    def _count_thought(self, choice: Choice, token: int) -> None:
        begin, end = self.thought_ids
        if token == end:
            choice.thought = None
        elif choice.thought is not None:
            choice.thought += 1
        elif token == begin and len(choice.reply) == 1:
            choice.thought = 0

    def _prob(self, logits: Tensor, token: int, top: int, *, ranked: bool = False) -> TokenProb:
        logs = logits.float().log_softmax(-1)
        others = logs.topk(top).indices.tolist() if top else ()
        best = tuple(self._named(logs, other, rank=place if ranked else None) for place, other in enumerate(others, 1))
        return self._named(logs, token, best, int((logs > logs[token]).sum()) + 1 if ranked else None)

    def _named(self, logs: Tensor, token: int, top: tuple[TokenProb, ...] = (), rank: int | None = None) -> TokenProb:
        raw = self.tokenizer.token_bytes(token)
        return TokenProb(token, raw.decode("utf-8", "replace"), raw, float(logs[token]), top, rank)

    def probe(self, task: Task, state: Prefilling, logits: Tensor) -> None:
        """Notes the probabilities of prompt tokens; `logits` [n, V] are those after the tokens just computed."""
        first = state.done - logits.shape[0]
        for row, token in enumerate(state.prompt.token_ids[first + 1 : state.done + 1].tolist()):
            task.prompt_probs.append(self._prob(logits[row], token, task.request.prompt_logprobs or 0, ranked=True))

    def prefilled(self, task: Task, prompt: Prompt) -> Prefilled:
        """The event of a complete prompt."""
        first, notes = int(prompt.token_ids[0]), (*prompt.notes, *task.notes)
        return Prefilled(prompt.length, first, self._prompt_probs(task), notes)

    @staticmethod
    def _prompt_probs(task: Task) -> tuple[TokenProb, ...] | None:
        """The probabilities of the prompt where they were asked for."""
        return None if task.request.prompt_logprobs is None else tuple(task.prompt_probs)

    def finished(self, task: Task, prompt: Prompt) -> Finished:
        """The event of a complete request."""
        now = time.perf_counter()
        laid, filled = task.times["laid out"], task.times["prefilled"]
        seconds = {"media": laid - task.created, "prefill": filled - laid, "generate": now - filled}
        evidence = None
        if task.request.evidence:
            text = self.tokenizer.decode(task.choices[0].reply, skip_special=False)
            answered = task.request.ignore_eos or bool(text.strip())
            evidence = make_evidence(task.counts, task.counted, prompt, self.config, answered=answered)
        return Finished(
            prompt_tokens=prompt.length,
            media_tokens=prompt.visual_tokens,
            completion_tokens=sum(len(choice.reply) for choice in task.choices),
            cached_tokens=task.cached,
            media=prompt.plans,
            seconds={name: round(value, 4) for name, value in seconds.items()},
            attention=task.request.attention,
            prompt=prompt,
            evidence=evidence,
            prompt_probs=self._prompt_probs(task),
            looped=any(choice.reason == "loop" for choice in task.choices),
            notes=tuple(task.notes),
        )
