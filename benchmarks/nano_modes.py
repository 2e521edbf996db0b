"""Thinking modes of keye-nano: how right, how well formed and how long its replies are in each, one line of JSON a run.

    python -m benchmarks.nano_modes score --model FOLDER [--n 400] [--frames 64] [--tasks count times order]
    python -m benchmarks.nano_modes loops --model FOLDER [--n 400]      # at temperature 1
    python -m benchmarks.nano_modes rates --model FOLDER [--n 100]      # what to think about in auto

`score` asks every question in every mode, greedily: n questions of each task, accuracies are means over the tasks, and
errors are standard errors with clips as clusters. `gain` is think over no_think, question by question. Two minutes
for n = 100 at 64 frames on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import keye
from keye.chat.replies import parse_reply
from keye.data.frameforge import TASKS, TRACED_TASKS, Clip, Question, make_clip, questions, stream, trace
from keye.engine.engine import Engine
from keye.engine.runtime import Runtime
from keye.engine.sampling import SamplingParams
from keye.evals.tasks.frameforge import ClipPrompt, frames_of, score
from keye.scoring.metrics import clustered_error, mean
from keye.train.modes import PassRates, is_well_formed
from keye.train.rollouts import OPENED, find_loop

THINKING = {"think": True, "no_think": False, "auto": None}
MAIN_TASKS = ("count", "times", "order")
#: Frames of the clips by which `rates` decides.
RATED_FRAMES = (16, 32, 64)
#: Longest reply, and most questions about one clip.
MAX_TOKENS, MOST_QUESTIONS = 256, 12


@dataclass(frozen=True)
class ModeReply:
    """A reply to the question number `question` of clip number `clip`. `tokens` are those of the reply, `thought` those
    of its reasoning and the marks around it; the reasoning of FrameForge lists `items` things."""

    clip: int
    question: int
    task: str
    items: int
    mode: str
    right: bool
    is_formed: bool
    is_looping: bool
    tokens: int
    thought: int


class Examiner:
    """Asks a model about clips: their frames are read once for all modes and questions."""

    def __init__(self, model: str) -> None:
        runtime = keye.load(model).runtime
        self.runtime = Runtime.create(runtime.name, runtime.model, runtime.tokenizer, runtime.processor)
        self.engine, self.close = Engine(self.runtime), runtime.tokenizer.token_id("</think>")
        self.end = runtime.tokenizer.token_id("<|im_end|>")

    def ask(
        self, number: int, clip: Clip, chosen: Sequence[Question], modes: Sequence[str], *, temperature: float = 0.0,
        samples: int = 1,
    ) -> list[ModeReply]:  # fmt: skip
        """Every reply to the questions about clip `number`."""
        texts = [question.text for question in chosen]
        prompt = ClipPrompt(self.runtime.prompts, frames_of(clip, self.runtime.processor.config), texts)
        trunk, _ = self.engine.prefill(prompt.trunk)
        requests = [(place, question, mode) for place, question in enumerate(chosen) for mode in modes]
        prompts = [
            prompt.continue_trunk(prompt.branch(question.text, THINKING[mode]), trunk) for _, question, mode in requests
        ]
        params = SamplingParams(
            max_tokens=MAX_TOKENS, temperature=temperature, stop_token_ids=(self.end,), seed=number
        )  # fmt: skip
        results = self.engine.generate(prompts, params, n=samples)
        trunk.free()
        return [
            self._grade(number, place, clip, question, mode, completion)
            for (place, question, mode), result in zip(requests, results, strict=True)
            for completion in result.completions
        ]

    def _grade(self, number: int, place: int, clip: Clip, question: Question, mode: str, completion: Any) -> ModeReply:
        ids, complete = list(completion.token_ids), completion.finish_reason == "stop"
        if complete:
            ids.pop()
        text = (OPENED if mode == "think" else "") + self.runtime.tokenizer.decode(ids)
        closed = max((place + 1 for place, token in enumerate(ids) if token == self.close), default=0)
        thought = closed or (len(ids) if text.startswith("<think>") else 0)
        right = score(clip, question, parse_reply(text).text, number).correct == 1.0
        formed = complete and is_well_formed(text, mode, "prefill")
        items = trace(clip, question).count("; ") + 1
        is_looping = find_loop(ids) is not None
        return ModeReply(number, place, question.task, items, mode, right, formed, is_looping, len(ids), thought)


def draw(split: str, frames: int, tasks: Sequence[str], count: int, seed: int) -> Iterator[tuple[Clip, list[Question]]]:
    """Clips with questions, `count` of each task in all."""
    rng, left = stream(split, seed, f"modes {frames}"), Counter(dict.fromkeys(tasks, count))
    while +left:
        clip = make_clip(rng.getrandbits(60), frames=frames, split=split)
        wanted = list(+left)
        chosen = questions(clip, rng, MOST_QUESTIONS, tasks=wanted, weights=dict.fromkeys(wanted, 1.0))
        remaining = []
        for question in chosen:
            if left[question.task] > 0:
                left[question.task] -= 1
                remaining.append(question)
        if remaining:
            yield clip, remaining


def percent(value: float) -> float | None:
    """0 to 100 with two decimals; None for what is not known."""
    return None if math.isnan(value) else round(100 * value, 2)


def grouped(replies: Sequence[ModeReply], key: Callable[[ModeReply], Any]) -> dict[Any, list[ModeReply]]:
    """The replies by what `key` says of them."""
    groups: dict[Any, list[ModeReply]] = defaultdict(list)
    for reply in replies:
        groups[key(reply)].append(reply)
    return groups


def accuracy(replies: Sequence[ModeReply]) -> tuple[float, float]:
    """The mean over tasks of the share of right replies, and its standard error."""
    tasks = [[(reply.clip, float(reply.right)) for reply in group] for group in grouped(replies, task_of).values()]
    return mean([mean([right for _, right in task]) for task in tasks]), clustered_error(tasks)


def task_of(reply: ModeReply) -> str:
    """What a reply answers."""
    return reply.task


def describe(replies: Sequence[ModeReply]) -> dict[str, Any]:
    """The figures of the replies in one mode."""
    right, error = accuracy(replies)
    return {
        "n": len(replies), "accuracy": percent(right), "error": percent(error),
        "tasks": {task: percent(mean([r.right for r in group])) for task, group in grouped(replies, task_of).items()},
        "formed": percent(mean([reply.is_formed for reply in replies])),
        "looping": percent(mean([reply.is_looping for reply in replies])),
        "thinks": percent(mean([reply.thought > 0 for reply in replies])),
        "tokens": round(mean([reply.tokens for reply in replies]), 2), "most_tokens": max(r.tokens for r in replies),
        "thought": round(mean([reply.thought for reply in replies]), 2),
    }  # fmt: skip


def gain_over(replies: Sequence[ModeReply], mode: str, base: str) -> tuple[float | None, float | None]:
    """What a mode gains over another in points, the mean over tasks, with the error of the paired difference."""
    pairs: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for group in grouped(replies, lambda reply: (reply.clip, reply.question)).values():
        right = {reply.mode: float(reply.right) for reply in group}
        pairs[group[0].task].append((group[0].clip, right[mode] - right[base]))
    error = clustered_error(list(pairs.values()))
    value = mean([mean([gain for _, gain in task]) for task in pairs.values()])
    return percent(value), percent(error)


def run_score(options: argparse.Namespace) -> dict[str, Any]:
    """Every mode on the same questions."""
    examiner, replies = Examiner(options.model), list[ModeReply]()
    clips = draw(options.split, options.frames, options.tasks, options.n, options.seed)
    for number, (clip, chosen) in enumerate(clips):
        replies += examiner.ask(number, clip, chosen, options.modes)
    by_mode = grouped(replies, lambda reply: reply.mode)
    result: dict[str, Any] = {"modes": {mode: describe(by_mode[mode]) for mode in options.modes}}
    figures = result["modes"]
    if {"think", "no_think"} <= set(options.modes):
        result["gain"], result["gain_error"] = gain_over(replies, "think", "no_think")
        result["more_tokens"] = round(figures["think"]["tokens"] - figures["no_think"]["tokens"], 2)
        if "auto" in options.modes:
            result["auto_gain"], result["auto_gain_error"] = gain_over(replies, "auto", "no_think")
            result["auto_thought_share"] = percent(figures["auto"]["thought"] / max(1e-9, figures["think"]["thought"]))
    return result


def run_loops(options: argparse.Namespace) -> dict[str, Any]:
    """Replies at temperature 1 in all modes, n of them in each."""
    examiner, replies = Examiner(options.model), list[ModeReply]()
    each = -(-options.n // (len(options.tasks) * options.replies))
    for number, (clip, chosen) in enumerate(draw(options.split, options.frames, options.tasks, each, options.seed)):
        replies += examiner.ask(number, clip, chosen, options.modes, temperature=1.0, samples=options.replies)
    by_mode = grouped(replies, lambda reply: reply.mode)
    looping = sum(reply.is_looping for reply in replies)
    return {"replies": len(replies), "looping_replies": looping, "looping": percent(looping / len(replies)),
            "modes": {mode: describe(by_mode[mode]) for mode in options.modes}}  # fmt: skip


def run_rates(options: argparse.Namespace) -> dict[str, Any]:
    """Pass rates on clips of training at temperature 1: of each task at each number of frames, by how many things its
    reasoning lists (which says how hard a question is). `needed` are those that a reply should think about."""
    examiner, rows = Examiner(options.model), list[dict[str, Any]]()
    for frames in RATED_FRAMES:
        replies: list[ModeReply] = []
        for number, (clip, chosen) in enumerate(draw("train", frames, options.tasks, options.n, options.seed)):
            replies += examiner.ask(
                number, clip, chosen, ("think", "no_think"), temperature=1.0, samples=options.replies
            )
        for (task, items), group in sorted(grouped(replies, lambda reply: (reply.task, reply.items)).items()):
            modes = grouped(group, lambda reply: reply.mode)
            rates = PassRates(*(mean([r.right for r in modes[mode]]) for mode in ("no_think", "think")))
            rows.append({"task": task, "frames": frames, "items": items, "n": len(group) // 2,
                         "direct": percent(rates.direct), "thinking": percent(rates.thinking),
                         "needed": rates.needs_thinking(options.least)})  # fmt: skip
    return {"rates": rows, "least": options.least}


RUNS = {"score": run_score, "loops": run_loops, "rates": run_rates}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(RUNS))
    parser.add_argument("--model", default="nano")
    parser.add_argument("--n", type=int, default=400, help="questions of each task; for loops, replies in each mode")
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(MAIN_TASKS))
    parser.add_argument("--modes", nargs="+", choices=list(THINKING), default=list(THINKING))
    parser.add_argument("--split", choices=("train", "test", "unseen"), default="test")
    parser.add_argument("--replies", type=int, default=4, help="replies to a question at temperature 1")
    parser.add_argument(
        "--least", type=float, default=0.9, help="rates: a task answered right as often is not thought about"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.what == "rates":
        options.tasks = [task for task in options.tasks if task in TRACED_TASKS]
    begin = time.perf_counter()
    names = ("model", "frames", "split", "seed", "tasks")
    line = {"run": options.what, **{name: getattr(options, name) for name in names}, **RUNS[options.what](options)}
    print(json.dumps({**line, "seconds": round(time.perf_counter() - begin, 1)}), flush=True)


if __name__ == "__main__":
    main()
