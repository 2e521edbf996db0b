"""FrameForge clips as packed training batches. Numpy only, so that a light worker process can make them ahead.

Legend: B clips, F frames, P trunk tokens (the video), L tail tokens (questions and answers, padded).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from keye.chat.tokenizer import Tokenizer
from keye.config import ProcessorConfig, load_processor_config
from keye.data.frameforge import (
    FILM_SIZES,
    Clip,
    Question,
    dense_labels,
    make_clip,
    make_window,
    picture_questions,
    questions,
    render,
    trace,
    window_questions,
)
from keye.media.positions import build_position_ids
from keye.media.sizes import compute_frame_sizes
from keye.train.batches import BatchService, StepBatch, derived_seed
from keye.train.modes import write_reply
from keye.train.recipes.nano.config import AutoRule, Mix, NanoStage, NanoTable
from keye.train.recipes.nano.evidence import (
    Array,
    Comparison,
    Events,
    Finding,
    Pointer,
    PointerMaker,
    Sightings,
    TrunkLayout,
    events_of,
    sightings_of,
    trunk_pointers,
)

IGNORE = -100
CAPITAL_CHANCE = 0.25
#: What a prompt ends with that asks for reasoning, and one that asks for none.
THOUGHT, NO_THOUGHT = "<think>\n", "<think>\n\n</think>\n\n"
#: The reasoning of questions that are answered at a glance.
NOTHING_NOTED = "none"


@dataclass(frozen=True)
class Form:
    """How a question is answered: what opens the reply, which belongs to the prompt, and the reply itself."""

    opening: str
    reply: str


def choose_form(
    clip: Clip, question: Question, thinking: float, rng: random.Random, auto: Sequence[AutoRule] = ()
) -> Form:
    """A question in a thinking mode with the chance `thinking`: in two of three after its reasoning where it has some,
    else mostly with the opening that asks for none. The others have no opening, and reasoning where `auto` says so."""
    reasoning = trace(clip, question)
    if rng.random() >= thinking:
        thinks = any(_is_meant(rule, clip, question, reasoning) for rule in auto)
        return Form("", write_reply(question.answer, reasoning if thinks else None, "auto", "prefill"))
    if rng.random() < (1 / 3 if reasoning else 5 / 6):
        return Form(NO_THOUGHT, question.answer)
    reply = write_reply(question.answer, reasoning or NOTHING_NOTED, "think", "prefill")
    return Form(THOUGHT, reply.removeprefix(THOUGHT))


def _is_meant(rule: AutoRule, clip: Clip, question: Question, reasoning: str) -> bool:
    items = reasoning.count("; ") + 1
    return rule.task == question.task and clip.frames >= rule.frames and items >= rule.items


@dataclass(frozen=True)
class AnswerSpan:
    """Where one answer lies in a batch: row, tail positions start .. stop of the predicting tokens, the question."""

    row: int
    start: int
    stop: int
    question: Question


@dataclass(frozen=True)
class PackedBatch(Generic[Array]):
    """Arrays when the batch is made, tensors when it is learnt: `frames` uint8 [B, F, H, W, 3]; `trunk_ids` int64
    [B, P]; `tail_ids`, `labels` int64 [B, L] (labels are the next token, `IGNORE` where nothing is learnt); `segments`
    int64 [n, 3], start, stop and number of the segment above in the sequences [B, P + L] laid behind one another: of
    each, the trunk (-1 above) and then its questions in order;
    `positions` int64 [B, 3, P + L]; `time_ids` int64 [B, F, 2], the tokens of each frame's timestamp (F is 0 for
    pictures, and for frames without times). `keye.train.recipes.nano.evidence` describes the rest."""

    frames: Array
    trunk_ids: Array
    tail_ids: Array
    segments: Array
    labels: Array
    positions: Array
    time_ids: Array
    answers: tuple[AnswerSpan, ...]
    layout: TrunkLayout
    pointers: tuple[Pointer, ...]
    comparisons: tuple[Comparison, ...]
    findings: tuple[Finding, ...]
    events: Events[Array]
    sightings: Sightings[Array]


@dataclass(frozen=True)
class VisionBatch(Generic[Array]):
    """Single frames uint8 [B, H, W, 3] and, for each visual token, targets [B, cells, k]: `ids` int64 (0 none) and
    `offset` float32 [B, cells, 2] (NaN where no object is centred)."""

    frames: Array
    ids: Array
    offset: Array


#: Names and class counts of the columns of `VisionBatch.ids`.
VISION_TARGETS = (("color", 9), ("shape", 6), ("size", 3), ("letter 1", 37), ("letter 2", 37), ("cover color", 9),
                  ("cover shape", 6), ("background", 9), ("row", 9), ("column", 9),
                  ("letter 1 order", 9), ("letter 2 order", 9), ("text length", 9))  # fmt: skip


class BatchMaker:
    """Makes batches from seeds; the same seed gives the same batch."""

    def __init__(self, tokenizer: Tokenizer, processor: ProcessorConfig, size: tuple[int, int] = (112, 112)) -> None:
        self.tokenizer, self.processor, self.size = tokenizer, processor, size
        encode = tokenizer.encode
        self.video_pad, self.image_pad = tokenizer.token_id("<|video_pad|>"), tokenizer.token_id("<|image_pad|>")
        self.prefix = encode("<|im_start|>user\n<|vision_start|>", special=True)
        self.suffix = encode("<|vision_end|>", special=True)
        self.turn = encode("<|im_end|>\n<|im_start|>assistant\n", special=True)
        self.end = encode("<|im_end|>", special=True)
        self.pointers = PointerMaker(encode)
        self.columns, self.rows = size[0] // processor.factor, size[1] // processor.factor

    def packed(self, config: NanoTable, seed: int) -> PackedBatch[NDArray]:
        """A batch for the language stages: one entry of the mix, clips and questions drawn from `seed`."""
        rng = random.Random(seed)
        mix = rng.choices(config.mix, [m.weight for m in config.mix])[0]
        if mix.scene != "clip":
            return self._windows(mix, rng)
        text_chance = config.text_chance if mix.text_chance is None else mix.text_chance
        clips: list[Clip] = []
        chosen_questions: list[list[Question]] = []
        while len(clips) < mix.clips:
            plain = rng.random() < config.plain_times
            clip = make_clip(rng.getrandbits(60), frames=mix.frames, objects=config.objects, split=config.split,
                             size=self.size, text_chance=text_chance,
                             start=0.0 if plain else None, step=0.5 if plain else None)  # fmt: skip
            if mix.pictures:
                drawn = picture_questions(clip, rng, mix.questions)
            else:
                drawn = questions(clip, rng, mix.questions, weights=config.task_weights or None)
            if drawn:
                clips.append(clip)
                chosen_questions.append(_capitalise(drawn, rng))
        forms = None
        if config.thinking:
            forms = [[choose_form(clip, question, config.thinking, rng, config.auto) for question in items]
                     for clip, items in zip(clips, chosen_questions, strict=True)]  # fmt: skip
        return self.pack(clips, chosen_questions, pictures=mix.pictures, forms=forms)

    def _windows(self, mix: Mix, rng: random.Random) -> PackedBatch[NDArray]:
        """A batch of windows in one aspect ratio."""
        film = rng.choices(list(FILM_SIZES), list(FILM_SIZES.values()))[0]
        clips = [
            make_window(rng.getrandbits(60), frames=mix.frames, size=film, close=mix.scene == "close")
            for _ in range(mix.clips)
        ]
        return self.pack(clips, [_capitalise(window_questions(clip, rng, mix.questions), rng) for clip in clips])

    def pack(
        self, clips: Sequence[Clip], questions: Sequence[Sequence[Question]], *, pictures: bool = False,
        forms: Sequence[Sequence[Form]] | None = None,
    ) -> PackedBatch[NDArray]:  # fmt: skip
        """Packs clips of equally many frames and one size with their questions, each frame as the processor would size
        it; `pictures` shows the only frame as an image."""
        film = clips[0].size
        size = compute_frame_sizes(film[1], film[0], clips[0].frames, self.processor).slow
        rows, columns = (side // self.processor.factor for side in size)
        trunks, times = zip(*(self._trunk(clip, pictures, rows * columns) for clip in clips), strict=True)
        trunk_ids = np.array(trunks, dtype=np.int64)
        patch, pad = self.processor.merge_size, self.image_pad if pictures else self.video_pad
        grid = np.tile([1, rows * patch, columns * patch], (clips[0].frames, 1))
        trunk_positions, delta = build_position_ids(trunk_ids[0], {pad: grid}, merge_size=patch)
        first = trunk_ids.shape[1] + delta
        if forms is None:
            forms = [[Form("", question.answer) for question in items] for items in questions]
        rendered = [
            [self._render(question, form) for question, form in zip(items, own, strict=True)]
            for items, own in zip(questions, forms, strict=True)
        ]
        places = [find_places([len(head) + len(tail) - 1 for _, head, tail in items]) for items in rendered]
        shape = (len(clips), max(row[-1][1] for row in places))
        tail_ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        offsets, segments = np.zeros(shape, np.int64), list[tuple[int, int, int]]()
        answers: list[AnswerSpan] = []
        cells, prefix, length = rows * columns, len(self.prefix), trunk_ids.shape[1]
        text = (length - prefix - len(self.suffix)) // clips[0].frames - cells
        layout = TrunkLayout(prefix, text, cells, columns, clips[0].frames, length)
        pointers: list[Pointer] = []
        comparisons: list[Comparison] = []
        findings: list[Finding] = []
        for row, items in enumerate(rendered):
            first_token, trunk = row * (length + shape[1]), len(segments)
            segments.append((first_token, first_token + length, -1))
            pointers += trunk_pointers(clips[row], layout, row)
            rows_of_answers = zip(items, places[row], forms[row], strict=True)
            for (question, head, tail), (start, stop), form in rows_of_answers:
                segments.append((first_token + length + start, first_token + length + stop, trunk))
                answer = start + len(head) - 1
                tail_ids[row, start:stop] = head + tail[:-1]
                labels[row, answer:stop] = tail
                offsets[row, start:stop] = np.arange(stop - start)
                answers.append(AnswerSpan(row, answer, stop, question))
                if compared := self.pointers.comparison(clips[row], question, head, row, start):
                    comparisons.append(compared)
                findings += self.pointers.findings(clips[row], question, head, row, start)
                pointers += self.pointers.of_question(clips[row], layout, question, head, row, start)
                pointers += self.pointers.of_answer(clips[row], layout, question, form.reply, tail, row, answer)
        positions = np.concatenate(
            [np.broadcast_to(trunk_positions, (len(clips), *trunk_positions.shape)),
             np.broadcast_to((first + offsets)[:, None], (len(clips), 3, shape[1]))], axis=2)  # fmt: skip
        frames = np.stack([_resize(render(clip), size) for clip in clips])
        time_ids = np.array(times, np.int64).reshape(len(clips), -1, 2)
        return PackedBatch(frames, trunk_ids, tail_ids, np.array(segments, np.int64), labels, positions, time_ids,
                           tuple(answers), layout, tuple(pointers), tuple(comparisons), tuple(findings),
                           events_of(clips), sightings_of(clips, layout))  # fmt: skip

    def _trunk(self, clip: Clip, pictures: bool, cells: int) -> tuple[list[int], list[list[int]]]:
        """The trunk of a video with the tokens of its times, or that of an image, which has none."""
        ids, times = list(self.prefix), []
        if pictures:
            return ids + [self.image_pad] * cells + self.suffix, []
        for seconds in clip.timestamps:
            text = self.tokenizer.encode(self.processor.frame_text.format(seconds=seconds), special=True)
            times += [text[-2:]] if len(text) > 2 else []
            ids += text + [self.video_pad] * cells
        return ids + self.suffix, times

    def _render(self, question: Question, form: Form) -> tuple[Question, list[int], list[int]]:
        """The question with its token ids: question and turn, reply and end."""
        head = self.tokenizer.encode(question.text) + self.turn + self.tokenizer.encode(form.opening, special=True)
        return question, head, self.tokenizer.encode(form.reply, special=True) + self.end

    def vision(self, config: NanoTable, seed: int) -> VisionBatch[NDArray]:
        """A batch of single frames for the vision stage."""
        rng = random.Random(seed)
        frames: list[NDArray[np.uint8]] = []
        ids: list[NDArray[np.int64]] = []
        offsets: list[NDArray[np.float32]] = []
        row, column = np.indices((self.rows, self.columns))
        while len(frames) < config.batch:
            clip = make_clip(
                rng.getrandbits(60), frames=2, objects=config.objects, size=self.size, text_chance=config.text_chance
            )
            labels = dense_labels(clip, 0, self.processor.factor)
            columns = [labels.color, labels.shape, labels.size, labels.letters[..., 0], labels.letters[..., 1],
                       labels.cover_color, labels.cover_shape, np.full_like(row, labels.background + 1),
                       np.minimum(row, 7) + 1, np.minimum(column, 7) + 1,
                       labels.letter_order[..., 0].clip(max=8), labels.letter_order[..., 1].clip(max=8),
                       labels.text_length.clip(max=8)]  # fmt: skip
            frames.append(render(clip)[0])
            ids.append(np.stack(columns, axis=-1).reshape(-1, len(columns)))
            offset = np.where(labels.color[..., None] > 0, labels.offset, np.nan)
            offsets.append(offset.reshape(-1, 2).astype(np.float32))
        return VisionBatch(np.stack(frames), np.stack(ids), np.stack(offsets))


def _capitalise(questions: list[Question], rng: random.Random) -> list[Question]:
    """Some of them begin with a capital letter, as people write them."""
    return [
        replace(question, text=question.text[:1].upper() + question.text[1:])
        if rng.random() < CAPITAL_CHANCE else question for question in questions
    ]  # fmt: skip


def _resize(frames: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Frames [F, H, W, 3] at `size` (height, width), smoothed as the processor does."""
    if frames.shape[1:3] == size:
        return frames
    return np.stack(
        [np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BILINEAR)) for frame in frames]
    )


