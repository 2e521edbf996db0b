"""The engine: takes requests, computes them together step by step, tells events. Whoever calls `step` is its thread.

Nothing here waits for media: they are opened in threads, decoded in processes, and encoded as they come. A request that
ends in any way, at any stage, holds nothing afterwards; what others can use again stays in the caches of prefixes and
of visual tokens.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import TypeVar

import torch

from keye.cache.ledger import OutOfMemory
from keye.cache.sequence import KVCache
from keye.engine.admission import clamped, refusal, scattered
from keye.engine.media_loader import Preparation
from keye.engine.past import find_past, remember
from keye.engine.preempt import release, restore, save
from keye.engine.prompt import Prompt
from keye.engine.request import Event, Failed, Inbox, Progress, Request, Stage, Task
from keye.engine.runtime import Runtime
from keye.engine.scheduler import Pace, share_out
from keye.engine.scratch import ACCOUNT as SCRATCH
from keye.engine.scratch import Scratch
from keye.engine.slices import computable, least_rows, prompt_slice, reply_slice
from keye.engine.step import Slice, run
from keye.engine.turns import FairLock
from keye.engine.vision import VisionJob, being_encoded
from keye.engine.writer import Writer
from keye.errors import KeyeError

T = TypeVar("T")


class EngineCore:
    """Requests on one model. `add` and `abort` may be called from any thread; `step` from one at a time."""

    def __init__(self, runtime: Runtime, *, most_running: int = 64) -> None:
        self.runtime, self.most_running = runtime, most_running
        self.writer = Writer(runtime.config, runtime.tokenizer, runtime.generation)
        self.pace = Pace()
        self.tasks: list[Task] = []
        self.wake = threading.Condition()
        self.stepping = FairLock()
        self._numbers = count()
        self.preparation = Preparation(runtime.prompts, runtime.config.text.max_position_embeddings, self.wake)
        self.computed = {"prompt": 0, "reply": 0}
        self.preemptions = self._turns = 0
        self._encoded = False
        self.scratch = Scratch(runtime.model, runtime.ledger)
        self._folder = runtime.kv.folder or Path(tempfile.gettempdir())  # of preempted requests
        #: Requests that have ended: one that found no room looks again when this has grown.
        self.ended = 0

    def add(self, request: Request, tell: Callable[[Event], None]) -> Task:
        """Takes a request; `tell` is called with its events, the last being `Finished` or `Failed`."""
        with self.wake:
            task = Task(next(self._numbers), request, tell, time.perf_counter())
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
        task.request, notes = clamped(task.request, task.length, self.runtime.config.text.max_position_embeddings)
        task.notes += notes
        task.times["laid out"] = time.perf_counter()
        store = prompt.past.store if prompt.past is not None else self.runtime.store
        assert store is not None
        if (error := refusal(prompt, task.request, store, self.scratch.least(*least_rows(task.request)))) is not None:
            self._fail(task, error)

    def _admit(self) -> None:
        """Starts prompts, the oldest first, as long as few enough are running."""
        running = sum(task.stage in (Stage.PREFILLING, Stage.DECODING) for task in self.tasks)
        for task in sorted(self.tasks, key=lambda task: task.created):
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
        """Finds what of the prompt is known, or what the task had before it was preempted; the rest is computed."""
        task.stage = Stage.PREFILLING
        if self._make_room(self.scratch.hold, task) is None:
            return
        if task.saved is not None:
            if self._make_room(partial(restore, task), task) is None:
                return
            if task.live and task.cache is None:  # it had begun to write
                task.stage = Stage.DECODING
                return
        else:
            prefixes, store = self.runtime.prefixes, self.runtime.store
            task.cache = self._make_room(partial(find_past, task, prefixes, store, self.runtime.config), task)
        if task.cache is None:
            return
        # Room for the whole prompt before any work: what cannot be stored is refused, and not begun.
        if self._make_room(partial(_reserved, task.cache, task.length + 1), task) is None:
            return
        task.done = task.cache.length(0)
        if "started" not in task.times:  # after a preemption what is known is its own
            task.times["started"], task.cached = time.perf_counter(), task.done
        if task.logits is not None:
            self._complete_prompt(task)
            return
        self._begin_prompt(task)

    def _begin_prompt(self, task: Task) -> None:
        """Opens the media of which something is not computed yet."""
        prompt, runtime = task.prompt, self.runtime
        assert prompt is not None
        task.visual = prompt.visual_counts
        first = int(task.visual[task.done - 1]) if task.done else 0
        try:
            task.vision = VisionJob(
                runtime.model, prompt.media, first=first, cache=runtime.vision_cache, ledger=runtime.ledger
            )
        except (KeyeError, OSError, RuntimeError) as error:  # the file is gone, or no decode worker could be started
            self._fail(task, error)
            return
        task.vision.forget(first)
        task.vision.give_notes(task.notes)

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
            job.give_notes(task.notes)
            if patches:
                self.pace.saw_patches(time.perf_counter() - begin, patches)
                task.tell(Progress("encode", job.ready, job.total))
                self._rotate(task)
                return True
        return False

    def _encode_some(self, task: Task, job: VisionJob, patches: int) -> int:
        """Patches encoded; 0 where the memory is full and what is ready has to be computed first."""
        step = partial(job.step, patches, required=not computable(task))
        return self._make_room(step, task) or 0

    def _rotate(self, task: Task) -> None:
        """Lets others encode before this one does again: their order is that of the list."""
        with self.wake:
            self.tasks.remove(task)
            self.tasks.append(task)

    def _compute(self, *, prompts: bool) -> bool:
        """One pass over every reply and, with `prompts`, shares of the prompts, as far as there is scratch for them."""
        begin = time.perf_counter()
        slices = self._take_slices(prompts)
        if not slices:
            return self._write()
        more = self._make_room(partial(self.scratch.take, [one for _, one in slices]), slices[0][0])
        if more is None:
            return False
        # Making room for one may have taken it from another.
        slices = [(task, one) for task, one in slices if one.cache.blocks]
        try:
            computed = run(self.runtime.model, [one for _, one in slices])
        except (RuntimeError, MemoryError) as error:  # what torch raises when a device fails or is full
            for task in {task.number: task for task, _ in slices}.values():
                self._fail(task, error)
            return True
        finally:
            self.scratch.give_back(more)
        # All are brought up to date before anything makes room: whoever is preempted is saved as it is.
        for task, one in slices:
            if (damage := one.cache.damage) is not None and task.stage is not Stage.ENDED:
                self._fail(task, damage)
        counts = {"prompt": 0, "reply": 0}
        for (task, one), logits in zip(slices, computed, strict=True):
            if task.stage is Stage.ENDED:
                continue
            kind = "prompt" if task.stage is Stage.PREFILLING else "reply"
            counts[kind] += one.token_ids.shape[0]
            (self._prompt_computed if kind == "prompt" else self._reply_computed)(task, one, logits)
            task.retried = False
        for task in {task.number: task for task, _ in slices}.values():
            if task.stage is Stage.PREFILLING and task.logits is not None:
                self._complete_prompt(task)
        for kind, tokens in counts.items():
            self.computed[kind] += tokens
        self._write()
        self.pace.saw_step(time.perf_counter() - begin, counts["reply"], counts["prompt"])
        return True

    def _take_slices(self, prompts: bool) -> list[tuple[Task, Slice]]:
        """What the next pass computes; there is room for its keys and values. Where there is no scratch for all, those
        who have waited longest come first, and at least one comes."""
        writing = [task for task in self.tasks if task.stage is Stage.DECODING]
        replies = sum(len(task.live) for task in writing)
        open_prompts = sorted((t for t in self.tasks if t.stage is Stage.PREFILLING), key=lambda t: t.created)
        waiting = [(task.number, n) for task in open_prompts if (n := computable(task))]
        budget = self.scratch.affordable(self.pace.budget(replies, len(waiting)), replies) if prompts else 0
        shares = share_out(waiting, budget)
        slices = [found for task in writing for found in self._reply_slices(task)]
        slices.sort(key=lambda found: found[0].turn)
        for task in open_prompts:
            if task.stage is Stage.PREFILLING and task.number in shares:
                slices += self._prompt_slice(task, shares[task.number])
        # Making room for one may have taken it from another.
        slices = [(task, one) for task, one in slices if one.cache.blocks]
        while (fitting := self.scratch.fitting([one for _, one in slices])) < len(slices):
            if not self.runtime.ledger.reclaim(SCRATCH):
                break
        taken = slices[: max(1, fitting)]
        self._turns += 1
        for task, _ in taken:
            task.turn = self._turns
        return taken

    def _prompt_slice(self, task: Task, share: int) -> list[tuple[Task, Slice]]:
        assert task.cache is not None
        n = computable(task)
        if not task.request.deterministic:
            n = min(share, n)
            if task.request.prompt_logprobs is not None:
                n = self.scratch.affordable(n, every=True)
        stop = task.done + n
        if self._make_room(partial(_reserved, task.cache, stop), task) is None:
            return []
        last = stop == task.length
        counts = self.writer.counts(task, stop, 1) if last and task.request.evidence else None
        return [(task, prompt_slice(task, stop, counts))]

    def _prompt_computed(self, task: Task, one: Slice, logits: torch.Tensor | None) -> None:
        assert task.cache is not None and task.vision is not None and task.visual is not None
        task.done = task.cache.length(0)
        task.vision.forget(int(task.visual[task.done - 1]))
        task.tell(Progress("prefill", task.done, task.length, task.cached))
        if task.request.prompt_logprobs is not None and logits is not None:
            self.writer.probe(task, logits)
        if task.done == task.length:
            assert logits is not None
            task.logits = logits[-1]

    def _complete_prompt(self, task: Task) -> None:
        """Keeps the prompt for others, and goes on to the reply."""
        assert task.cache is not None
        if task.vision is not None:
            task.vision.close()
            task.vision = None
        remember(task, self.runtime.prefixes)
        if "prefilled" not in task.times:  # after a preemption the prompt may be computed again
            task.times["prefilled"] = time.perf_counter()
            task.tell(self.writer.prefilled(task))
        self._begin_reply(task)

    def _begin_reply(self, task: Task) -> None:
        """Every choice goes on from the prompt; the last one takes it over. What a preempted one had written, and could
        not be saved, comes again as tokens to compute."""
        assert task.cache is not None and task.prompt is not None
        if not task.choices:
            task.choices = self.writer.choices(task)
        live, trunk = task.live, task.cache
        forks = self._make_room(lambda: [trunk.fork() for _ in live[1:]], task)
        if forks is None:
            return
        for choice, cache in zip(live, [*forks, trunk], strict=True):
            choice.cache, choice.position = cache, task.prompt.next_position
            choice.pending, choice.logits = list(choice.reply), None if choice.reply else task.logits
        task.cache = task.logits = None
        task.stage = Stage.DECODING

    @staticmethod
    def _reply_computed(task: Task, one: Slice, logits: torch.Tensor | None) -> None:
        choice = next(c for c in task.live if c.cache is one.cache)
        assert logits is not None
        n = one.token_ids.shape[0]
        choice.position, choice.pending = choice.position + n, choice.pending[n:]
        choice.logits = None if choice.pending else logits[-1]

    def _reply_slices(self, task: Task) -> list[tuple[Task, Slice]]:
        """One token of each choice: also of those that are computed again, in passes of the same kind as before."""
        found: list[tuple[Task, Slice]] = []
        if task.stage is not Stage.DECODING:
            return found
        for choice in task.live:
            cache = choice.cache
            if not choice.pending:
                continue
            assert cache is not None
            if self._make_room(partial(_reserved, cache, cache.length(0) + 1), task) is None:
                return []
            counted = task.request.evidence and choice.index == 0
            counts = self.writer.counts(task, cache.length(0) + 1, 1) if counted else None
            found.append((task, reply_slice(task, choice, counts)))
        return found

    def _write(self) -> bool:
        """Draws the next token of every choice that has logits, and ends what is complete. Returns whether there was
        any."""
        writing = [task for task in self.tasks if task.stage is Stage.DECODING]
        drawn = any(choice.logits is not None for task in writing for choice in task.live)
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
        return drawn

    # ---------------------------------------------------------------------------------------------------- room

    def _make_room(self, take: Callable[[], T], task: Task) -> T | None:
        """What `take` gives. Where evicting from the caches is not enough, other tasks are preempted, the newest first;
        a task that cannot even run alone fails, a fragmented one after a second attempt. None when `task` itself had to
        go."""
        while True:
            try:
                return take()
            except OutOfMemory as error:
                others = [t for t in self.tasks if t is not task and t.stage in (Stage.PREFILLING, Stage.DECODING)]
                younger = [t for t in others if t.created > task.created]
                if younger:
                    self.preempt(max(younger, key=lambda t: t.created))
                elif others or (not task.retried and scattered(task)):
                    task.retried = not others
                    self.preempt(task)
                    return None
                else:
                    # The frames of its traceback may hold caches that were half made.
                    self._fail(task, error.with_traceback(None))
                    return None

    def preempt(self, task: Task) -> None:
        """Takes the blocks of a task that runs; it goes on later, and loses nothing. What it had stored waits in a
        file; where the disk has no room, it is computed again."""
        assert task.stage in (Stage.PREFILLING, Stage.DECODING)
        self.preemptions += save(task, self._folder)
        task.stage, task.waits_since = Stage.READY, self.ended

    def _fail(self, task: Task, error: BaseException) -> None:
        task.tell(Failed(error))
        self._end(task)

    def _end(self, task: Task) -> None:
        release(task)
        self.preparation.drop(task)
        task.stage = Stage.ENDED
        self.ended += 1
        with self.wake:
            if task in self.tasks:
                self.tasks.remove(task)
            self.wake.notify_all()
        if not self.tasks:
            self.scratch.let_go()


def _reserved(cache: KVCache, tokens: int) -> bool:
    cache.reserve(tokens)
    return True
