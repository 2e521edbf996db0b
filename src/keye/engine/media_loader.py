"""Opens the media of requests in threads, few of them ahead of their turn. Knows requests and prompts, no tensors."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from keye.chat.messages import Medium
from keye.engine.media import check_index_attention
from keye.engine.prompt import Prompt, PromptBuilder, Room
from keye.engine.request import Progress, Stage, Task

#: Requests whose media are opened at the same time; and how many may be open before their turn has come, since
#: pictures are held in memory.
PREPARING: Final = 4
AHEAD: Final = 8
#: Characters from which on a text is long: it takes some tenths of a second.
LONG_TEXT: Final = 65_536


class Preparation:
    """Lays out prompts for a context of `limit` tokens; `wake` is told of every one that is done."""

    def __init__(self, builder: PromptBuilder, limit: int, wake: threading.Condition) -> None:
        self._builder, self._limit, self._wake = builder, limit, wake
        self._threads = ThreadPoolExecutor(PREPARING, "keye-media")
        #: Prompts without media do not wait behind files that are slow to come.
        self._text_thread = ThreadPoolExecutor(1, "keye-text")
        #: Nor short ones behind those of a book's length.
        self._book_thread = ThreadPoolExecutor(1, "keye-book")
        self._running: dict[int, Future[Prompt]] = {}

    def begin(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """Begins with those whose turn it is; yields tasks that came laid out."""
        ahead = sum(task.stage in (Stage.PREPARING, Stage.READY) for task in tasks)
        for task in tasks:
            if task.stage is not Stage.WAITING:
                continue
            given = task.request.prompt
            if isinstance(given, Prompt):
                yield task
                continue
            seen = any(isinstance(segment.value, Medium) for segment in given)
            if seen and ahead >= AHEAD:
                continue
            ahead += seen
            task.stage = Stage.PREPARING
            task.tell(Progress("media", 0, 1))
            characters = sum(len(segment.value) for segment in given if isinstance(segment.value, str))
            text_thread = self._book_thread if characters > LONG_TEXT else self._text_thread
            threads = self._threads if seen else text_thread
            self._running[task.number] = threads.submit(self._lay_out, task)

    def ready(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Future[Prompt]]]:
        """Tasks that are laid out, or could not be."""
        for task in tasks:
            if task.stage is Stage.PREPARING and self._running[task.number].done():
                yield task, self._running.pop(task.number)

    def drop(self, task: Task) -> None:
        """Forgets a task. A thread at work on it ends by itself: what it lays out holds no decode worker yet."""
        if (future := self._running.pop(task.number, None)) is not None:
            future.cancel()

    def _lay_out(self, task: Task) -> Prompt:
        """In a thread: the prompt with its media probed, and their pixels on the way."""
        request = task.request
        assert not isinstance(request.prompt, Prompt)
        try:
            room = Room(self._limit, 1 if request.clamp else request.params.max_tokens)
            prompt = self._builder.lay_out(request.prompt, room=room, stream=True, salt=request.salt)
        finally:
            with self._wake:
                self._wake.notify_all()
        if prompt.indexed is not None:
            check_index_attention(prompt.indexed, request.attention)
        return prompt
