"""Opens the media of requests in threads, few of them ahead of their turn. Knows requests and prompts, no tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from keye.chat.messages import Medium
from keye.chat.template import Segment
from keye.engine.media import check_index_attention
from keye.engine.prompt import ContextBudget, Prompt, PromptBuilder
from keye.engine.request import GenerationRequest, LoadingMedia, Progress, Ready, Task, Waiting

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
            prompt = self._builder.lay_out(segments, budget=budget, stream=True, salt=request.salt)
        finally:
            self._notify()
        if prompt.indexed is not None:
            check_index_attention(prompt.indexed, request.attention)
        return prompt
