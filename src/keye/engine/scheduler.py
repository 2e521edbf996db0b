"""What the engine computes next: which requests run, who is preempted, and the slices of a step. Runs no model.

Everything that generates goes on in every step. What is left of the step's time goes to prompts, in equal shares, so
that a long prompt delays neither the replies nor short prompts behind it, and is itself never passed over.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import torch

from keye.cache.ledger import OutOfMemory
from keye.cache.sequence import KVCache
from keye.cache.slabs import KVStore
from keye.engine.prompt import Prompt
from keye.engine.request import (
    Branch,
    Closed,
    Failed,
    Generating,
    GenerationRequest,
    Preempted,
    Prefilled,
    Prefilling,
    Ready,
    Running,
    Task,
)
from keye.engine.runtime import Runtime
from keye.engine.step import ALONE_TOKENS, LEAST_TOKENS, Scratch, Slice, Wanted
from keye.engine.vision import VisionJob
from keye.engine.writer import Writer
from keye.errors import KeyeError, KeyeWarning, Option
from keye.ops.kv_blocks import KV_BLOCK
from keye.units import format_bytes

T = TypeVar("T")

#: How much longer than a step that only generates one with prompts in it may take, as a factor: for one prompt beside
#: any number of replies, and at most, where the prompts outnumber the replies.
STRETCH: Final = 1.6
MOST_STRETCH: Final = 3.0
#: Weight of the newest measurement.
_NEWEST: Final = 0.2
#: Prompt tokens at once where logits of all of them are wanted, and in deterministic requests.
PROBED_TOKENS: Final = 128
FIXED_TOKENS: Final = 256
#: Most probabilities of prompt tokens, and of others beside them, that one request gets.
MAX_PROBS: Final = 100_000


def split_budget(waiting: Sequence[tuple[int, int]], budget: int) -> dict[int, int]:
    """Prompt tokens of a step for each of `waiting`: (number, tokens that could be computed) of prompts, the oldest
    first. Equal shares of `budget`; what one does not need goes to the others, the oldest first. Each gets at least one
    token if the budget has one for each; if not, the oldest and those who need least do."""
    if budget <= 0:
        return {}
    if budget < len(waiting):
        oldest, *others = waiting
        return {number: 1 for number, _ in [oldest, *sorted(others, key=lambda pair: pair[1])[: budget - 1]]}
    left, shares = budget, dict[int, int]()
    youngest_first = [*reversed(waiting)]
    by_need = sorted(youngest_first, key=lambda pair: pair[1])  # of equals the oldest comes last, and gets the rest
    for place, (number, need) in enumerate(by_need):
        share = min(need, left // (len(by_need) - place))
        shares[number] = share
        left -= share
    for number, need in waiting:
        more = min(need - shares[number], left)
        shares[number] += more
        left -= more
    return {number: share for number, share in shares.items() if share}


@dataclass
class StepTimer:
    """Measured times of steps, from which budgets follow: `step` seconds of a step that only generates, `token`
    seconds that a prompt token adds, `patch` seconds of a patch."""

    step: float | None = None
    token: float | None = None
    patch: float | None = None

    def token_budget(self, generating: int, prompts: int = 1) -> int:
        """Prompt tokens of the next step, which computes `generating` replies too. The more of the `prompts` wait for
        each reply, the longer it may be: of many that come together the first would otherwise hold up all others."""
        if not generating:
            return ALONE_TOKENS
        if self.step is None or not self.token:
            return LEAST_TOKENS * 4
        stretch = min(1 + (STRETCH - 1) * max(1.0, prompts / generating), MOST_STRETCH)
        spare = (stretch - 1) * self.step
        return max(LEAST_TOKENS, min(ALONE_TOKENS, int(spare / self.token)))

    def patch_budget(self, generating: int) -> int:
        """Patches to encode in the next step; the encoder takes whole groups."""
        if not generating or self.step is None or not self.patch:
            return 1 << 14 if not generating else 1
        return max(1, int((STRETCH - 1) * self.step / self.patch))

    def record_step(self, seconds: float, generating: int, prompt: int) -> None:
        """A step with `generating` tokens of replies and `prompt` tokens of prompts took so long."""
        if generating and not prompt:
            self.step = _average(self.step, seconds)
        elif prompt >= LEAST_TOKENS:
            replies = (self.step or 0.0) if generating else 0.0
            self.token = _average(self.token, max(1e-7, seconds - replies) / prompt)

    def record_patches(self, seconds: float, patches: int) -> None:
        """Encoding `patches` took so long."""
        self.patch = _average(self.patch, seconds / patches)


def _average(old: float | None, new: float) -> float:
    return new if old is None else (1 - _NEWEST) * old + _NEWEST * new


def check_request(prompt: Prompt, request: GenerationRequest, store: KVStore, scratch: Scratch) -> None:
    """`KeyeError` for a prompt that can never be computed, however much is evicted and preempted."""
    if prompt.past is not None and request.prompt_logprobs is not None:
        raise KeyeError("the prompt begins with an index, whose tokens are computed already: leave out "
                        "prompt_logprobs, or give the video itself")  # fmt: skip
    tokens = prompt.length + 1
    probs = 0 if request.prompt_logprobs is None or request.prefill_only else request.prompt_logprobs + 1
    if (tokens - 1) * probs > MAX_PROBS:
        raise KeyeError(
            f"prompt_logprobs of {tokens - 1:,} tokens, {request.prompt_logprobs} others with each, are more than "
            f"{MAX_PROBS:,} probabilities: ask for fewer others or send a shorter prompt"
        )
    rows, wanted = 1, 1  # the least that a step computes of it
    if request.deterministic:
        rows, wanted = (FIXED_TOKENS, 1) if request.prompt_logprobs is None else (PROBED_TOKENS, PROBED_TOKENS)
    new = tokens - (0 if prompt.past is None else prompt.past.length(0))
    shortage = store.shortage(new, scratch.count_bytes(rows, wanted))
    if shortage is not None:
        need, budget, most = shortage
        raise OutOfMemory(
            "the prompt of {} tokens takes {} of keys and values, but the memory budget leaves {}, enough for {} "
            "tokens; sample fewer or smaller frames ({}, {}), store fewer bits ({}), or raise the budget",
            f"{tokens - 1:,}", format_bytes(need), format_bytes(budget), f"{most:,}",
            Option("max_frames"), Option("max_pixels"), Option("kv", "int4"),
        )  # fmt: skip


def count_fixed(request: GenerationRequest) -> int | None:
    """Tokens of each slice of a prompt whose slices do not depend on what else runs, so that its numbers do not either:
    those of deterministic requests, and of streams and indexes. None for others."""
    return FIXED_TOKENS if request.deterministic else ALONE_TOKENS if request.is_stored else None


def count_computable(request: GenerationRequest, state: Prefilling) -> int:
    """Tokens of a prompt that can be computed now: those before the first visual token that is not encoded."""
    stop, done = state.prompt.length, state.done
    if request.counts_selections and done < stop - 1:
        stop -= 1  # the last token goes alone: it produces the first of the reply
    if request.prompt_logprobs is not None:
        stop = min(stop, done + PROBED_TOKENS)
    if (fixed := count_fixed(request)) is not None:
        stop = min(stop, done + fixed)
    ready = stop
    if not state.vision.done:
        ready = min(stop, int(torch.searchsorted(state.prompt.visual_counts, state.vision.ready, right=True)))
    if fixed is not None and ready < stop:
        return 0  # its slices are always cut at the same places
    return max(0, ready - done)


def is_fragmented(state: object) -> bool:
    """Whether the blocks of a running state are in more slabs than they need, among what others have left."""
    if not isinstance(state, Running) or not state.caches or (store := state.caches[0].store) is None:
        return False
    needed = store.slabs_for(KV_BLOCK * sum(cache.blocks for cache in state.caches))
    return store.nbytes() > store.slab_bytes * needed


class Work(NamedTuple):
    """A slice of a step: of a branch, or of the prompt of `task` where there is none."""

    task: Task
    slice: Slice
    branch: Branch | None = None


class Scheduler:
    """The requests of one engine and what they hold. Used by the thread that steps; `notify` is called at every end.

    A request that ends in any way, in any state, holds nothing afterwards; what others can use again stays in the
    caches.
    """

    def __init__(self, runtime: Runtime, writer: Writer, notify: Callable[[], None], most_running: int) -> None:
        self.runtime, self.writer, self.most_running = runtime, writer, most_running
        self.timer, self.scratch = StepTimer(), Scratch(runtime.model, runtime.ledger)
        self.tasks: list[Task] = []
        #: Requests that have ended: one that found no memory tries again when this has grown.
        self.ended = 0
        self.preemptions = self._steps = 0
        self._notify = notify
        self._folder = runtime.kv.folder or Path(tempfile.gettempdir())

    # ------------------------------------------------------------------------------------------------------ starting

    def set_ready(self, task: Task, prompt: Prompt) -> None:
        """Takes the prompt of a task; fails the task if it can never be computed."""
        context = self.runtime.config.text.max_position_embeddings
        request, left = task.request, context - prompt.length
        if request.clamp and 1 <= left < request.params.max_tokens:
            note = (f"max_tokens is {request.params.max_tokens:,}; the context of {context:,} tokens leaves {left:,} "
                    "for the reply")  # fmt: skip
            task.notes.append(KeyeWarning(note))
            least = min(request.params.min_tokens, left)
            task.request = replace(request, params=replace(request.params, max_tokens=left, min_tokens=least))
        task.times["laid out"] = time.perf_counter()
        store = prompt.past.store if prompt.past is not None else self.runtime.store
        assert store is not None
        try:
            check_request(prompt, task.request, store, self.scratch)
        except KeyeError as error:
            self.fail(task, error)
        else:
            task.state = Ready(prompt)

    def admit(self) -> None:
        """Starts prompts, the oldest first, as long as few enough are running. Streams and indexes do not count: they
        take turns with replies, however many there are."""
        running = sum(task.is_running and not task.request.is_stored for task in self.tasks)
        is_busy = any(task.is_running for task in self.tasks)
        for task in sorted(self.tasks, key=lambda task: task.created):
            is_stored = task.request.is_stored
            if not isinstance(task.state, Ready) or (running >= self.most_running and not is_stored):
                continue
            if is_busy and task.state.blocked == self.ended:
                continue  # nothing has changed since it found no memory
            keys = {item.key for item in task.state.prompt.media if item.key is not None}
            jobs = [other.state.vision for other in self.tasks if isinstance(other.state, Prefilling)]
            if any(job.will_keep(key) for job in jobs for key in keys):
                continue  # another request reads the same video just now: it will be in the cache in a moment
            self._start(task, task.state)
            running, is_busy = running + (not is_stored), True

    def _start(self, task: Task, ready: Ready) -> None:
        """Goes on from what is stored of a prompt, and reserves memory for the rest of it before any work."""
        if self.make_room(self.scratch.reserve, task) is None:
            return
        resume = partial(self._find_prefix, task, ready.prompt) if ready.preempted is None else ready.preempted.resume
        state = self.make_room(resume, task)
        if state is None:
            return
        task.state = state
        if isinstance(state, Generating):
            return
        if self.make_room(partial(state.cache.reserve, ready.prompt.length + 1), task) is None:
            return
        if "started" not in task.times:  # after a preemption what is stored is its own
            task.times["started"], task.cached = time.perf_counter(), state.done
        first = int(ready.prompt.visual_counts[state.done - 1]) if state.done else 0
        model, cache = self.runtime.model, self.runtime.vision_cache
        try:
            state.vision = VisionJob(model, ready.prompt.media, first=first, cache=cache, adapter=task.request.adapter)
        except (KeyeError, OSError, RuntimeError) as error:  # the file is gone, or no decode worker could be started
            self.fail(task, error)
            return
        state.vision.forget(first)
        state.vision.add_notes(task.notes)
        if state.logits is not None:
            self.complete_prompt(task, state)

    def _find_prefix(self, task: Task, prompt: Prompt) -> Prefilling:
        """The state from which a prompt goes on: after its index, after a prefix that is stored, or at its beginning.
        Its media are opened once there is memory for the whole prompt."""
        runtime, request, cache = self.runtime, task.request, None
        needs_whole_prompt = request.deterministic or request.prompt_logprobs is not None or request.experts
        if prompt.past is not None:
            cache = prompt.past.fork()
        elif prompt.spans is not None and not needs_whole_prompt:
            cache = runtime.prefixes.find(prompt.token_ids, prompt.spans, _cache_namespace(request))
        cache = cache or KVCache(runtime.config.text.num_hidden_layers, runtime.store)
        return Prefilling(prompt, cache, VisionJob(runtime.model, ()))

    def complete_prompt(self, task: Task, state: Prefilling) -> None:
        """Keeps the prefixes of a prompt for others and goes on to the reply: every choice continues a fork of the
        prompt, the last one the prompt itself. Without a reply the sequence is handed over. What was generated before a
        preemption that could not be saved comes again as tokens to compute."""
        prompt, trunk = state.prompt, state.cache
        state.vision.close()
        if not task.request.deterministic and prompt.spans is not None:
            self.runtime.prefixes.keep(prompt.token_ids, prompt.spans, _cache_namespace(task.request), trunk)
        if "prefilled" not in task.times:  # after a preemption the prompt may be computed again
            task.times["prefilled"] = time.perf_counter()
            first, notes = int(prompt.token_ids[0]), (*prompt.notes, *task.notes)
            task.emit(Prefilled(prompt.length, first, task.wanted_prompt_probs, notes))
            task.choices = self.writer.choices(task.request)
        if task.request.prefill_only:
            task.emit(self.writer.finished(task, prompt, trunk))
            task.state = Ready(prompt)  # the receiver of the event has the sequence
            self.end(task)
            return
        live = [choice for choice in task.choices if choice.reason is None]
        forks = self.make_room(lambda: [trunk.fork() for _ in live[1:]], task)
        if forks is not None:
            task.state = Generating(prompt, [
                Branch(choice, cache, list(choice.reply), prompt.next_position, None if choice.reply else state.logits,
                       state.routing)
                for choice, cache in zip(live, [*forks, trunk], strict=True)
            ])  # fmt: skip

    # -------------------------------------------------------------------------------------------------------- a step

    def schedule(self, *, prompts: bool) -> list[Work]:
        """What the next step computes: a token of every branch and, with `prompts`, shares of the prompts. There is
        memory for its keys and values; where scratch does not suffice for all, those that have waited longest come
        first, and at least one comes."""
        states = [(task, task.state) for task in self.tasks]
        generating = [(task, state) for task, state in states if isinstance(state, Generating)]
        replies = sum(len(state.branches) for _, state in generating)
        work: list[Work] = []
        for task, state in sorted(generating, key=lambda pair: pair[0].last_step):
            work += self._schedule_reply(task, state)
        if prompts:
            work += self._schedule_prompts(replies)
        work = [item for item in work if item.slice.cache.blocks]  # making room for one may have preempted another
        work = work[: max(1, self.scratch.count_fitting([item.slice for item in work]))]
        self._steps += 1
        for item in work:
            item.task.last_step = self._steps
        return work

    def _schedule_prompts(self, replies: int) -> list[Work]:
        waiting = [(task, task.state) for task in self.tasks if isinstance(task.state, Prefilling)]
        waiting = [(task, state) for task, state in waiting if count_computable(task.request, state)]
        waiting.sort(key=lambda pair: pair[0].created)
        budget = self.scratch.limit_tokens(self.timer.token_budget(replies, len(waiting)), replies)
        needs = [(i, count_computable(task.request, state)) for i, (task, state) in enumerate(waiting)]
        shares, work = split_budget(needs, budget), list[Work]()
        for i, (task, state) in enumerate(waiting):
            if task.state is state and i in shares:  # making room for one may have preempted another
                work += self._schedule_prompt(task, state, shares[i])
        return work

    def _schedule_prompt(self, task: Task, state: Prefilling, share: int) -> list[Work]:
        """The next tokens of a prompt; nothing where memory does not suffice for them."""
        request, prompt, start = task.request, state.prompt, state.done
        count = count_computable(request, state)
        fixed = count_fixed(request)
        if fixed is None:
            count = min(share, count)
            if request.prompt_logprobs is not None:
                count = self.scratch.limit_tokens(count, probes=True)
        elif request.is_stored:
            count = self.scratch.limit_tokens(count)
        stop = start + count
        if self.make_room(partial(state.cache.reserve, stop), task) is None:
            return []
        before, after = int(prompt.visual_counts[start - 1]) if start else 0, int(prompt.visual_counts[stop - 1])
        is_last = stop == prompt.length
        wanted: Wanted = "all" if request.prompt_logprobs is not None else "last" if is_last else "none"
        counts = self.writer.count_selections(task, prompt, stop, 0) if is_last else None
        piece = Slice(
            state.cache, prompt.token_ids[start:stop], prompt.position_ids[:, start:stop],
            state.vision.tokens(before, after) if after > before else None,
            wanted, request.attention, counts, fixed is not None, request.select,
            task.experts if request.experts else None, request.deterministic, adapter=request.adapter,
        )  # fmt: skip
        return [Work(task, piece)]

    def _schedule_reply(self, task: Task, state: Generating) -> list[Work]:
        """One token of each branch: also of those that are computed again, in steps of the same kind as before."""
        request, work = task.request, list[Work]()
        for branch in state.branches:
            if task.state is not state:
                return []
            length = branch.cache.length(0) + 1
            if not branch.pending:
                continue
            if self.make_room(partial(branch.cache.reserve, length), task) is None:
                return []
            counts = self.writer.count_selections(task, state.prompt, length, branch.choice.choice_index)
            piece = Slice(
                branch.cache, torch.tensor(branch.pending[:1]), torch.full((3, 1), branch.position), None, "last",
                request.attention, counts, request.deterministic, request.select,
                [] if request.experts else None, request.deterministic, adapter=request.adapter,
            )  # fmt: skip
            work.append(Work(task, piece, branch))
        return work

    # -------------------------------------------------------------------------------------------------------- memory

    def make_room(self, reserve: Callable[[], T], task: Task) -> T | None:
        """What `reserve` returns. Where evicting from the caches is not enough, other tasks are preempted, the newest
        first; a task that cannot even run alone fails, a fragmented one after a second attempt. None when `task` itself
        had to go."""
        while True:
            try:
                return reserve()
            except OutOfMemory as error:
                others = [other for other in self.tasks if other is not task and other.is_running]
                younger = [other for other in others if other.created > task.created]
                if younger:
                    self.preempt(max(younger, key=lambda other: other.created))
                elif others or (not task.retried and is_fragmented(task.state)):
                    task.retried = not others
                    self.preempt(task)
                    return None
                else:
                    # The frames of its traceback may hold caches that were half built.
                    self.fail(task, error.with_traceback(None))
                    return None

    def preempt(self, task: Task) -> None:
        """Takes the memory of a task that runs or starts; it goes on later, and loses nothing. What it had stored waits
        in a file; where the disk has no room, it is computed again."""
        if isinstance(state := task.state, Running):
            self.preemptions += any(cache.length(0) for cache in state.caches)
            preempted = Preempted.save(state, self._folder)
            if preempted is None:
                task.forget_computed()
            task.state = state = Ready(state.prompt, preempted)
        assert isinstance(state, Ready)
        state.blocked = self.ended

    def fail(self, task: Task, error: BaseException) -> None:
        """Ends a task with an error."""
        task.emit(Failed(error))
        self.end(task)

    def end(self, task: Task) -> None:
        """Releases everything that a task holds."""
        task.state.release()
        task.state = Closed()
        self.ended += 1
        if task in self.tasks:
            self.tasks.remove(task)
        if not self.tasks:
            self.scratch.release(least=False)
        self._notify()


def _cache_namespace(request: GenerationRequest) -> bytes:
    """Separates the prefixes of one owner from another's, and one way to compute from another."""
    adapter = "" if request.adapter is None else request.adapter.fingerprint
    return request.salt + b"\0" + f"{request.attention} {request.select} {adapter}".encode()
