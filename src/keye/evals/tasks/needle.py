"""The needle evaluation: a model searches long synthetic films for short events whose times are known to the frame.

    result = evaluate(keye.load("nano"), NeedleOptions(films=2, minutes=5))

Films are written as video files and searched as a user's are; about each film half the questions are about events that
never happen. Beside the search stand what a perfect model would reach in one pass over evenly spaced frames, what this
model does reach in one pass with as many tokens, and what moments at random reach.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from keye.api import Keye
from keye.chat.times import Interval
from keye.config.media import MediaOptions
from keye.data.frameforge.film import FILM_RATE, Film, plan_film
from keye.data.frameforge.film_file import write_film
from keye.engine.media import Frames
from keye.engine.sampling import SamplingParams
from keye.errors import KeyeError
from keye.evals.figures.searches import SearchRow, percent, summarise_searches
from keye.evals.tasks.frameforge import SPLITS, ClipPrompt
from keye.media.source.fetch import fetch_source
from keye.media.video import VideoReader
from keye.scoring.metrics import parse_interval_answer
from keye.scoring.search import HIT_SECONDS, one_pass_ceiling

#: Spacings in seconds whose ceilings are reported: one pass of 2.0 over two hours, and the windows of a search.
SPACINGS = (2.5, 1.0)
#: Tokens of the question and of a reply in one pass.
_REPLY, _ROOM = 96, 256

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class NeedleOptions:
    """What is asked. KeyeError names a field out of range; those of films are checked by `plan_film`.

    `questions` is how many events of each film are asked for that happen, and how many that do not. Events last `event`
    seconds, and `near_misses` events that share colour or shape with them happen every minute. `budget` is the most
    tokens of a question, the search's own by default.
    """

    split: str = "test"
    films: int = 2
    minutes: float = 5.0
    questions: int = 4
    event: float = 2.0
    near_misses: float = 2.0
    seed: int = 0
    budget: int | None = None
    baselines: bool = True

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise KeyeError(f"split is {self.split!r}; choose one of {', '.join(SPLITS)}")
        for name in ("films", "questions"):
            if getattr(self, name) < 1:
                raise KeyeError(f"{name} is {getattr(self, name)}; choose at least 1")
        if self.questions > 13:
            raise KeyeError(f"questions is {self.questions}; at most 13 events of a film happen and 13 do not")
        self.film(0)

    def film(self, number: int) -> Film:
        """The plan of one of the films."""
        return plan_film(
            self.seed + number, minutes=self.minutes, split=self.split, needles=self.questions, event=self.event,
            near_misses=self.near_misses,
        )  # fmt: skip


def evaluate(model: Keye, options: NeedleOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Asks all questions and returns figures as plain data for JSON (`figures.searches.summarise_searches`), with
    `baselines`. `progress(done, total)` is called after each question."""
    rows, others = list[SearchRow](), list[SearchRow]()
    total = 2 * options.films * options.questions
    for number in range(options.films):
        film = options.film(number)
        with tempfile.TemporaryDirectory(prefix="keye-needle-") as folder:
            path = Path(folder) / "film.mp4"
            write_film(film, path)
            for row in search_film(model, film, number, path, options.questions, budget=options.budget):
                rows.append(row)
                if progress is not None:
                    progress(len(rows), total)
            if options.baselines:
                tokens = max(row.query_tokens for row in rows if row.film == number)
                others += ask_in_one_pass(model, film, number, path, options.questions, tokens)
    result = {**summarise_searches(rows), "options": asdict(options)}
    if options.baselines:
        result["baselines"] = summarise_baselines(rows, others, 60 * options.minutes)
    return result


def film_questions(film: Film, count: int) -> list[tuple[str, Interval | None]]:
    """Names to ask for, with when they are seen: up to `count` needles and as many that are absent, in turn."""
    needles = [(event.name, (event.start, event.end)) for event in film.needles[:count]]
    absent = film.absent[: len(needles)]
    return [question for pair in zip(needles, ((name, None) for name in absent), strict=False) for question in pair]


