"""How long `keye eval rescore` takes for many stored predictions, on one core.

    python -m benchmarks.eval_rescore --items 100000 --task videomme --scorers strict lmms-eval-0.7.3

Writes samples in the form of lmms-eval, their documents inside, with invented questions of four options about a video
each ten, and replies of many forms (bare letters, sentences, reasoning in tags, boxed, a text without an answer). Then
scores the file by each scorer alone, from opening it to the result with its interval. Prints seconds and shares.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keye.evals.results.rescore import rescore
from keye.evals.task import find_task

WORDS = "red green blue round square tall short heavy wooden striped left right broken empty bright yellow".split()
FORMS = (
    "{letter}", "{letter}.", "({letter})", "The answer is {letter}.", "Answer: {letter}", "**{letter}**",
    "{letter}. {text}", "{text}", "<think>It could be {other}. No, the second half rules it out.</think>{letter}",
    "\\boxed{{{letter}}}", "First I look at the beginning, then at the end. The correct option is {letter}.",
    "I cannot tell from these frames.",
)  # fmt: skip


def samples(items: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Lines of a file of lmms-eval about Video-MME."""
    draw = random.Random(seed)
    for number in range(items):
        texts = draw.sample(WORDS, 4)
        options = [f"{letter}. {text}" for letter, text in zip("ABCD", texts, strict=True)]
        gold, chosen, other = draw.randrange(4), draw.randrange(4), draw.randrange(4)
        reply = draw.choice(FORMS).format(letter="ABCD"[chosen], text=texts[chosen], other="ABCD"[other])
        video = number // 10
        document = {
            "video_id": f"{video:05}", "videoID": f"v{video}", "question_id": f"{video:05}-{number % 10}",
            "duration": ("short", "medium", "long")[video % 3], "domain": f"domain {video % 6}",
            "sub_category": f"part {video % 30}", "task_type": f"kind {number % 12}",
            "question": "What is shown beside the door in the middle of the video?", "options": options,
            "answer": "ABCD"[gold],
        }  # fmt: skip
        yield {
            "doc_id": number, "doc": document, "target": "ABCD"[gold], "resps": [[reply]], "filtered_resps": [reply],
            "input": f"Select the best answer. {document['question']} {options}", "doc_hash": "0" * 64,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--task", default="videomme")
    parser.add_argument("--scorers", nargs="+", help="default: all of the task")
    arguments = parser.parse_args()
    task = find_task(arguments.task)
    with tempfile.TemporaryDirectory(prefix="keye-rescore-") as folder:
        path = Path(folder) / "samples.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in samples(arguments.items))
        for scorer in arguments.scorers or task.scorers:
            begin, cpu = time.perf_counter(), time.process_time()
            result = rescore(path, task, [scorer])
            figures = result["scorers"][scorer]
            print(json.dumps({
                "task": task.name, "scorer": scorer, "items": result["items"],
                "seconds": round(time.perf_counter() - begin, 2), "cpu_seconds": round(time.process_time() - cpu, 2),
                "value": round(figures["value"], 3), "unparsed": figures["unparsed"], "random": figures["random"],
            }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