def find_places(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(start, stop) of each branch, one behind the other."""
    stops = list(accumulate(lengths))
    return [(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]


@lru_cache(maxsize=2)
def batch_maker(folder: Path) -> BatchMaker:
    """The maker for the tokenizer and processor of a model folder."""
    return BatchMaker(Tokenizer.from_file(folder), load_processor_config(folder))


def make_batch(stage: NanoStage, folder: Path, seed: int) -> VisionBatch[NDArray] | PackedBatch[NDArray]:
    """The batch of `seed` for a stage; other processes call it."""
    maker = batch_maker(folder)
    if stage.nano.kind == "vision":
        return maker.vision(stage.nano, seed)
    return maker.packed(stage.nano, seed)


class NanoBatches:
    """FrameForge has no end and no order: a batch is the function of a seed. A step counts its micro-batches, each of
    which has the same weight whatever is in it."""

    def __init__(self, make: Callable[[int], Future[Any]], ahead: int, *, seed: int, rank: int, size: int,
                 accumulation: int, step: int, close: Callable[[], None]) -> None:  # fmt: skip
        self._make, self._ahead, self._seed, self._step, self.close = make, ahead, seed, step, close
        self._mine, self._count = range(rank, accumulation * size, size), float(accumulation * size)
        self._waiting: deque[list[Future[Any]]] = deque()

    def next(self) -> StepBatch:
        """Step after step, without end."""
        while len(self._waiting) < self._ahead:
            step = self._step + len(self._waiting)
            self._waiting.append([self._make(derived_seed(self._seed, step, number)) for number in self._mine])
        micro = [future.result() for future in self._waiting.popleft()]
        self._step += 1
        return StepBatch(micro, self._count, {"step": self._step})


def open_batches(
    stage: NanoStage, folder: Path, *, seed: int, rank: int, size: int, state: dict[str, Any] | None,
    decode: str | None = None,
) -> NanoBatches:  # fmt: skip
    """The batches of a stage, made here or by the workers of a decode service."""
    step = 0 if state is None else int(state["step"])
    options = {"seed": seed, "rank": rank, "size": size, "accumulation": stage.accumulation, "step": step}
    if decode is None:
        return NanoBatches(lambda seed: _done(make_batch(stage, folder, seed)), 1, close=lambda: None, **options)
    service = BatchService(decode)
    make = partial(service.submit, make_batch, stage, folder)
    return NanoBatches(make, service.ahead, close=service.close, **options)


def _done(batch: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(batch)
    return future