def search_film(
    model: Keye, film: Film, number: int, path: Path, count: int, *, budget: int | None = None
) -> Iterator[SearchRow]:
    """Searches the file of a film for one thing after another; the index lies beside the file."""
    for place, (name, gold) in enumerate(film_questions(film, count)):
        begin, cpu = time.perf_counter(), cpu_seconds()
        result = model.find(path, name, index=path.with_suffix(".keye"), budget=budget)
        wall, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
        yield SearchRow.of(number, name, gold, result, wall=wall, cpu=cpu, is_first=place == 0)


def cpu_seconds() -> float:
    """Processor time of this process so far, and of those that it started and that have ended."""
    return sum(os.times()[:4])


def ask_in_one_pass(model: Keye, film: Film, number: int, path: Path, count: int, tokens: int) -> Iterator[SearchRow]:
    """Asks the same of evenly spaced frames in one prompt of at most `tokens`, or what the model holds: one frame every
    so many seconds, at the size of the search. Replies are read strictly: a malformed one counts as no answer."""
    runtime, questions = model.runtime, film_questions(film, count)
    limit = min(tokens, model.config.text.max_position_embeddings - _ROOM)
    texts = [model.ground_question(name) for name, _ in questions]
    with VideoReader(fetch_source(path)) as reader:

        def build(frames: int) -> ClipPrompt:
            options: dict[str, Any] = {"nframes": frames, "max_frames": frames, "video_total_pixels": 1e12}
            plan = reader.plan(runtime.processor.config, MediaOptions(**options))
            return ClipPrompt(runtime.prompts, Frames(reader.read(plan), plan.timestamps), texts, options)

        few, more = (build(frames).trunk.length for frames in (2, 10))
        begin, cpu = time.perf_counter(), cpu_seconds()
        prompt = build(max(2, min(film.frames, int(8 * (limit - few) / max(1, more - few)))))
    trunk, _ = model.engine.prefill(prompt.trunk)
    params = SamplingParams(max_tokens=_REPLY, stop_token_ids=(runtime.tokenizer.token_id("<|im_end|>"),))
    results = model.engine.generate([prompt.continue_trunk(branch, trunk) for branch in prompt.branches], params)
    trunk.free()
    wall, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    for (name, gold), result in zip(questions, results, strict=True):
        completion = result.completions[0]
        reply = completion.token_ids[: -1 if completion.finish_reason == "stop" else None]
        intervals = tuple(parse_interval_answer(runtime.tokenizer.decode(reply)) or ())
        yield SearchRow(number, name, gold, intervals, (None,) * len(intervals), len(intervals), None,
                        prompt.trunk.length, 0, wall, cpu, {})  # fmt: skip


def summarise_baselines(rows: Sequence[SearchRow], one_pass: Sequence[SearchRow], duration: float) -> dict[str, Any]:
    """What the figures of a search in films of `duration` seconds are to be compared with."""
    lengths = [row.gold[1] - row.gold[0] for row in rows if row.gold is not None]
    length = round(sum(lengths) / max(1, len(lengths)) * FILM_RATE) / FILM_RATE
    chance = min(1.0, (length + 2 * HIT_SECONDS) / duration)
    summary = summarise_searches(one_pass)
    return {
        "perfect_one_pass": {str(spacing): asdict(one_pass_ceiling(length, spacing)) for spacing in SPACINGS},
        "one_pass": {name: summary[name] for name in ("present", "absent")} | {"tokens": _most_tokens(one_pass)},
        "random": {"hit@1": percent(chance), "hit@5": percent(1 - (1 - chance) ** 5)},
    }  # fmt: skip


def _most_tokens(rows: Sequence[SearchRow]) -> int | None:
    return max((row.query_tokens for row in rows), default=None)
