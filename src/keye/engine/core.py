"""The engine: takes requests, computes them together step by step, tells events. Whoever calls `step` is its thread.

Nothing here waits for media: they are opened in threads, decoded in processes, and encoded as they come. A request that
ends in any way, at any stage, holds nothing afterwards; what others can use again stays in the caches of prefixes and
of visual tokens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TypeVar

import torch

from keye.config import GenerationConfig
from keye.engine.kvcache import KVCache
from keye.engine.kvstore import KVStore
from keye.engine.ledger import Ledger, OutOfMemory, megabytes
from keye.engine.prefix import PrefixCache, Spans, cut_points
from keye.engine.prompt import Prompt, PromptBuilder, Room
from keye.engine.replies import Writer
from keye.engine.request import Event, Failed, Inbox, Progress, Request, Stage, Task
from keye.engine.runner import Slice, Wanted, run, scratch_bytes
from keye.engine.scheduler import LEAST_TOKENS, Pace, plan_step
from keye.engine.turns import FairLock
from keye.engine.videoindex import check_attention_of
from keye.engine.vision import VisionJob
from keye.engine.vision_cache import VisionCache
from keye.errors import KeyeError, Option
from keye.models.attention import AttentionMode
from keye.models.keye import KeyeModel
from keye.tokenizer import Tokenizer

T = TypeVar("T")

#: Prompt tokens at once where logits of all of them are wanted, and in deterministic requests.
PROBED_TOKENS, FIXED_TOKENS = 128, 256
#: Requests whose media are opened at the same time.
PREPARING = 4


@dataclass(frozen=True)
class Parts:
    """What the engine works with; one model and what belongs to it."""

    model: KeyeModel
    tokenizer: Tokenizer
    generation: GenerationConfig
    builder: PromptBuilder
    store: KVStore
    ledger: Ledger
    vision_cache: VisionCache
    prefixes: PrefixCache


class EngineCore:
    """Requests on one model. `add` and `abort` may be called from any thread; `step` from one at a time."""

    def __init__(self, parts: Parts, *, most_running: int = 64) -> None:
        self.parts, self.most_running = parts, most_running
        self.writer = Writer(parts.model.config, parts.tokenizer, parts.generation)
        self.pace = Pace()
        self.tasks: list[Task] = []
        self.wake = threading.Condition()
        self.stepping = FairLock()
        self._numbers = count()
        self._threads = ThreadPoolExecutor(PREPARING, "keye-media")
        self._preparing: dict[int, Future[Prompt]] = {}
        self.computed = {"prompt": 0, "reply": 0}
        self.preemptions = 0

    def add(self, request: Request, mode: AttentionMode, tell: Callable[[Event], None]) -> Task:
        """Takes a request; `tell` is called with its events, the last being `Finished` or `Failed`."""
        with self.wake:
            task = Task(next(self._numbers), request, mode, tell, time.perf_counter())
            self.tasks.append(task)
            self.wake.notify_all()
        return task

    def abort(self, task: Task) -> None:
        """Gives up a request; it holds nothing after the step that is running, and tells nothing more."""
        with self.wake:
            task.aborted = True
            self.wake.notify_all()
        self._tidy()

    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.tasks

    def run_until(self, inbox: Inbox) -> None:
        """Steps until there is an event to read."""
        while not inbox.events:
            if not self.step() and not inbox.events:
                self.rest()

    def rest(self) -> None:
        """Waits a moment: for frames that are being decoded, a prompt being laid out, or a new request."""
        with self.wake:
            self.wake.wait(0.003)

    def step(self) -> bool:
        """One step: media, prompts, replies. Returns whether anything was computed."""
        with self.stepping:
            self._sweep()
            self._prepare()
            self._admit()
            begin = time.perf_counter()
            encoded = self._encode()
            computed = self._compute(time.perf_counter() - begin)
        self._tidy()
        return computed or encoded

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Entered around a piece of work on the model that is no step: it waits for the step that is running, and the
        next one for it."""
        with self.stepping:
            yield
        self._tidy()

    def fail_all(self, error: BaseException) -> None:
        """Ends every request with an error that is nobody's own."""
        with self.stepping:
            for task in list(self.tasks):
                self._fail(task, error)

    def _tidy(self) -> None:
        """Ends what was aborted, unless somebody steps, who will do it afterwards. Never waits: an iterator that is let
        go may abort in the middle of a step of the same thread."""
        while any(task.aborted for task in list(self.tasks)) and self.stepping.acquire(blocking=False):
            try:
                self._sweep()
            finally:
                self.stepping.release()

    # ---------------------------------------------------------------------------------------------------- coming in

    def _sweep(self) -> None:
        """Ends what was aborted or has run out of time."""
        now = time.perf_counter()
        for task in list(self.tasks):
            if task.aborted:
                self._end(task)
            elif task.request.seconds is not None and now - task.created > task.request.seconds:
                self._fail(
                    task, KeyeError(f"the request took longer than {task.request.seconds:g} s, and was given up")
                )

    def _prepare(self) -> None:
        """Opens the media of new requests in threads; takes those that are laid out."""
        for task in list(self.tasks):
            if task.stage is Stage.WAITING and len(self._preparing) < 2 * PREPARING:
                task.stage = Stage.PREPARING
                if isinstance(task.request.prompt, Prompt):
                    self._laid_out(task, task.request.prompt)
                else:
                    task.tell(Progress("decode", 0, 1))
                    self._preparing[task.number] = self._threads.submit(self._lay_out, task)
            elif task.stage is Stage.PREPARING and self._preparing[task.number].done():
                self._take_prompt(task)

    def _lay_out(self, task: Task) -> Prompt:
        """In a thread: the prompt with its media probed, and their pixels on the way."""
        request = task.request
        assert not isinstance(request.prompt, Prompt)
        room = Room(self.parts.model.config.text.max_position_embeddings, request.params.max_tokens)
        try:
            prompt = self.parts.builder.lay_out(request.prompt, room=room, stream=True)
        finally:
            with self.wake:
                self.wake.notify_all()
        if prompt.indexed is not None:
            check_attention_of(prompt.indexed, task.mode)
        return prompt

    def _take_prompt(self, task: Task) -> None:
        future = self._preparing.pop(task.number)
        if (error := future.exception()) is not None:
            self._fail(task, error)
        else:
            self._laid_out(task, future.result())

    def _laid_out(self, task: Task, prompt: Prompt) -> None:
        task.prompt, task.stage = prompt, Stage.READY
        task.times["laid out"] = time.perf_counter()
        store = prompt.past.store if prompt.past is not None else self.parts.store
        assert store is not None
        budget, tokens = self.parts.ledger.budget, prompt.token_ids.shape[0] + 1
        new = tokens - (0 if prompt.past is None else prompt.past.length(0))
        if budget is None:
            return
        budget -= scratch_bytes(self.parts.model.config.text, LEAST_TOKENS, 1, self.parts.model.dtype.itemsize)
        if (need := store.slabs_for(new) * store.slab_bytes) > budget:
            most = max(0, budget) // store.slab_bytes * store.slab_bytes // store.layout.token_bytes
            self._fail(task, OutOfMemory(
                "the prompt of {} tokens takes {} of keys and values, but the memory budget leaves {}, enough for {} "
                "tokens; sample fewer or smaller frames ({}, {}), store fewer bits ({}), or raise the budget",
                f"{tokens - 1:,}", megabytes(need), megabytes(max(0, budget)), f"{most:,}",
                Option("max_frames"), Option("max_pixels"), Option("kv", "int4"),
            ))  # fmt: skip

    def _admit(self) -> None:
        """Starts prompts, the oldest first, as long as few enough are running."""
        running = sum(task.stage in (Stage.PREFILLING, Stage.DECODING) for task in self.tasks)
        for task in self.tasks:
            if task.stage is Stage.READY and running < self.most_running:
                self._start(task)
                running += 1

    def _start(self, task: Task) -> None:
        """Finds what of the prompt is known; the rest will be computed."""
        prompt, parts = task.prompt, self.parts
        assert prompt is not None
        task.stage = Stage.PREFILLING
        spans = None if task.request.deterministic else Spans.of(prompt, parts.model.config)
        found: KVCache | None = None
        if prompt.past is not None:
            found = self._make_room(prompt.past.fork, task)
        elif spans is not None and not task.request.prompt_logprobs:
            found = self._make_room(partial(parts.prefixes.find, prompt.token_ids, spans, _secret(task)), task)
        if task.stage is not Stage.PREFILLING:
            return
        task.cache = found or KVCache(parts.model.config.text.num_hidden_layers, parts.store)
        # Room for the whole prompt before any work: what cannot be stored is refused, and not begun.
        if not self._make_room(partial(_reserved, task.cache, task.length + 1), task):
            return
        task.done = task.cache.length(0)
        task.cached = max(task.cached, task.done)
        first = 0
        if prompt.past is None and task.done and spans is not None:
            first = spans.visual_before(task.done, prompt)
        try:
            task.vision = VisionJob(parts.model, prompt, first=first, cache=parts.vision_cache, ledger=parts.ledger)
        except (KeyeError, OSError) as error:  # a file that has vanished since it was probed
            self._fail(task, error)
            return
        ids, config = prompt.token_ids, parts.model.config
        task.visual = ((ids == config.image_token_id) | (ids == config.video_token_id)).cumsum(0)
        if prompt.past is not None:
            task.visual = task.visual - int(task.visual[task.done - 1])

    # ---------------------------------------------------------------------------------------------------- computing

    def _encode(self) -> bool:
        """Encodes patches of the oldest prompt that has decoded ones."""
        writing = sum(task.stage is Stage.DECODING for task in self.tasks)
        for task in list(self.tasks):
            job = task.vision
            if task.stage is not Stage.PREFILLING or job is None or job.done or job.waiting:
                continue
            begin = time.perf_counter()
            try:
                patches = job.step(self.pace.patches(writing))
            except (KeyeError, OSError, RuntimeError, MemoryError) as error:
                self._fail(task, error)
                return True
            if patches:
                self.pace.saw_patches(time.perf_counter() - begin, patches)
                task.tell(Progress("encode", job.ready, job.total))
                self._rotate(task)
                return True
        return False

    def _rotate(self, task: Task) -> None:
        """Lets others encode before this one does again: their order is that of the list."""
        with self.wake:
            self.tasks.remove(task)
            self.tasks.append(task)

    def _compute(self, spent: float) -> bool:
        """One pass over every reply and shares of the prompts; `spent` seconds of the step are gone."""
        begin = time.perf_counter()
        writing = [task for task in self.tasks if task.stage is Stage.DECODING]
        replies = sum(len(task.live) for task in writing)
        open_prompts = sorted((t for t in self.tasks if t.stage is Stage.PREFILLING), key=lambda t: t.created)
        waiting = [(task.number, n) for task in open_prompts if (n := self._computable(task))]
        plan = plan_step(replies, waiting, self._affordable(self.pace.budget(replies, spent)))
        slices: list[tuple[Task, Slice]] = []
        for task in [*writing, *open_prompts]:
            if task.stage is Stage.DECODING:
                slices += self._reply_slices(task)
            elif task.stage is Stage.PREFILLING and task.number in plan.prefill:
                slices += self._prompt_slice(task, plan.prefill[task.number])
        # Making room for one may have taken it from another.
        slices = [(task, one) for task, one in slices if one.cache.blocks]
        if not slices:
            return False
        scratch = self._scratch([one for _, one in slices])
        if not self._make_room(partial(_taken, self.parts.ledger, scratch), slices[0][0]):
            return False
        slices = [(task, one) for task, one in slices if one.cache.blocks]
        try:
            computed = run(self.parts.model, [one for _, one in slices])
        except (RuntimeError, MemoryError) as error:  # what torch raises when a device fails or is full
            for task in {task.number: task for task, _ in slices}.values():
                self._fail(task, error)
            return True
        finally:
            self.parts.ledger.release("scratch", scratch)
        for (task, one), logits in zip(slices, computed, strict=True):
            if not one.cache.blocks:  # preempted meanwhile, for the choices of another: it will be computed again
                continue
            if task.stage is Stage.PREFILLING:
                self._prompt_computed(task, one, logits)
            else:
                choice = next(c for c in task.live if c.cache is one.cache)
                assert logits is not None
                choice.logits, choice.position = logits[-1], choice.position + len(choice.pending)
                choice.pending = []
        prompt = sum(plan.prefill.values())
        self.computed["prompt"] += prompt
        self.computed["reply"] += replies
        self._write()
        self.pace.saw_step(time.perf_counter() - begin, replies, prompt)
        return True

    def _affordable(self, tokens: int) -> int:
        """Prompt tokens of a step for which there is scratch: fewer where memory is short, but some in any case."""
        free, model = self.parts.ledger.free(), self.parts.model
        while free is not None and tokens > LEAST_TOKENS:
            if scratch_bytes(model.config.text, tokens, 1, model.dtype.itemsize) <= free:
                break
            tokens = max(LEAST_TOKENS, tokens // 2)
        return tokens

    def _scratch(self, slices: Sequence[Slice]) -> int:
        """Bytes that a pass over the slices may take."""
        model, rows = self.parts.model, [one.token_ids.shape[0] for one in slices]
        wanted = sum(n if one.wanted == "all" else one.wanted == "last" for n, one in zip(rows, slices, strict=True))
        return scratch_bytes(model.config.text, sum(rows), wanted, model.dtype.itemsize)

    def _computable(self, task: Task) -> int:
        """Tokens of a prompt that can be computed now: those before the first visual token that is not ready."""
        assert task.vision is not None and task.visual is not None
        stop, request = task.length, task.request
        if request.evidence and task.done < stop - 1:
            stop -= 1  # the last token goes alone: it produces the first of the reply
        if request.prompt_logprobs:
            stop = min(stop, task.done + PROBED_TOKENS)
        if request.deterministic:
            stop = min(stop, task.done + FIXED_TOKENS)
        ready = stop
        if not task.vision.done:
            ready = min(stop, int(torch.searchsorted(task.visual, task.vision.ready, right=True)))
        if request.deterministic and ready < stop:
            return 0  # its slices are always cut at the same places
        return max(0, ready - task.done)

    def _prompt_slice(self, task: Task, share: int) -> list[tuple[Task, Slice]]:
        prompt, cache = task.prompt, task.cache
        assert prompt is not None and cache is not None and task.vision is not None and task.visual is not None
        n = self._computable(task)
        n = n if task.request.deterministic else min(share, n)
        stop = task.done + n
        if not self._make_room(partial(_reserved, cache, stop), task):
            return []
        before = int(task.visual[task.done - 1]) if task.done else 0
        after = int(task.visual[stop - 1])
        ids = prompt.token_ids[task.done : stop]
        last = stop == task.length
        wanted: Wanted = "all" if task.request.prompt_logprobs else "last" if last else "none"
        counts = self.writer.counts(task) if last and task.request.evidence else None
        return [(task, Slice(
            cache, ids, prompt.position_ids[:, task.done : stop],
            task.vision.tokens(before, after) if after > before else None,
            wanted, task.mode, counts, task.request.deterministic,
        ))]  # fmt: skip

    def _prompt_computed(self, task: Task, one: Slice, logits: torch.Tensor | None) -> None:
        assert task.cache is not None and task.vision is not None and task.visual is not None
        task.done = task.cache.length(0)
        task.vision.forget(int(task.visual[task.done - 1]))
        task.tell(Progress("prefill", task.done, task.length))
        if task.request.prompt_logprobs and logits is not None:
            self.writer.probe(task, logits)
        if task.done < task.length:
            return
        assert logits is not None
        task.vision.close()
        task.vision = None
        self._remember(task, task.cache, task.length)
        task.times.setdefault("prefilled", time.perf_counter())
        task.stage = Stage.DECODING
        if not task.choices:
            task.choices = self.writer.choices(task)
        self._fork_choices(task, logits[-1])

    def _fork_choices(self, task: Task, logits: torch.Tensor) -> None:
        """Every choice goes on from the prompt; the last one takes it over. What a preempted one had written comes
        again as tokens to compute."""
        assert task.cache is not None and task.prompt is not None
        trunk, live = task.cache, task.live
        for choice in live[:-1]:
            choice.cache = self._make_room(trunk.fork, task)
            if choice.cache is None:
                return
        live[-1].cache, task.cache = trunk, None
        for choice in live:
            choice.position = task.prompt.next_position
            choice.pending, choice.logits = list(choice.reply), None if choice.reply else logits

    def _reply_slices(self, task: Task) -> list[tuple[Task, Slice]]:
        found = []
        for choice in task.live:
            cache, n = choice.cache, len(choice.pending)
            if not n:
                continue
            assert cache is not None
            if not self._make_room(partial(_reserved, cache, cache.length(0) + n), task):
                return []
            places = torch.arange(choice.position, choice.position + n).expand(3, -1)
            counts = self.writer.counts(task) if task.request.evidence and choice.index == 0 else None
            found.append((task, Slice(
                cache, torch.tensor(choice.pending), places, None, "last", task.mode, counts,
                task.request.deterministic,
            )))  # fmt: skip
        return found

    def _write(self) -> None:
        """Draws the next token of every choice that has logits, and ends what is complete."""
        writing = [task for task in self.tasks if task.stage is Stage.DECODING]
        for task, error in self.writer.write(writing):
            self._fail(task, error)
        for task in writing:
            if task.stage is not Stage.DECODING:
                continue
            for choice in task.choices:
                if choice.reason is not None and choice.cache is not None:
                    choice.cache.free()
                    choice.cache = None
            if not task.live:
                task.tell(self.writer.finished(task))
                self._end(task)

    # ---------------------------------------------------------------------------------------------------- room

    def _make_room(self, take: Callable[[], T], task: Task) -> T | None:
        """What `take` gives. Where the store is full, caches are given back, then others preempted, the newest first; a
        task that cannot even run alone fails. None when `task` itself had to go."""
        while True:
            try:
                return take()
            except OutOfMemory as error:
                if self.parts.prefixes.give_back() or self.parts.vision_cache.give_back(1 << 20):
                    continue
                others = [t for t in self.tasks if t is not task and t.stage in (Stage.PREFILLING, Stage.DECODING)]
                younger = [t for t in others if t.created > task.created]
                if younger:
                    self._preempt(max(younger, key=lambda t: t.created))
                elif others:
                    self._preempt(task)
                    return None
                else:
                    self._fail(task, error)
                    return None

    def _preempt(self, task: Task) -> None:
        """Takes the blocks of a task; it will compute its prompt and what it wrote again, and loses nothing."""
        self._release(task)
        task.stage, task.done = Stage.READY, 0
        self.preemptions += 1
        for choice in task.live:
            choice.pending, choice.logits = [], None

    def _remember(self, task: Task, cache: KVCache, length: int) -> None:
        """Keeps the prompt for whoever begins with it."""
        assert task.prompt is not None
        if task.request.deterministic or task.prompt.past is not None:
            return
        spans = Spans.of(task.prompt, self.parts.model.config)
        if spans is None:
            return
        points = [n for n in cut_points(length, spans) if n > task.cached]
        try:
            self.parts.prefixes.keep(task.prompt.token_ids, spans, _secret(task), cache, points)
        except OutOfMemory:
            return  # there is no room to keep it

    def _fail(self, task: Task, error: BaseException) -> None:
        task.tell(Failed(error))
        self._end(task)

    def _end(self, task: Task) -> None:
        self._release(task)
        if (future := self._preparing.pop(task.number, None)) is not None:
            future.cancel()  # one that runs ends by itself: what it lays out holds no worker yet
        task.stage = Stage.ENDED
        with self.wake:
            if task in self.tasks:
                self.tasks.remove(task)
            self.wake.notify_all()

    def _release(self, task: Task) -> None:
        """Gives back all that a task holds."""
        if task.vision is not None:
            task.vision.close()
            task.vision = None
        for cache in (task.cache, *(choice.cache for choice in task.choices)):
            if cache is not None:
                cache.free()
        task.cache = None
        for choice in task.choices:
            choice.cache = None


def _reserved(cache: KVCache, tokens: int) -> bool:
    cache.reserve(tokens)
    return True


def _taken(ledger: Ledger, nbytes: int) -> bool:
    ledger.reserve("scratch", nbytes)
    return True


def _secret(task: Task) -> bytes:
    """What parts one owner's prefixes from another's, and one way to compute from another."""
    return task.request.salt + b"\0" + task.mode.encode()
