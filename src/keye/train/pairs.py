"""Pairs of replies to learn preferences from: several replies of the model itself, ranked by rules and perhaps by a
judge; the best and the worst are kept.

Sources: the reports' iterative alignment (rules: repetition, format, right answer; scores of a model). How the scores
are weighed is not published; `Grade.score` is ours.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from keye.chat.messages import Medium, Message
from keye.chat.replies import parse_reply
from keye.data.samples import Sample
from keye.errors import KeyeError, brief
from keye.scoring.metrics import interval_iou, parse_interval_answer, text_matches, time_matches
from keye.train.modes import Style, is_well_formed
from keye.train.rollouts import Rollout

_BOXED: Final = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_NUMBER: Final = re.compile(r"\d+(?:\.\d+)?")
#: Bytes of a judge's answer that are read.
_MOST_BYTES: Final = 1 << 20
_JUDGE_PROMPT: Final = (
    "You grade replies to a question. Reference answer: {reference}\n\nQuestion: {question}\n\nReply: {reply}\n\n"
    "How good is the reply, from 0 (wrong or useless) to 10 (right, complete and clear)? Answer with the number alone."
)


@dataclass(frozen=True)
class Grade:
    """What is known of a reply: how right its answer is, None without a reference; whether it has the form of its mode
    and came to an end; whether it repeats itself; and a judge's grade. All lie between 0 and 1."""

    right: float | None
    is_formed: bool
    is_looping: bool
    judged: float | None = None

    def score(self, judge_weight: float = 1.0) -> float:
        """1 for a right answer, 0.5 for the right form, -1 for repetition, and the judge's grade with its weight."""
        judged = 0.0 if self.judged is None else judge_weight * self.judged
        return (self.right or 0.0) + 0.5 * self.is_formed - 1.0 * self.is_looping + judged


@dataclass(frozen=True)
class Judge:
    """A model behind an OpenAI-compatible endpoint that grades replies."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 60.0

    def grade(self, question: str, reference: str, reply: str) -> float:
        """A grade between 0 and 1. `KeyeError` where the endpoint does not answer with a number."""
        prompt = _JUDGE_PROMPT.format(question=question, reference=reference or "none", reply=reply)
        content = self._complete([{"role": "user", "content": prompt}])
        number = _NUMBER.search(parse_reply(content).text)
        if number is None:
            raise KeyeError(f"the judge at {self.url} answered {brief(content)} instead of a number from 0 to 10")
        return min(float(number[0]), 10.0) / 10

    @cached_property
    def endpoint(self) -> str:
        """The address of chat completions; `KeyeError` for a URL that is not of HTTP."""
        if not self.url.startswith(("http://", "https://")):
            raise KeyeError(f"judge.url is {brief(self.url)}; give an address such as http://localhost:8000/v1")
        return self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"

    def _complete(self, messages: Sequence[dict[str, str]]) -> str:
        body = {"model": self.model, "messages": list(messages), "temperature": 0.0}
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.endpoint, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer = json.loads(response.read(_MOST_BYTES))
            return str(answer["choices"][0]["message"]["content"])
        except (OSError, urllib.error.URLError, ValueError) as error:
            raise KeyeError(f"the judge at {self.url} cannot be asked ({error}); start it, or leave it out") from None
        except (KeyError, IndexError, TypeError):
            raise KeyeError(f"the judge at {self.url} sent no chat completion; is it OpenAI-compatible?") from None


def grade_reply(sample: Sample, rollout: Rollout, style: Style, judge: Judge | None = None) -> Grade:
    """Grades a reply against the sample's own."""
    gold = extract_answer(reply_text(sample))
    right = None if not gold else score_answer(extract_answer(rollout.text), gold)
    modes = ("think", "no_think") if sample.mode is None else (sample.mode,)
    formed = rollout.is_complete and any(is_well_formed(rollout.text, mode, style) for mode in modes)
    judged = None if judge is None else judge.grade(question_text(sample), gold, rollout.text)
    return Grade(right, formed, rollout.is_looping, judged)


def score_answer(answer: str, gold: str) -> float:
    """How right an answer is, 0 to 1: intervals by their IoU, everything else by equality of times or texts."""
    if (intervals := parse_interval_answer(gold)) is not None:
        return interval_iou(parse_interval_answer(answer), intervals)
    return float(text_matches(answer, gold) or time_matches(answer, gold))


def extract_answer(text: str) -> str:
    """The answer in a reply: what follows its reasoning, the last `\\boxed{}` of it where there is one."""
    answer = parse_reply(text).text
    boxed = _BOXED.findall(answer)
    return boxed[-1].strip() if boxed else answer


def reply_text(sample: Sample) -> str:
    """The text of a sample's own last reply."""
    return "".join(part for part in sample.messages[-1].parts if isinstance(part, str))


def question_text(sample: Sample) -> str:
    """The text of the last message of the user."""
    users = [message for message in sample.messages if message.role == "user"]
    return "".join(part for part in users[-1].parts if isinstance(part, str)) if users else ""


def choose_pair(rollouts: Sequence[Rollout], scores: Sequence[float]) -> tuple[Rollout, Rollout] | None:
    """The best and the worst reply, the shorter of equally good and the longer of equally bad ones; None where all are
    alike, and where one of the two is empty, which cannot be learnt from."""
    ranked = sorted(
        (r for r in range(len(rollouts)) if rollouts[r].text.strip()),
        key=lambda r: (scores[r], -len(rollouts[r].token_ids)),
    )
    if len(ranked) < 2 or scores[ranked[-1]] <= scores[ranked[0]]:
        return None
    best, worst = rollouts[ranked[-1]], rollouts[ranked[0]]
    return None if best.text == worst.text else (best, worst)


def to_row(sample: Sample, reply: str, rejected: str | None = None, *, mode: str | None = None) -> dict[str, Any]:
    """A row of JSON lines: the sample's conversation with another reply, and perhaps one that lost against it.
    `KeyeError` for media that are in memory alone."""
    messages = [_message_row(sample, message) for message in sample.messages[:-1]]
    row: dict[str, Any] = {"messages": [*messages, {"role": "assistant", "content": reply}]}
    if rejected is not None:
        row["rejected_response"] = rejected
    optional = {"tools": list(sample.tools), "mode": mode or sample.mode, "task": sample.task}
    return row | {name: value for name, value in optional.items() if value}


def _message_row(sample: Sample, message: Message) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
            continue
        content.append({"type": part.kind, part.kind: _source(sample, part), **part.options})
    row: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        row["tool_calls"] = [{"type": "function", "function": call.to_dict()} for call in message.tool_calls]
    return row


def _source(sample: Sample, medium: Medium) -> Any:
    if isinstance(medium.source, str | Path):
        return str(medium.source)
    if isinstance(medium.source, Sequence) and all(isinstance(item, str | Path) for item in medium.source):
        return [str(item) for item in medium.source]
    raise KeyeError(
        f"{sample.place}: its {medium.kind} is not a file of its own and cannot be named in a row; give files"
    )
