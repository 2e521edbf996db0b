"""The FrameForge evaluation: a model answers questions about unseen synthetic clips whose answers are known exactly.

    result = evaluate(keye.load("nano").runtime, EvalOptions(questions=500))

Clips and questions follow from the options alone, so runs that differ in `mode`, `select` or `mp4` ask the same.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from keye.cache.sequence import KVCache
from keye.cache.slabs import KVFormat, KVOptions, check_kv_format
from keye.chat.messages import Medium, Message
from keye.chat.replies import parse_reply
from keye.chat.template import CHATML
from keye.chat.times import Interval, merge_intervals
from keye.config import ProcessorConfig
from keye.config.media import MediaOptions
from keye.data import frameforge
from keye.data.frameforge import Clip, Question
from keye.data.frameforge.scene import MAX_OBJECTS
from keye.engine.engine import Engine
from keye.engine.media import Frames
from keye.engine.prompt import ContextBudget, Prompt, PromptBuilder
from keye.engine.runtime import Runtime
from keye.engine.sampling import SamplingParams
from keye.errors import KeyeError
from keye.evals.figures.summary import Scored, summarise
from keye.media.pixels.patches import resize_bilinear
from keye.media.sizes import compute_frame_sizes
from keye.media.source.fetch import fetch_source
from keye.media.video import VideoReader
from keye.models.attention import AttentionMode, Selection
from keye.scoring import metrics

#: Splits that a model has not been trained on.
SPLITS = ("test", "unseen")
YES_NO = ("yes", "no")
SCENES = ("clip", "window", "close")
#: Side in pixels of the frames of clips: as rendered for the model, and as written to video files.
FRAME_SIZE, FILE_SIZE = (112, 112), (448, 448)
#: Questions about one clip: at least and at most.
QUESTIONS_PER_CLIP = (8, 12)
TIME_TASKS = ("start", "end", "change_time", "cut_time")
#: The most that a timestamp may change on the way through a file, in seconds; prompts show tenths.
TIME_TOLERANCE = 0.05

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EvalOptions:
    """What is asked and how the model runs. KeyeError names a field out of range.

    `frames` are the fewest and the most frames of a clip, drawn evenly; `objects` the most objects. `mode` and `select`
    say how the decoder attends (see `keye.models.attention`), `kv` how keys and values are stored and `indexer_kv` how
    the indexer's keys are. `mp4` writes each clip to a video file and reads it back. `max_tokens` is the longest reply.
    `scene` is what clips are like: "clip", or "window" and "close", which show what a search in films looks at, over
    textures and in any aspect ratio.
    """

    split: str = "test"
    frames: tuple[int, int] = (16, 32)
    objects: int = 4
    seed: int = 0
    questions: int = 2000
    mode: AttentionMode = "sparse"
    select: Selection = "indexer"
    kv: KVFormat = "auto"
    indexer_kv: KVFormat = "auto"
    mp4: bool = False
    max_tokens: int = 96
    scene: Literal["clip", "window", "close"] = "clip"
    tasks: tuple[str, ...] = ()
    clock: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        fewest, most = self.frames
        if self.split not in SPLITS:
            raise KeyeError(f"split is {self.split!r}; choose one of {', '.join(SPLITS)}")
        if not 2 <= fewest <= most:
            raise KeyeError(f"frames is {fewest}-{most}; give at least 2 and the smaller number first, such as 16-32")
        if not 1 <= self.objects <= MAX_OBJECTS:
            raise KeyeError(f"objects is {self.objects}; choose 1 to {MAX_OBJECTS}")
        if self.questions < 1:
            raise KeyeError(f"n is {self.questions}; ask at least 1 question")
        known_values = {"mode": get_args(AttentionMode), "select": get_args(Selection), "scene": SCENES}
        for name, known in known_values.items():
            if (value := getattr(self, name)) not in known:
                raise KeyeError(f"{name} is {value!r}; choose one of {', '.join(known)}")
        if self.mode == "dense" and self.select != "indexer":
            raise KeyeError(f"select is {self.select!r} but dense attention selects nothing; use mode sparse")
        if self.mp4 and self.scene != "clip":
            raise KeyeError(f"scene is {self.scene!r}, but only clips go through video files; leave mp4 out")
        if unknown := sorted(set(self.tasks) - set(frameforge.TASKS)):
            raise KeyeError(f"tasks holds {unknown[0]!r}; choose from {', '.join(frameforge.TASKS)}")
        for name in ("tasks", "clock"):
            if getattr(self, name) and self.scene != "clip":
                raise KeyeError(f"{name} is chosen for clips, but scene is {self.scene!r}; leave one of them out")
        check_kv_format(self.kv)
        check_kv_format(self.indexer_kv)
        if self.max_tokens < 1:
            raise KeyeError(f"max_tokens is {self.max_tokens}; a reply needs at least 1")


def parse_frames(text: str) -> tuple[int, int]:
    """The fewest and the most frames of "16-32", or of "32"; KeyeError for anything else."""
    low, _, high = text.partition("-")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise KeyeError(f"frames is {text!r}; give a number or a range such as 16-32") from None


def evaluate(runtime: Runtime, options: EvalOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Asks `options.questions` questions and returns figures as plain data for JSON.

    `accuracy` and `miou` (0 to 100) are those of the given mode; `figures.summary.summarise` names every field.
    `progress(done, total)` is called after each clip. KeyeError when the model cannot run in the mode asked for, or a
    clip does not fit its context.
    """
    if options.mode == "sparse" and runtime.config.text.sparse is None:
        raise KeyeError("the model has no sparse-attention indexer; use mode dense")
    examiner, scored = _Examiner(runtime, options), list[Scored]()
    for number, (clip, questions) in enumerate(exam(options)):
        scored += examiner.ask(number, clip, questions)
        if progress:
            progress(len(scored), options.questions)
    return {**summarise(scored), **examiner.figures(), "options": asdict(options)}


