"""A benchmark of your own: python examples/own_task.py, or keye eval examples/own_task.py:TASK -o results

The rows are in `rows.jsonl` of the data folder: {"id", "video", "question", "answer"}, answers yes or no.

Needs keye alone, no extra.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from keye.evals.task import EvalItem, ItemScore, Task, TaskSettings
from keye.scoring.official.registry import Document
from keye.scoring.strict.yes_no import find_yes_no


@dataclass(frozen=True, kw_only=True)
class YesNo(Task):
    def read(self, folder: Path, settings: TaskSettings) -> Iterator[EvalItem]:
        for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            video = {"type": "video", "video": str((folder / row["video"]).absolute())}
            question = {"type": "text", "text": row["question"]}
            yield EvalItem(row["id"], row["video"], (video, question), {"answer": row["answer"]})

    def score(self, document: Document, prediction: str) -> ItemScore:
        answer = find_yes_no(prediction)
        return ItemScore(float(answer is (document["answer"] == "yes")), answer)


TASK = YesNo(
    name="own_yes_no", title="Questions of our own", measures="what our videos show", source="our folder",
    licence="ours", media="video",
)  # fmt: skip

if __name__ == "__main__":
    for reply in ("Yes, it is.", "<think>yes?</think>No.", "I cannot say."):
        print(reply, TASK.score({"answer": "no"}, reply))
