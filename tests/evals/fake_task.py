"""A task for tests of the runner, and workers that answer its questions: letters of questions about made-up files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from keye.batch.manifest import Item
from keye.batch.workers import Answer
from keye.evals.task import EvalItem, ItemScore, Task, TaskSettings

OPTIONS = ["A. red", "B. green", "C. blue", "D. grey"]


@dataclass(frozen=True, kw_only=True)
class LetterTask(Task):
    """Items in `items.jsonl`: {"id", "video", "answer"}; a reply is right where it is the letter."""

    def read(self, folder: Path, settings: TaskSettings) -> Iterator[EvalItem]:
        for line in (folder / "items.jsonl").read_text().splitlines():
            row = json.loads(line)
            video = str(folder / row["video"])
            question = {"type": "text", "text": f"Which? ({row['id']})"}
            document = {"answer": row["answer"], "options": OPTIONS, "question": "Which?"}
            labels = {"half": "first" if row["answer"] in "AB" else "second"}
            yield EvalItem(row["id"], row["video"], ({"type": "video", "video": video}, question), document, labels)

    def score(self, document, prediction: str) -> ItemScore:
        letter = prediction.strip() if prediction.strip() in ("A", "B", "C", "D") else None
        return ItemScore(float(letter == document["answer"]), letter)


TASK = LetterTask(name="letters", title="Letters", measures="letters", source="", licence="none", media="video")


def write_data(folder: Path, items: int, videos: int = 4) -> Path:
    """So many items about so many (empty) videos; the gold answers are A, B, C, D in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(videos):
        (folder / f"{number}.mp4").write_bytes(b"x")
    rows = [{"id": f"q{n}", "video": f"{n % videos}.mp4", "answer": "ABCD"[n % 4]} for n in range(items)]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def number_of(item: Item) -> int:
    return int(item.id[1:])


def reply(text: str, **message: str) -> Answer:
    medium = {"kind": "video", "name": "x.mp4", "frames": 8, "visual_tokens": 32}
    usage = {
        "prompt_tokens": 100, "completion_tokens": 2, "media": [medium],
        "prompt_tokens_details": {"cached_tokens": 50, "media_tokens": 32},
    }  # fmt: skip
    return Answer(200, {"choices": [{"message": {"content": text, **message}}], "usage": usage, "model": "m"})


def right(item: Item) -> Answer:
    return reply("ABCD"[number_of(item) % 4])


class FakeWorker:
    """Answers with what `act` gives for an item; keeps what it was asked."""

    def __init__(self, act: Callable[[Item], Answer] = right, slots: int = 2) -> None:
        self.name, self.slots, self._act = "fake", slots, act
        self.requests: list[Item] = []

    async def start(self) -> None: ...

    async def ask(self, item: Item) -> Answer:
        self.requests.append(item)
        await asyncio.sleep(0)
        return self._act(item)

    async def close(self) -> None: ...
