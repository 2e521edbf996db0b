"""A judge: any OpenAI-compatible server that is asked whether a reply gives the reference answer, where the strict
scorer read no answer in it. Off unless a server is named.

Temperature 0; each verdict is kept in `judge.jsonl` of the output under the digest of judge, prompt and reply, and is
never asked for again. A verdict that is neither yes nor no counts as wrong, as does a judge that does not answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from keye.batch.journal import Journal
from keye.batch.manifest import Item
from keye.batch.run import Batch
from keye.evals.results.result import VERDICT, Reply, score_items
from keye.evals.task import STRICT, EvalItem, ScoredItem, Task

if TYPE_CHECKING:
    from keye.batch.workers import Worker

JUDGE_NAME: Final = "judge.jsonl"
#: Longest verdict, in tokens; a judge may reason before it.
_MAX_TOKENS: Final = 512
#: Characters of a reply that a judge reads: the end, where answers stand.
_MOST_CHARACTERS: Final = 8000
_PROMPT: Final = (
    "Compare a reply with the reference answer of a question. The question may refer to pictures that you do not see; "
    "judge the reply by the reference answer alone.\n\nQuestion:\n{question}\n\nReference answer:\n{gold}\n\n"
    "Reply:\n{reply}\n\nDoes the reply commit to the reference answer? Say yes or no, and nothing else."
)
_GOLD_FIELDS: Final = ("answer", "gold", "target", "label", "number", "span")


@dataclass(frozen=True)
class Judge:
    """`open_worker` makes the worker that asks the server; `model` is what the server calls its model, None for its
    first, for which verdicts are kept by the address `server`."""

    open_worker: Callable[[], Worker]
    model: str | None = None
    server: str | None = None


def judge_items(
    task: Task, items: Sequence[EvalItem], replies: Sequence[Reply], judge: Judge, folder: Path
) -> list[ScoredItem]:
    """The strict scores, with the judge's verdict where nothing was extracted. An item whose verdict came from the
    judge is `extracted` "judge: yes" or "judge: no"."""
    strict = score_items(task, items, replies, STRICT)
    prompts = {
        number: prompt
        for number, row in enumerate(strict)
        if needs_judge(row) and (prompt := judge_prompt(row.item, row.prediction or "")) is not None
    }
    verdicts = ask_judge(judge, list(prompts.values()), folder / JUDGE_NAME)
    for number, prompt in prompts.items():
        is_right = read_verdict(verdicts.get(prompt))
        if is_right is not None:
            text = f"{VERDICT}{'yes' if is_right else 'no'}"
            strict[number] = replace(strict[number], score=float(is_right), extracted=text, judge_needed=False)
        else:
            strict[number] = replace(strict[number], judge_needed=True)
    return strict


def needs_judge(row: ScoredItem) -> bool:
    """Whether an item is the judge's: a reply in which no answer was read, and a gold answer to compare it with."""
    return (
        bool(row.prediction and row.prediction.strip())
        and row.item.has_gold
        and row.extracted is None
        and not row.score
    )


def judge_prompt(item: EvalItem, prediction: str) -> str | None:
    """What the judge reads; None for an item without a reference answer in words."""
    gold = next((item.document[name] for name in _GOLD_FIELDS if item.document.get(name) not in (None, "")), None)
    texts = [str(part.get("text", "")) for part in item.content if part.get("type") == "text"]
    question = str(item.document.get("question") or "\n".join(texts))
    if gold is None or not question.strip():
        return None
    named = gold if isinstance(gold, str) else json.dumps(gold, ensure_ascii=False, default=str)
    return _PROMPT.format(question=question, gold=named, reply=prediction[-_MOST_CHARACTERS:])


def read_verdict(text: str | None) -> bool | None:
    """True or false for a verdict that is a plain yes or no, after its reasoning if it has any; else None."""
    if text is None:
        return None
    word = text.rpartition("</think>")[2].strip().strip(".!*\"'").casefold()
    return {"yes": True, "no": False, "是": True, "否": False}.get(word)


def ask_judge(judge: Judge, prompts: Sequence[str], path: Path) -> dict[str, str | None]:
    """The judge's replies by prompt, None where it failed; those that `path` has already are not asked for again."""
    ids = {prompt: _digest(judge, prompt) for prompt in prompts}
    if not ids:
        return {}
    items = [Item(name, 0, name, _body(prompt), ()) for prompt, name in ids.items()]
    with Journal(path) as journal:
        left = any(not (name in journal.done and journal.done[name].ok) for name in ids.values())
        batch = Batch([judge.open_worker()] if left else [], journal, shape=_shape_verdict)
        asyncio.run(batch.run(items, retry_errors=True))
    with path.open(encoding="utf-8") as file:
        verdicts = {record["id"]: record.get("text") for record in map(json.loads, file)}
    return {prompt: verdicts.get(name) for prompt, name in ids.items()}


def _body(prompt: str) -> Mapping[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": _MAX_TOKENS}


def _digest(judge: Judge, prompt: str) -> str:
    return hashlib.sha256(
        json.dumps([judge.model or judge.server, _body(prompt)], sort_keys=True).encode()
    ).hexdigest()[:32]


def _shape_verdict(name: str, record: dict[str, Any]) -> dict[str, Any]:
    names = ("line_digest", "id", "text", "model", "finish_reason", "error")
    return {key: record[key] for key in names if key in record}
