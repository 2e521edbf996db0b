"""The engine: takes requests, computes them together step by step, and emits events. It runs in the thread of `step`.

Nothing here waits for media: they are opened in threads, decoded in processes, and encoded as they come. Which requests
run and what a step computes is the scheduler's decision.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Final

from torch import Tensor

from keye.chat.messages import Medium
from keye.chat.template import Segment
from keye.engine.media import check_index_adapter, check_index_attention
from keye.engine.prompt import ContextBudget, Prompt, PromptBuilder
from keye.engine.request import (
    Event,
    Generating,
    GenerationRequest,
    LoadingMedia,
    Prefilling,
    Progress,
    Ready,
    Task,
    Waiting,
)
from keye.engine.runtime import Runtime
from keye.engine.scheduler import Scheduler, Work, count_computable
from keye.engine.step import Slice, run_slices
from keye.engine.writer import Writer
from keye.errors import KeyeError
from keye.models.keye import KeyeModel

#: Computes the slices of a step: the wanted logits of each.
RunSlices = Callable[[KeyeModel, Sequence[Slice]], list[Tensor | None]]
#: Requests whose media are opened at the same time; and how many may be open before their turn has come, since
#: pictures are held in memory.
PREPARING: Final = 4
AHEAD: Final = 8
#: Characters from which on a text is long: it takes some tenths of a second.
LONG_TEXT: Final = 65_536


class MediaLoader:
    """Lays out prompts for a context of `limit` tokens; `notify` is called in a thread after each."""

    def __init__(self, builder: PromptBuilder, limit: int, notify: Callable[[], None]) -> None:
        self._builder, self._limit, self._notify = builder, limit, notify
        self._media_threads = ThreadPoolExecutor(PREPARING, "keye-media")
        #: Prompts without media do not wait behind files that are slow to come.
        self._text_thread = ThreadPoolExecutor(1, "keye-text")
        #: Nor short ones behind those of a book's length.
        self._book_thread = ThreadPoolExecutor(1, "keye-book")

    def load(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Prompt | BaseException]]:
        """Starts to load the media of those whose turn it is; yields tasks that are laid out, or what went wrong."""
        ahead = sum(isinstance(task.state, LoadingMedia | Ready) for task in tasks)
        for task in tasks:
            prompt = task.request.prompt
            if isinstance(task.state, LoadingMedia) and task.state.prompt.done():
                yield task, task.state.prompt.exception() or task.state.prompt.result()
            elif not isinstance(task.state, Waiting):
                continue
            elif isinstance(prompt, Prompt):
                yield task, prompt
            else:
                has_media = any(isinstance(segment.value, Medium) for segment in prompt)
                if has_media and ahead >= AHEAD:
                    continue
                ahead += has_media
                task.emit(Progress("media", 0, 1))
                characters = sum(len(segment.value) for segment in prompt if isinstance(segment.value, str))
                text_thread = self._book_thread if characters > LONG_TEXT else self._text_thread
                threads = self._media_threads if has_media else text_thread
                task.state = LoadingMedia(threads.submit(self._lay_out, task.request, prompt))

    def _lay_out(self, request: GenerationRequest, segments: Sequence[Segment]) -> Prompt:
        """In a thread: the prompt with its media probed, and their pixels on the way."""
        try:
            budget = ContextBudget(self._limit, 1 if request.clamp else request.params.max_tokens)
            prompt = self._builder.lay_out(segments, budget=budget, stream=True, salt=request.vision_salt)
        finally:
            self._notify()
        if prompt.indexed is not None:
            check_index_attention(prompt.indexed, request.attention)
            check_index_adapter(prompt.indexed, request.adapter)
        return prompt


class EngineCore:
    """Requests on one model. `add` and `abort` may be called from any thread; `step` from one at a time.

    `run_slices` is where faults of a device, of weights and of a step can be injected: it is called once a step.
    """

    def __init__(self, runtime: Runtime, *, most_running: int = 64, run_slices: RunSlices = run_slices) -> None:
        self.runtime, self.run_slices = runtime, run_slices
        self.writer = Writer(runtime)
        self.wake = threading.Condition()
        self._stepping = threading.Lock()
        self._exclusive = 0
        self.scheduler = Scheduler(runtime, self.writer, self._notify, most_running)
        self.tasks = self.scheduler.tasks
        self.loader = MediaLoader(runtime.prompts, runtime.config.text.max_position_embeddings, self._notify)
        #: Tokens computed since the start.
        self.computed = {"prompt": 0, "reply": 0}
        self._encoded = False

    def add(self, request: GenerationRequest, emit: Callable[[Event], None]) -> Task:
        """Takes a request; `emit` is called with its events, the last being `Finished` or `Failed`."""
        with self.wake:
            task = Task(request, emit, time.perf_counter())
            self.tasks.append(task)
            self.wake.notify_all()
        return task

    def abort(self, task: Task) -> None:
        """Aborts a request; it holds nothing after the step that is running, and emits nothing more."""
        task.aborted = True
        self._notify()
        self._reap_aborted()

    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.tasks

    def wait_for_work(self) -> None:
        """Waits a moment: for frames that are being decoded, a prompt being laid out, or a new request."""
        with self.wake:
            self.wake.wait(0.003)

    def step(self) -> bool:
        """One step: media, prompts, replies. Returns whether anything was computed; nothing is where another thread
        steps or works on the model exclusively."""
        if self._exclusive or not self._stepping.acquire(blocking=False):
            return False
        try:
            self._reap()
            for task, result in self.loader.load(list(self.tasks)):
                if isinstance(result, Prompt):
                    self.scheduler.set_ready(task, result)
                else:
                    self.scheduler.fail(task, result)
            self.scheduler.admit()
            generating = any(isinstance(task.state, Generating) for task in self.tasks)
            # Beside replies, a step either encodes or computes prompts, in turn: both would take too long.
            encoded = self._encoded = not (generating and self._encoded) and self._encode()
            computed = self._compute(prompts=not (generating and encoded))
        finally:
            self._stepping.release()
        self._reap_aborted()
        return computed or encoded

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Entered around work on the model that is not a step: it waits for the step that is running, and no other
        begins before it ends."""
        with self.wake:
            self._exclusive += 1
        try:
            with self._stepping:
                yield
        finally:
            with self.wake:
                self._exclusive -= 1
                self.wake.notify_all()
        self._reap_aborted()

    def restart_prompts(self) -> None:
        """Computes prompts from their beginning that were begun with weights that have been replaced; those that
        continue a stored sequence fail. Called under `exclusive`."""
        for task in list(self.tasks):
            state = task.state.preempted.state if isinstance(task.state, Ready) and task.state.preempted else task.state
            if not isinstance(state, Ready | Prefilling):
                continue  # not laid out, or generating
            if state.prompt.past is not None:
                error = KeyeError("the weights were replaced since the beginning of the prompt was computed")
                self.scheduler.fail(task, error)
            else:
                task.state.release()
                task.forget_computed()
                task.state = Ready(state.prompt)

    def fail_all(self, error: BaseException) -> None:
        """Ends every request with an error that none of them caused."""
        with self._stepping:
            for task in list(self.tasks):
                self.scheduler.fail(task, error)

    def _notify(self) -> None:
        with self.wake:
            self.wake.notify_all()

    def _reap(self) -> None:
        """Ends what was aborted or has run out of time."""
        now = time.perf_counter()
        for task in list(self.tasks):
            seconds = task.request.seconds
            if task.aborted:
                self.scheduler.end(task)
            elif seconds is not None and now - task.created > seconds:
                sentence = f"the request took longer than {seconds:g} s, and was given up"
                error = KeyeError(f"{sentence}; ask about fewer frames, or for fewer tokens")
                self.scheduler.fail(task, error)

    def _reap_aborted(self) -> None:
        """Ends what was aborted, unless another thread steps, which does it afterwards. Never waits: garbage collection
        may abort a request in the middle of a step of the same thread."""
        while any(task.aborted for task in list(self.tasks)) and self._stepping.acquire(blocking=False):
            try:
                self._reap()
            finally:
                self._stepping.release()

    def _encode(self) -> bool:
        """Encodes patches of the first prompt that has decoded ones. Returns whether it did."""
        scheduler, generating = self.scheduler, sum(isinstance(task.state, Generating) for task in self.tasks)
        for task in list(self.tasks):
            if not isinstance(state := task.state, Prefilling) or state.vision.done or state.vision.waiting:
                continue
            begin, job = time.perf_counter(), state.vision
            # Where memory is full, what is encoded is computed first, if there is anything.
            required = not count_computable(task.request, state)
            encode = partial(job.step, scheduler.timer.patch_budget(generating), required=required)
            try:
                patches = scheduler.make_room(encode, task)
            except Exception as error:  # noqa: BLE001 - whatever went wrong in a decoder fails the request of the file
                scheduler.fail(task, error)
                return True
            job.add_notes(task.notes)
            if patches:
                scheduler.timer.record_patches(time.perf_counter() - begin, patches)
                task.emit(Progress("encode", job.ready, job.total))
                with self.wake:  # the others encode before this one does again
                    self.tasks.remove(task)
                    self.tasks.append(task)
                return True
        return False

    def _compute(self, *, prompts: bool) -> bool:
        """One pass over every reply and, with `prompts`, shares of the prompts, as far as there is scratch for them.
        Returns whether anything was computed or drawn."""
        begin, scheduler = time.perf_counter(), self.scheduler
        work = scheduler.schedule(prompts=prompts)
        if not work:
            return self._draw()
        reserve = partial(scheduler.scratch.reserve, [item.slice for item in work])
        if scheduler.make_room(reserve, work[0].task) is None:
            return False
        work = [item for item in work if item.slice.cache.blocks]  # making room may have preempted others
        try:
            computed = self.run_slices(self.runtime.model, [item.slice for item in work])
        except (RuntimeError, MemoryError) as error:  # what torch raises when a device fails or is full
            for task in dict.fromkeys(item.task for item in work):
                scheduler.fail(task, error)
            return True
        finally:
            scheduler.scratch.release()
        # All are brought up to date before anything makes room: what is preempted is saved as it is.
        for item in work:
            if (damage := item.slice.cache.damage) is not None and not item.task.has_ended:
                scheduler.fail(item.task, damage)
        counts = {"prompt": 0, "reply": 0}
        for item, logits in zip(work, computed, strict=True):
            if not item.task.has_ended:
                counts["prompt" if item.branch is None else "reply"] += item.slice.token_ids.shape[0]
                self._advance(item, logits)
        for task in list(self.tasks):
            if isinstance(task.state, Prefilling) and task.state.logits is not None:
                scheduler.complete_prompt(task, task.state)
        for kind, tokens in counts.items():
            self.computed[kind] += tokens
        self._draw()
        scheduler.timer.record_step(time.perf_counter() - begin, counts["reply"], counts["prompt"])
        return True

    def _advance(self, item: Work, logits: Tensor | None) -> None:
        """Notes what a step has computed of a branch or a prompt."""
        task, branch, state = item.task, item.branch, item.task.state
        task.retried = False
        if branch is not None:
            assert logits is not None
            computed = item.slice.token_ids.shape[0]
            branch.position, branch.pending = branch.position + computed, branch.pending[computed:]
            branch.logits = None if branch.pending else logits[-1]
            branch.routing = self.writer.routing(task, item.slice, branch.choice.choice_index)
            return
        assert isinstance(state, Prefilling)
        done, length = state.done, state.prompt.length
        state.vision.forget(int(state.prompt.visual_counts[done - 1]))
        task.emit(Progress("prefill", done, length, task.cached))
        if task.request.prompt_logprobs is not None and logits is not None:
            self.writer.probe(task, state, logits)
        if done == length:
            assert logits is not None
            state.logits = logits[-1]
            state.routing = self.writer.routing(task, item.slice, 0)

    def _draw(self) -> bool:
        """Draws the next token of every branch that has logits, and ends what is complete. Returns whether there was
        any."""
        generating = [(task, task.state) for task in self.tasks if isinstance(task.state, Generating)]
        drawn = any(branch.logits is not None for _, state in generating for branch in state.branches)
        for task, error in self.writer.write(generating):
            self.scheduler.fail(task, error)
        for task, state in generating:
            if task.has_ended:
                continue
            for branch in state.branches:
                if branch.choice.reason is not None:
                    branch.cache.free()
            state.branches = [branch for branch in state.branches if branch.choice.reason is None]
            if not state.branches:
                task.emit(self.writer.finished(task, state.prompt))
                self.scheduler.end(task)
        return drawn
