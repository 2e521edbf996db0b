"""Grounding tasks through a search in the video, as `keye find` does it, instead of one prompt: the way to ask when
something happens in hours of video. The likeliest moment is the reply, and the task scores it as any other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from keye.batch.manifest import Item
from keye.batch.workers import Answer
from keye.chat.times import Interval
from keye.errors import KeyeError
from keye.evals.task import EvalItem, Task, TaskSettings

if TYPE_CHECKING:
    from keye.api import Keye
    from keye.moments import FindResult

_QUERY: Final = "query"


def as_search(task: Task) -> Task:
    """The task with the bare event in place of its prompt. `KeyeError`, when it is read, for one without events."""
    kind: Any = type(task)

    @dataclass(frozen=True, kw_only=True)
    class Search(kind):
        def read(self, folder: Path, settings: TaskSettings) -> Iterator[EvalItem]:
            for item in super().read(folder, settings):
                video = next((part for part in item.content if part["type"] == "video"), None)
                if video is None or not isinstance(item.document.get(_QUERY), str):
                    raise KeyeError(f"{task.name} does not ask when an event happens in a video: leave --through out")
                yield replace(item, content=(video, {"type": "text", "text": item.document[_QUERY]}))

    values: dict[str, Any] = {field.name: getattr(task, field.name) for field in fields(task)}
    search: Task = Search(**values)
    return search


class FindWorker:
    """Answers the items of such a task by searches with a loaded model, one at a time. The index of a video is kept in
    the user's cache, so that further questions about it go on from there."""

    def __init__(self, load: Callable[[], Keye]) -> None:
        self.name, self.slots, self._load = "find", 1, load

    async def start(self) -> None:
        await asyncio.to_thread(self._load)

    async def ask(self, item: Item) -> Answer:
        video, text = item.body["messages"][-1]["content"]
        options = {name: value for name, value in video.items() if name not in ("type", "video")}
        return await asyncio.to_thread(self._find, video["video"], text["text"], options)

    async def close(self) -> None:
        return None

    def _find(self, video: str, event: str, options: dict[str, Any]) -> Answer:
        try:
            result = self._load().find(video, event, media_options=options)
        except KeyeError as error:
            return Answer(400, {"error": {"code": "search_failed", "message": str(error)}})
        message = {"role": "assistant", "content": write_reply(result)}
        usage = {"prompt_tokens": result.coverage.query_tokens, "completion_tokens": 0}
        return Answer(200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage})


def write_reply(result: FindResult) -> str:
    """The likeliest moment as the model would write it, also one below the threshold; `[]` where there is none."""
    spans: list[Interval] = [(moment.start, moment.end) for moment in (*result.moments, *result.weaker)][:1]
    return f"[{', '.join(f'[{start:.3f}, {end:.3f}]' for start, end in spans)}]"