def exam(options: EvalOptions) -> Iterator[tuple[Clip, list[Question]]]:
    """The clips with their questions, as many in all as asked for. Depends on split, frames, objects, seed,
    scene, tasks and clock."""
    rng = frameforge.stream(options.split, options.seed, "evaluation")
    left = options.questions
    while left:
        seed, frames = rng.getrandbits(60), rng.randint(*options.frames)
        if options.scene == "clip":
            start, step = options.clock or (None, None)
            clip = frameforge.make_clip(seed, frames=frames, objects=options.objects, split=options.split,
                                        size=FRAME_SIZE, start=start, step=step)  # fmt: skip
            questions = frameforge.questions(clip, rng, rng.randint(*QUESTIONS_PER_CLIP), tasks=options.tasks or None)[
                :left
            ]
        else:
            (film,) = rng.choices(list(frameforge.FILM_SIZES), list(frameforge.FILM_SIZES.values()))
            clip = frameforge.make_window(
                seed, frames=frames, split=options.split, size=film, close=options.scene == "close", textured=1.0
            )
            questions = frameforge.window_questions(clip, rng, rng.randint(*QUESTIONS_PER_CLIP))[:left]
        left -= len(questions)
        if questions:
            yield clip, questions


def score(clip: Clip, question: Question, reply: str, cluster: int) -> Scored:
    """Scores one reply: intervals by IoU, times by their number, anything else by its text."""
    scored = Scored(cluster, question.task, question.text, question.answer, reply, exact=False)
    if question.intervals is None:
        matches = metrics.time_matches if question.task in TIME_TASKS else metrics.text_matches
        return replace(scored, exact=matches(reply, question.answer))
    predicted, gold = metrics.parse_interval_answer(reply), list(question.intervals)
    full: list[Interval] = [(clip.timestamps[0], clip.timestamps[-1])]
    return replace(scored, exact=predicted == merge_intervals(gold), iou=metrics.interval_iou(predicted, gold),
                   whole_video_iou=metrics.interval_iou(full, gold))  # fmt: skip


def frames_of(clip: Clip, config: ProcessorConfig) -> Frames:
    """The clip's frames in memory, at the size that the processor gives them."""
    width, height = clip.size
    size = compute_frame_sizes(height, width, clip.frames, config).slow
    return Frames(np.stack([resize_bilinear(frame, size) for frame in frameforge.render(clip)]), clip.timestamps)


def frames_through_mp4(clip: Clip, config: ProcessorConfig) -> Frames:
    """The same frames after H.264 at 448 x 448, read back by the media reader as a user's file is.

    The timestamps are those that the file gives; an assertion holds them to the clip's. The file is removed.
    """
    with tempfile.TemporaryDirectory(prefix="keye-eval-") as folder:
        path = Path(folder) / "clip.mp4"
        frameforge.write_mp4(clip, path, FILE_SIZE)
        with VideoReader(fetch_source(path)) as reader:
            # A clip that begins later has a lead-in frame at 0, which is left out.
            begin = clip.timestamps[0] or None
            plan = reader.plan(config, MediaOptions(nframes=clip.frames, video_start=begin))
            frames = reader.read(plan)
    assert len(plan.timestamps) == clip.frames, "the plan takes every frame of the clip"
    late = max(abs(ours - theirs) for ours, theirs in zip(plan.timestamps, clip.timestamps, strict=True))
    assert late <= TIME_TOLERANCE, f"timestamps moved by {late} s on the way through the file"
    return Frames(frames, plan.timestamps)


