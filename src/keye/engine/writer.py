"""From logits to text: draws tokens, decides when a choice is complete, builds the events. Holds no state."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from keye.cache.sequence import KVCache
from keye.chat.tokenizer import StreamDecoder
from keye.engine.prompt import Prompt
from keye.engine.request import (
    Branch,
    Choice,
    Delta,
    Ended,
    Finished,
    Generating,
    GenerationRequest,
    Prefilling,
    PromptScores,
    Routing,
    Task,
    TokenProb,
    TokenRecord,
)
from keye.engine.runtime import Runtime
from keye.engine.sampling import Sampler, StopText, check_logits, is_loop
from keye.engine.step import Slice
from keye.errors import KeyeError

#: Prompt tokens that are scored at once: each takes a float32 for every token of the vocabulary.
_SCORED_ROWS: Final = 16


class Writer:
    """Writes the replies of one model."""

    def __init__(self, runtime: Runtime) -> None:
        self.model, self.config, self.tokenizer = runtime.model, runtime.config, runtime.tokenizer
        self.stop_ids = frozenset(runtime.eos_token_ids)
        added = self.tokenizer.added_tokens
        self.thought_ids = added.get("<think>"), added.get("</think>")

    def choices(self, request: GenerationRequest) -> list[Choice]:
        """The choices of a request, not begun. Each draws by itself: its numbers depend on the seed and its index
        alone."""
        params = request.params
        # The tokens of each text as they stand at the beginning of a text and after a space.
        forms = [form for text in params.bad_words for form in (text, f" {text.lstrip()}")]
        banned = [ids for form in forms if (ids := self.tokenizer.encode(form))]
        return [
            Choice(
                index,
                Sampler(params, index, ends=self.stop_ids, banned=banned),
                StreamDecoder(self.tokenizer, skip_special=request.skip_special) if request.detokenize else None,
                StopText(params.stop, shows=params.include_stop_str_in_output),
                None if request.guide is None else request.guide.fork(),
                thought=0 if request.reasoning else None,
            )
            for index in range(request.n)
        ]

    def count_selections(self, task: Task, prompt: Prompt, length: int, choice_index: int) -> Tensor | None:
        """Where the selections of the last of `length` tokens, which produces the next one of a choice, are counted,
        int64 [layers, at least length]; None where nothing is selected or counted."""
        request, sparse = task.request, self.config.text.sparse
        if not request.counts_selections or sparse is None or request.attention == "dense":
            return None
        layers, is_evidence = self.config.text.num_hidden_layers, request.evidence and choice_index == 0
        if is_evidence:
            task.counted += length > sparse.topk
            if task.counts is None:
                task.counts = torch.zeros(layers, prompt.length + request.params.max_tokens, dtype=torch.int64)
        if request.indexer_sets:
            return torch.zeros(layers, length, dtype=torch.int64)
        return task.counts if is_evidence else None

    def routing(self, task: Task, piece: Slice, choice_index: int) -> Routing:
        """What is recorded of the last token of a slice."""
        experts, counts = piece.experts[-1][-1] if piece.experts else None, piece.counts
        if counts is None or not task.request.indexer_sets:
            return experts, None
        if task.counts is not None and choice_index == 0:
            task.counts[:, : counts.shape[1]] += counts
        assert self.config.text.sparse is not None
        topk = self.config.text.sparse.topk
        selected = counts if counts.shape[1] > topk else torch.ones_like(counts)  # up to k all were, and none counted
        indexer_set = torch.full((counts.shape[0], topk), -1, dtype=torch.int32)
        for row, layer in zip(indexer_set, selected, strict=True):
            places = layer.nonzero().squeeze(1)
            row[: places.shape[0]] = places
        return experts, indexer_set

    def write(self, generating: Sequence[tuple[Task, Generating]]) -> list[tuple[Task, Exception]]:
        """Draws the next token of every branch that has logits and emits it; returns the tasks that cannot go on."""
        branches = [(task, branch) for task, state in generating for branch in state.branches]
        rows = [(task, branch, branch.logits) for task, branch in branches if branch.logits is not None]
        if not rows:
            return []
        stacked = torch.stack([logits for _, _, logits in rows])
        broken = stacked.isnan().any(-1).tolist()
        best = stacked.argmax(-1).tolist()
        failed: dict[Task, Exception] = {}
        for (task, branch, logits), bad, token in zip(rows, broken, best, strict=True):
            if task in failed:
                continue
            try:
                if bad:
                    check_logits(logits)
                branch.logits = None
                self._draw(task, branch, logits, token)
            except (KeyeError, RuntimeError) as error:  # RuntimeError: torch, of probabilities that are none
                failed[task] = error
        return list(failed.items())

    def _draw(self, task: Task, branch: Branch, logits: Tensor, best: int) -> None:
        choice, request = branch.choice, task.request
        mask = None if choice.guide is None else choice.guide.mask()
        thought, budget, end_of_thought = choice.thought, request.params.thinking_token_budget, self.thought_ids[1]
        if budget is not None and thought is not None and thought >= budget and end_of_thought is not None:
            token, logprob = end_of_thought, 0.0
        elif mask is None and choice.sampler.takes_best():
            token, logprob = best, 0.0
        else:
            token, logprob = choice.sampler.draw(logits, choice.reply, mask)
        record = None
        if choice.guide is not None:
            token = choice.guide.settle(token)
            choice.guide.advance(token)
        if request.records:
            raw_logprob = float(logits.float().log_softmax(-1)[token])
            record = TokenRecord(token, logprob, raw_logprob, self.model.weights_version, *branch.routing)
        params, is_requested = request.params, token in request.params.stop_token_ids
        if is_requested or (token in self.stop_ids and not request.ignore_eos):
            shows = is_requested and params.include_stop_str_in_output
            text = self.tokenizer.decode([token], skip_special=False) if shows else ""
            self._complete(task, choice, Ended(choice.choice_index, "stop", token, is_requested, record), text)
            return
        choice.reply.append(token)
        branch.pending = [token]
        self._count_thought(choice, token)
        probs: Sequence[TokenProb] = ()
        if request.logprobs is not None:
            probs = self._probs(_score(logits[None], torch.tensor([token]), request.logprobs), ranked=False)
        text = "" if choice.decoder is None else choice.decoder.push(token)
        text = choice.stop.push(text) if len(choice.reply) > params.min_tokens else choice.stop.skip(text)
        task.emit(Delta(choice.choice_index, text, (token,), tuple(probs), () if record is None else (record,)))
        if choice.stop.met is not None:
            choice.reason = "stop"
            task.emit(Ended(choice.choice_index, "stop", choice.stop.met, is_requested=True))
        elif len(choice.reply) >= params.max_tokens:
            self._complete(task, choice, Ended(choice.choice_index, "length"))
        elif (  # not a reply that has to go on, or that is held to a form
            request.stop_loops
            and not request.ignore_eos
            and request.guide is None
            and len(choice.reply) >= params.min_tokens
            and is_loop(choice.reply, params.max_tokens)
        ):
            self._complete(task, choice, Ended(choice.choice_index, "loop"))

    def _complete(self, task: Task, choice: Choice, ended: Ended, more: str = "") -> None:
        """Emits the text that was held back, then `more`; a stop string at the very end still counts."""
        rest = choice.stop.push("" if choice.decoder is None else choice.decoder.finish())
        rest += more if choice.stop.met is not None else choice.stop.finish() + more
        if rest:
            task.emit(Delta(choice.choice_index, rest))
        choice.reason = ended.reason
        task.emit(ended)

    def _count_thought(self, choice: Choice, token: int) -> None:
        begin, end = self.thought_ids
        if token == end:
            choice.thought = None
        elif choice.thought is not None:
            choice.thought += 1
        elif token == begin and len(choice.reply) == 1:
            choice.thought = 0

    def _probs(self, scores: PromptScores, *, ranked: bool) -> list[TokenProb]:
        """Scores with the texts of the tokens, and their ranks if these are wanted."""
        rows = (scores.token_ids, scores.logprobs, scores.ranks, scores.top_ids, scores.top_logprobs)
        probs = []
        for token, logprob, rank, ids, logprobs in zip(*(row.tolist() for row in rows), strict=True):
            others = enumerate(zip(ids, logprobs, strict=True), 1)
            top = tuple(self._named(*pair, place if ranked else None) for place, pair in others)
            probs.append(self._named(token, logprob, rank if ranked else None, top))
        return probs

    def _named(self, token: int, logprob: float, rank: int | None, top: tuple[TokenProb, ...] = ()) -> TokenProb:
        raw = self.tokenizer.token_bytes(token)
        return TokenProb(token, raw.decode("utf-8", "replace"), raw, logprob, top, rank)

    def probe(self, task: Task, state: Prefilling, logits: Tensor) -> None:
        """Keeps the scores of prompt tokens, or their probabilities where a reply follows; `logits` [n, V] are those
        after the tokens just computed."""
        tokens = state.prompt.token_ids[state.done - logits.shape[0] + 1 : state.done + 1]
        top = task.request.prompt_logprobs or 0
        pairs = zip(logits[: tokens.shape[0]].split(_SCORED_ROWS), tokens.split(_SCORED_ROWS), strict=True)
        for scores in (_score(rows, part, top) for rows, part in pairs if part.shape[0]):
            if task.request.prefill_only:
                task.prompt_scores.append(scores)
            else:
                task.prompt_probs += self._probs(scores, ranked=True)

    def finished(self, task: Task, prompt: Prompt, sequence: KVCache | None = None) -> Finished:
        """The event of a complete request, which hands over a `sequence`."""
        now = time.perf_counter()
        laid, filled = task.times["laid out"], task.times["prefilled"]
        seconds = {"media": laid - task.created, "prefill": filled - laid, "generate": now - filled}
        evidence = None
        if task.request.evidence:
            text = self.tokenizer.decode(task.choices[0].reply, skip_special=False)
            has_text = task.request.ignore_eos or bool(text.strip())
            from keye.engine.evidence import make_evidence

            evidence = make_evidence(task.counts, task.counted, prompt, self.config, has_text=has_text)
        rows = [(p.token_ids, p.logprobs, p.ranks, p.top_ids, p.top_logprobs) for p in task.prompt_scores]
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
            prompt_probs=task.wanted_prompt_probs,
            looped=any(choice.reason == "loop" for choice in task.choices),
            notes=tuple(task.notes),
            weights_version=self.model.weights_version,
            sequence=sequence,
            scores=PromptScores(*map(torch.cat, zip(*rows, strict=True))) if rows else None,
            prompt_experts=torch.cat(task.experts) if task.experts else None,
        )


def _score(logits: Tensor, tokens: Tensor, top: int) -> PromptScores:
    """Scores of tokens int64 [n] under logits [n, V], with the `top` likeliest at each place."""
    logs = logits.float().log_softmax(-1)
    own = logs.gather(1, tokens.to(logs.device)[:, None])
    best = logs.topk(top)
    tensors = own.squeeze(1), (logs > own).sum(1) + 1, best.indices, best.values
    logprobs, ranks, top_ids, top_logprobs = (tensor.cpu() for tensor in tensors)
    return PromptScores(tokens, logprobs, ranks, top_ids, top_logprobs)
