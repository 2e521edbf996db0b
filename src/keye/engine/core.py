"""The engine: takes requests, computes them together step by step, tells events. Whoever calls `step` is its thread.

Nothing here waits for media: they are opened in threads, decoded in processes, and encoded as they come. A request that
ends in any way, at any stage, holds nothing afterwards; what others can use again stays in the caches of prefixes and
of visual tokens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TypeVar

import torch

from keye.config import GenerationConfig
from keye.engine.admission import clamped, refusal, scattered
from keye.engine.kvcache import KVCache
from keye.engine.kvstore import KVStore
from keye.engine.ledger import Ledger, OutOfMemory
from keye.engine.prefix import PrefixCache, Spans, cut_points
from keye.engine.preparation import Preparation
from keye.engine.prompt import Prompt, PromptBuilder
from keye.engine.replies import Writer
from keye.engine.request import Event, Failed, Inbox, Progress, Request, Stage, Task
from keye.engine.runner import Slice, run, scratch_bytes, smallest_scratch
from keye.engine.scheduler import LEAST_TOKENS, Pace, share_out
from keye.engine.slices import computable, prompt_slice, reply_slice
from keye.engine.turns import FairLock
from keye.engine.vision import VisionJob, being_encoded
from keye.engine.vision_cache import VisionCache
from keye.errors import KeyeError
from keye.models.attention import AttentionMode
from keye.models.keye import KeyeModel
from keye.tokenizer import Tokenizer

T = TypeVar("T")

#: Tokens of a reply at once that are computed again after a preemption.
AGAIN_TOKENS = 256


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
        self.preparation = Preparation(parts.builder, parts.model.config.text.max_position_embeddings, self.wake)
        self.computed = {"prompt": 0, "reply": 0}
        self.preemptions = 0
        self._encoded = False
        #: Scratch of the smallest step, in the ledger as long as anything runs: keys and values never take its place.
        self._scratch, self._holding = smallest_scratch(parts.model), False
        #: Requests that have ended: one that found no room looks again when this has grown.
        self.ended = 0

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
            writing = any(task.stage is Stage.DECODING for task in self.tasks)
            # Beside those who write, a step either encodes or computes prompts, in turn: both would take too long.
            encoded = self._encoded = not (writing and self._encoded) and self._encode()
            computed = self._compute(prompts=not (writing and encoded))
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
        """Has the media of new requests opened; takes those that are laid out."""
        for task in self.preparation.begin(list(self.tasks)):
            if isinstance(given := task.request.prompt, Prompt):
                self._laid_out(task, given)
        for task, done in self.preparation.ready(list(self.tasks)):
            if (error := done.exception()) is not None:  # whatever it is, it is that of this request
                self._fail(task, error)
            else:
                self._laid_out(task, done.result())

    def _laid_out(self, task: Task, prompt: Prompt) -> None:
        task.prompt, task.stage = prompt, Stage.READY
        task.request, notes = clamped(task.request, task.length, self.parts.model.config.text.max_position_embeddings)
        task.notes += notes
        task.times["laid out"] = time.perf_counter()
        store = prompt.past.store if prompt.past is not None else self.parts.store
        assert store is not None
        if (error := refusal(prompt, task.request, store, self._scratch)) is not None:
            self._fail(task, error)

    def _admit(self) -> None:
        """Starts prompts, the oldest first, as long as few enough are running."""
        running = sum(task.stage in (Stage.PREFILLING, Stage.DECODING) for task in self.tasks)
        for task in list(self.tasks):
            if running and task.waits_since == self.ended:
                continue  # nothing has changed since it found no room
            if task.stage is Stage.READY and running < self.most_running:
                assert task.prompt is not None
                jobs = (other.vision for other in self.tasks if other.stage is Stage.PREFILLING)
                if being_encoded(task.prompt.media, jobs):
                    continue  # another reads the same video just now: it will be in the cache in a moment
                self._start(task)
                running += 1

    def _start(self, task: Task) -> None:
        """Finds what of the prompt is known; the rest will be computed."""
        prompt, parts = task.prompt, self.parts
        assert prompt is not None
        task.stage = Stage.PREFILLING
        if not self._holding:
            if not self._make_room(partial(_taken, parts.ledger, self._scratch), task):
                return
            self._holding = True
        spans = None if task.request.deterministic else Spans.of(prompt, parts.model.config)
        found: KVCache | None = None
        if prompt.past is not None:
            found = self._make_room(prompt.past.fork, task)
        elif spans is not None and task.request.prompt_logprobs is None:
            found = self._make_room(partial(parts.prefixes.find, prompt.token_ids, spans, _secret(task)), task)
        if task.stage is not Stage.PREFILLING:
            return
        task.cache = found or KVCache(parts.model.config.text.num_hidden_layers, parts.store)
        # Room for the whole prompt before any work: what cannot be stored is refused, and not begun.
        if not self._make_room(partial(_reserved, task.cache, task.length + 1), task):
            return
        task.done = task.cache.length(0)
        if "started" not in task.times:  # after a preemption what is known is its own
            task.times["started"], task.cached = time.perf_counter(), task.done
        first = 0
        if prompt.past is None and task.done and spans is not None:
            first = spans.visual_before(task.done, prompt)
        try:
            task.vision = VisionJob(parts.model, prompt, first=first, cache=parts.vision_cache, ledger=parts.ledger)
        except (KeyeError, OSError, RuntimeError) as error:  # the file is gone, or no decode worker could be started
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
                patches = self._encode_some(task, job, self.pace.patches(writing))
            except Exception as error:  # noqa: BLE001 - whatever went wrong in a decoder is told to who gave the file
                self._fail(task, error)
                return True
            if patches:
                self.pace.saw_patches(time.perf_counter() - begin, patches)
                task.tell(Progress("encode", job.ready, job.total))
                self._rotate(task)
                return True
        return False

    def _encode_some(self, task: Task, job: VisionJob, patches: int) -> int:
        """Patches encoded; 0 where the memory is full and what is ready has to be computed first."""
        try:
            return job.step(patches)
        except OutOfMemory:
            if computable(task):
                return 0
        return self._make_room(partial(job.step, patches), task) or 0

    def _rotate(self, task: Task) -> None:
        """Lets others encode before this one does again: their order is that of the list."""
        with self.wake:
            self.tasks.remove(task)
            self.tasks.append(task)

    def _compute(self, *, prompts: bool) -> bool:
        """One pass over every reply and, with `prompts`, shares of the prompts."""
        begin = time.perf_counter()
        writing = [task for task in self.tasks if task.stage is Stage.DECODING]
        replies = sum(len(task.live) for task in writing)
        open_prompts = sorted((t for t in self.tasks if t.stage is Stage.PREFILLING), key=lambda t: t.created)
        waiting = [(task.number, n) for task in open_prompts if (n := computable(task))]
        shares = share_out(waiting, self._affordable(self.pace.budget(replies, len(waiting))) if prompts else 0)
        slices: list[tuple[Task, Slice]] = []
        for task in [*writing, *open_prompts]:
            if task.stage is Stage.DECODING:
                slices += self._reply_slices(task)
            elif task.stage is Stage.PREFILLING and task.number in shares:
                slices += self._prompt_slice(task, shares[task.number])
        # Making room for one may have taken it from another.
        slices = [(task, one) for task, one in slices if one.cache.blocks]
        if not slices:
            return False
        more = self._scratch_beyond([one for _, one in slices])
        if not self._make_room(partial(_taken, self.parts.ledger, more), slices[0][0]):
            return False
        slices = [(task, one) for task, one in slices if one.cache.blocks]
        try:
            computed = run(self.parts.model, [one for _, one in slices])
        except (RuntimeError, MemoryError) as error:  # what torch raises when a device fails or is full
            for task in {task.number: task for task, _ in slices}.values():
                self._fail(task, error)
            return True
        finally:
            self.parts.ledger.release("scratch", more)
        prompt = sum(one.token_ids.shape[0] for task, one in slices if task.stage is Stage.PREFILLING)
        for (task, one), logits in zip(slices, computed, strict=True):
            if not one.cache.blocks:
                continue  # the choices of another took its room just now
            if task.stage is Stage.PREFILLING:
                self._prompt_computed(task, one, logits)
            else:
                self._reply_computed(task, one, logits)
        self.computed["prompt"] += prompt
        self.computed["reply"] += replies
        self._write()
        self.pace.saw_step(time.perf_counter() - begin, replies, prompt)
        return True

    def _affordable(self, tokens: int) -> int:
        """Prompt tokens of a step for which there is scratch: fewer where memory is short, but some in any case."""
        free, model = self.parts.ledger.free(), self.parts.model
        while free is not None and tokens > LEAST_TOKENS:
            if scratch_bytes(model.config.text, tokens, 1, model.dtype.itemsize) <= free + self._scratch:
                break
            tokens = max(LEAST_TOKENS, tokens // 2)
        return tokens

    def _scratch_beyond(self, slices: Sequence[Slice]) -> int:
        """Bytes that a pass over the slices may take beyond those of the smallest step, which are held."""
        model, rows = self.parts.model, [one.token_ids.shape[0] for one in slices]
        wanted = sum(n if one.wanted == "all" else one.wanted == "last" for n, one in zip(rows, slices, strict=True))
        return max(0, scratch_bytes(model.config.text, sum(rows), wanted, model.dtype.itemsize) - self._scratch)

    def _prompt_slice(self, task: Task, share: int) -> list[tuple[Task, Slice]]:
        assert task.cache is not None
        n = computable(task)
        stop = task.done + (n if task.request.deterministic else min(share, n))
        if not self._make_room(partial(_reserved, task.cache, stop), task):
            return []
        last = stop == task.length
        counts = self.writer.counts(task, stop, 1) if last and task.request.evidence else None
        return [(task, prompt_slice(task, stop, counts))]

    def _prompt_computed(self, task: Task, one: Slice, logits: torch.Tensor | None) -> None:
        assert task.cache is not None and task.vision is not None and task.visual is not None
        task.done = task.cache.length(0)
        task.vision.forget(int(task.visual[task.done - 1]))
        task.tell(Progress("prefill", task.done, task.length))
        if task.request.prompt_logprobs is not None and logits is not None:
            self.writer.probe(task, logits)
        if task.done < task.length:
            return
        assert logits is not None
        task.vision.close()
        task.vision = None
        self._remember(task, task.cache, task.length)
        if "prefilled" not in task.times:  # after a preemption the prompt is computed again
            task.times["prefilled"] = time.perf_counter()
            task.tell(self.writer.prefilled(task))
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

    @staticmethod
    def _reply_computed(task: Task, one: Slice, logits: torch.Tensor | None) -> None:
        choice = next(c for c in task.live if c.cache is one.cache)
        assert logits is not None
        n = one.token_ids.shape[0]
        choice.position, choice.pending = choice.position + n, choice.pending[n:]
        choice.logits = None if choice.pending else logits[-1]

    def _reply_slices(self, task: Task) -> list[tuple[Task, Slice]]:
        found = []
        most = 1 if task.request.deterministic else AGAIN_TOKENS
        for choice in task.live:
            cache, n = choice.cache, min(most, len(choice.pending))
            if not n:
                continue
            assert cache is not None
            if not self._make_room(partial(_reserved, cache, cache.length(0) + n), task):
                return []
            counted = task.request.evidence and choice.index == 0
            counts = self.writer.counts(task, cache.length(0) + n, n) if counted else None
            found.append((task, reply_slice(task, choice, n, counts)))
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
        task that cannot even run alone fails, one in pieces after it began anew. None when `task` itself had to go."""
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
                elif others or (not task.retried and scattered(task)):
                    task.retried = not others
                    self._preempt(task)
                    task.waits_since = self.ended
                    return None
                else:
                    self._fail(task, error)
                    return None

    def _preempt(self, task: Task) -> None:
        """Takes the blocks of a task; it will compute its prompt and what it wrote again, and loses nothing."""
        self._release(task)
        task.stage, task.done = Stage.READY, 0
        task.prompt_probs, task.counts, task.counted = [], None, 0  # they come again with the tokens
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
        try:
            self.parts.prefixes.keep(
                task.prompt.token_ids, spans, _secret(task), cache, cut_points(length, spans)
            )  # fmt: skip
        except OutOfMemory:
            return  # there is no room to keep it

    def _fail(self, task: Task, error: BaseException) -> None:
        task.tell(Failed(error))
        self._end(task)

    def _end(self, task: Task) -> None:
        self._release(task)
        self.preparation.drop(task)
        task.stage = Stage.ENDED
        self.ended += 1
        with self.wake:
            if task in self.tasks:
                self.tasks.remove(task)
            self.wake.notify_all()
        if self._holding and not self.tasks:
            self._holding = False
            self.parts.ledger.release("scratch", self._scratch)

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