class ClipPrompt:
    """The prompt of a clip, cut into what all its questions share and the rest of each.

    `trunk` ends with the last visual token; `branches` hold the token ids after it, and their first position is
    `trunk.next_position`. Trunk and branch together are the prompt that `PromptBuilder` makes of video and question.
    `options` are those of the video.
    """

    def __init__(
        self, builder: PromptBuilder, frames: Frames, questions: list[str], options: Mapping[str, Any] | None = None
    ) -> None:
        medium = Medium("video", frames, dict(options or {}))
        full = builder.build([Message("user", (medium, questions[0]))])
        self._medium, self._encode = medium, builder.tokenizer.encode_parts
        self.branches = [self.branch(question) for question in questions]
        shared = full.token_ids.shape[0] - len(self.branches[0])
        assert full.token_ids[shared:].tolist() == self.branches[0], "the branch is the end of the prompt"
        self.trunk = Prompt(
            full.token_ids[:shared], full.position_ids[:, :shared], full.is_visual[:shared],
            int(full.position_ids[0, shared]), full.media,
        )  # fmt: skip

    def branch(self, question: str, thinking: bool | None = None) -> list[int]:
        """What follows on the trunk in the prompt of a question that asks for reasoning, for none, or for neither."""
        segments = CHATML.render([Message("user", (self._medium, question))], thinking=thinking)
        place = next(index for index, segment in enumerate(segments) if segment.value is self._medium)
        return self._encode((str(segment.value), segment.kind == "template") for segment in segments[place + 1 :])

    def continue_trunk(self, branch: Sequence[int], computed: KVCache) -> Prompt:
        """Trunk and branch as the prompt that continues the trunk, which is `computed`."""
        trunk, n = self.trunk, len(branch)
        positions = trunk.next_position + torch.arange(n).expand(3, -1)
        return Prompt(
            torch.cat((trunk.token_ids, torch.tensor(branch))), torch.cat((trunk.position_ids, positions), dim=1),
            torch.cat((trunk.is_visual, torch.zeros(n, dtype=torch.bool))), trunk.next_position + n, (), computed,
        )  # fmt: skip


class _Examiner:
    """Asks the questions about one clip after another and keeps count of tokens and time."""

    def __init__(self, runtime: Runtime, options: EvalOptions) -> None:
        kv = KVOptions(options.kv, options.indexer_kv)
        self.runtime = Runtime.create(runtime.name, runtime.model, runtime.tokenizer, runtime.processor, kv=kv)
        self.engine, self.options, self.config = Engine(self.runtime), options, runtime.config
        end = runtime.tokenizer.token_id("<|im_end|>")
        self.params = SamplingParams(max_tokens=options.max_tokens, stop_token_ids=(end,))
        self.begin = time.perf_counter()
        self.seconds = {"media": 0.0, "prefill": 0.0, "generate": 0.0}
        self.prefilled, self.decoded, self.contexts = 0, 0, list[int]()

    def ask(self, number: int, clip: Clip, questions: list[Question]) -> list[Scored]:
        """The scored replies to the questions about one clip."""
        config, options = self.runtime.processor.config, self.options
        with self._timed("media"):
            frames = frames_through_mp4(clip, config) if options.mp4 else frames_of(clip, config)
            prompt = ClipPrompt(self.runtime.prompts, frames, [question.text for question in questions])
            longest = max(map(len, prompt.branches))
            budget = ContextBudget(self.config.text.max_position_embeddings, longest + options.max_tokens)
            budget.check(prompt.trunk.length, prompt.trunk.media_tokens)
        kind: Any = {"attention": options.mode, "select": options.select}
        with self._timed("prefill"):
            trunk, _ = self.engine.prefill(prompt.trunk, **kind)
        with self._timed("generate"):
            prompts = [prompt.continue_trunk(branch, trunk) for branch in prompt.branches]
            results = [result.completions[0] for result in self.engine.generate(prompts, self.params, **kind)]
            trunk.free()
        replies = [result.token_ids[: -1 if result.finish_reason == "stop" else None] for result in results]
        shared = prompt.trunk.length
        pairs = zip(prompt.branches, replies, strict=True)
        self.contexts += [shared + len(branch) + len(reply) for branch, reply in pairs]
        self.prefilled += shared + sum(map(len, prompt.branches))
        self.decoded += sum(map(len, replies))
        scored = []
        for question, reply, result in zip(questions, replies, results, strict=True):
            text = self.runtime.tokenizer.decode(reply)
            first = math.exp(float(result.raw_logprobs[0]))
            yes = first if text.startswith("yes") else 1 - first
            answer = score(clip, question, parse_reply(text).text, number)
            scored.append(replace(answer, yes=yes if question.answer in YES_NO else None))
        return scored

    def figures(self) -> dict[str, Any]:
        """Context, tokens and time of everything asked so far."""
        sparse, total = self.config.text.sparse, time.perf_counter() - self.begin
        share = None
        if sparse is not None:
            share = round(metrics.mean([min(1.0, sparse.topk / context) for context in self.contexts]), 4)
        return {
            "k_over_context": share,
            "mean_context": round(metrics.mean(self.contexts), 1),
            "prompt_tokens": self.prefilled,
            "generated_tokens": self.decoded,
            "tokens_per_second": round((self.prefilled + self.decoded) / max(1e-9, total), 1),
            "seconds": round(total, 2),
            "seconds_by_phase": {name: round(value, 2) for name, value in self.seconds.items()},
        }

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Adds the wall time of a block to `seconds[part]`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - begin
