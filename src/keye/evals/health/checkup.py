"""Short questions that tell a healthy model from one that was set up or converted wrongly: what `keye doctor` asks.

Each probe is one number. Log-probabilities of known answers are taken under the template and the frame text in use and
under keye's own, so that either differs from damaged weights; `keye.evals.health.verdict` compares and concludes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from keye.api import Keye
from keye.chat.messages import Medium, Message
from keye.chat.replies import SCALE
from keye.chat.template import Segment, template_of
from keye.chat.times import parse_intervals
from keye.config import ProcessorConfig
from keye.data import frameforge
from keye.data.frameforge import Clip, Question
from keye.engine.media import Frames
from keye.engine.prompt import PromptBuilder
from keye.engine.request import GenerationRequest, Prefilled
from keye.errors import KeyeError
from keye.evals.tasks.frameforge import FRAME_SIZE, EvalOptions, exam, frames_of, score
from keye.hub import asset
from keye.media.processor import Processor
from keye.quant.layers import QuantizedWeight
from keye.scoring import metrics

#: A stretch of ordinary text, written for this purpose.
TEXT: Final = (
    "The river was low that summer, and in the evenings the children of the village crossed it on the flat stones to "
    "look for their goats on the other side. Their grandmother waited on the bridge with a lamp, counted them when "
    "they came back, and said the same thing to each of them: that the water remembers where it used to be."
)
#: Side of the pictures with the word and the box, and where the box is in it.
SIDE: Final = 224
BOX: Final = (0.6, 0.25, 0.9, 0.55)
#: When the red circle is visible in the demo clip.
DEMO: Final = ("when is the red circle visible?", (3.0, 8.5))
#: Questions whose answers are scored, of pictures and of videos.
SCORED: Final = 24
#: Matrices that are looked at, rows of each, and neighbouring numbers of a row that are compared.
MATRICES: Final = 32
GROUPS: Final = 32
GROUP: Final = 64

Progress = Callable[[int, int], None]
Probes = dict[str, float]


@dataclass(frozen=True)
class Known:
    """A question about a medium and its answer."""

    medium: Medium
    question: str
    answer: str


def run_checkup(model: Keye, questions: int = 50, progress: Progress | None = None, *, scored: int = SCORED) -> Probes:
    """The number of each probe, by name:

    demo: intersection over union of the answer about the bundled clip. frameforge: share of right answers to
    `questions` questions about generated clips. word, box: 1 or the overlap, for a drawn word and square.
    text: nats for a token of ordinary text. pictures, pictures_own: nats for a token of known answers about pictures,
    under the template in use and under keye's own. times, times_own: the same about videos' times, under the frame
    text in use and under that of keye for the release. levels: different values in 64 numbers of a row, the median of
    all matrices. `scored` questions of pictures, and as many of videos, are scored.
    """
    pictures, times = picture_questions(scored), time_questions(scored)
    steps: list[tuple[str, Callable[[], float]]] = [
        ("levels", lambda: count_levels(model)),
        ("text", lambda: text_nats(model)),
        ("pictures", lambda: answer_nats(model, pictures)),
        ("pictures_own", lambda: answer_nats(model, pictures, own_template=True)),
        ("times", lambda: answer_nats(model, times)),
        ("times_own", lambda: answer_nats(model, times, own_template=True, own_frame_text=True)),
        ("demo", lambda: demo_overlap(model)),
        ("word", lambda: read_word(model)),
        ("box", lambda: box_overlap(model)),
    ]
    probes, total = Probes(), len(steps) + questions
    for done, (name, measure) in enumerate(steps):
        if progress is not None:
            progress(done, total)
        probes[name] = round(measure(), 4)
    advance = None if progress is None else (lambda requested: progress(len(steps) + requested, total))
    probes["frameforge"] = round(frameforge_share(model, questions, advance), 4)
    return probes


# --------------------------------------------------------------------------------------------------------------------
# Answers


def demo_overlap(model: Keye) -> float:
    """How well the bundled clip's question is answered."""
    question, interval = DEMO
    answer = model.ask(asset("demo.mp4"), question, max_tokens=256)
    return metrics.interval_iou(list(answer.intervals), [interval])


def read_word(model: Keye) -> float:
    """Whether a drawn word is read."""
    clips = (frameforge.make_clip(seed, frames=2, objects=1, size=(SIDE, SIDE)) for seed in itertools.count())
    clip = next(clip for clip in clips if clip.scene.text is not None and clip.scene.text.visible(0))
    assert clip.scene.text is not None
    word = clip.scene.text.content
    reply = model.ask(np.ascontiguousarray(frameforge.render(clip)[0]), "what does the text say?", max_tokens=64).text
    return float(word.casefold() in reply.casefold())


def box_overlap(model: Keye) -> float:
    """Intersection over union of the box that the model draws around a red square and the square."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(picture).rectangle([round(SIDE * share) for share in BOX], fill="red")
    answer = model.ask(picture, "Where is the red square? Answer with its bounding box.", max_tokens=128)
    boxes = [region.points for region in answer.regions if region.kind == "box"]
    square = [SCALE * share for share in BOX]
    return max((_overlap([number for point in box for number in point], square) for box in boxes), default=0.0)


def _overlap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    width = min(ours[2], theirs[2]) - max(ours[0], theirs[0])
    height = min(ours[3], theirs[3]) - max(ours[1], theirs[1])
    common = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (ours, theirs)]
    return common / (sum(areas) - common) if sum(areas) > common else 0.0


def frameforge_share(model: Keye, questions: int, progress: Callable[[int], None] | None = None) -> float:
    """The share of right answers to questions about generated clips."""
    right = requested = 0
    for clip, own in exam(EvalOptions(questions=questions, seed=7)):
        frames = frames_of(clip, model.processor.config)
        messages = [[Message("user", (Medium("video", frames), question.text))] for question in own]
        for question, answer in zip(own, model.batch(messages, max_tokens=128), strict=True):
            right += is_right(clip, question, answer.text)
        requested += len(own)
        if progress is not None:
            progress(requested)
    return right / requested


def is_right(clip: Clip, question: Question, reply: str) -> bool:
    """Whether a reply, which may be a sentence, has the right answer."""
    if score(clip, question, reply, 0).correct:
        return True
    if question.intervals is not None:
        return metrics.interval_iou(parse_intervals(reply), list(question.intervals)) >= 0.5
    words, answer = reply.casefold().replace(".", " ").split(), question.answer.casefold()
    return words[:1] == [answer] or (len(reply) < 200 and answer in reply.casefold() and answer not in ("yes", "no"))


# --------------------------------------------------------------------------------------------------------------------
# Log-probabilities


def text_nats(model: Keye) -> float:
    """Nats for a token of ordinary text."""
    (scores,) = model.engine.score([model.tokenizer.encode(TEXT)])
    return -float(scores.logprobs.mean())


def picture_questions(count: int) -> list[Known]:
    """Questions about still pictures."""
    known = list[Known]()
    for seed in range(count):
        clip = frameforge.make_clip(1000 + seed, frames=2, objects=3, size=FRAME_SIZE)
        medium = Medium("image", np.ascontiguousarray(frameforge.render(clip)[0]))
        requested = frameforge.picture_questions(clip, random.Random(seed), 1)
        known += [Known(medium, question.text, question.answer) for question in requested]
    return known


def time_questions(count: int) -> list[Known]:
    """Questions about the times of videos; media are prepared when they are put."""
    known = list[Known]()
    for seed in range((count + 1) // 2):
        clip = frameforge.make_clip(2000 + seed, frames=16, objects=3, size=FRAME_SIZE)
        medium = Medium("video", Frames(frameforge.render(clip), clip.timestamps))
        requested = frameforge.questions(clip, random.Random(seed), 2, tasks=("ground", "start", "end"))
        known += [Known(medium, question.text, question.answer) for question in requested]
    return known


def answer_nats(
    model: Keye, known: Iterable[Known], *, own_template: bool = False, own_frame_text: bool = False
) -> float:
    """Nats for a token of known answers, with keye's own template or frame text where that is wanted."""
    runtime, config = model.runtime, model.processor.config
    # Of a release whose template only its checkpoint has, that one is the only right one.
    own = template_of(config.release, runtime.generation_config.default_system)
    own_template = own_template and not config.release.needs_template
    builder = runtime.prompts
    if own_frame_text:
        usual = ProcessorConfig.of(config.release).frame_text
        processor = Processor(replace(config, frame_text=usual))
        builder = PromptBuilder(model.config, model.tokenizer, processor)
    requests, lengths = list[GenerationRequest](), list[int]()
    for item in known:
        messages = [Message("user", (item.medium, item.question))]
        segments = builder.render(messages, template=own if own_template else runtime.template)
        segments.append(Segment("text", item.answer))
        request = model.request(messages, prompt_logprobs=0, max_tokens=1)
        requests.append(replace(request, prompt=builder.lay_out(segments) if own_frame_text else segments))
        lengths.append(len(model.tokenizer.encode(item.answer)))
    nats, tokens = 0.0, 0
    scores = dict[int, tuple[Any, ...]]()
    for number, event in model.engine.run(requests):
        if isinstance(event, Prefilled) and event.prompt_probs is not None:
            scores[number] = event.prompt_probs
    for number, length in enumerate(lengths):
        nats -= sum(prob.logprob for prob in scores[number][-length:])
        tokens += length
    return nats / tokens


# --------------------------------------------------------------------------------------------------------------------
# Weights


def count_levels(model: Keye) -> float:
    """The median over matrices of how many different values 64 neighbouring numbers of a row have: 64 or nearly so in
    16 bits, 12 or more in 4 bits with a scale for each group."""
    counts = [value for matrix in _matrices(model) if (value := _levels(matrix)) is not None]
    if not counts:
        raise KeyeError("the model has no matrices to look at")
    return float(torch.tensor(counts).median())


def _matrices(model: Keye) -> Iterable[Tensor]:
    """A few rows of matrices all over the decoder, as numbers."""
    places = list[tuple[str, torch.nn.Module]]()
    for name, module in model.model.model.named_modules():
        is_plain = "norm" not in name and any(weight.dim() > 1 for weight in module.parameters(recurse=False))
        if isinstance(module, QuantizedWeight) or (is_plain and not name.endswith(".gate")):
            places.append((name, module))
    for _, module in places[:: max(1, len(places) // MATRICES)]:
        if isinstance(module, QuantizedWeight):
            tensor = module.tensor
            yield (tensor[0] if len(tensor.shape) > 2 else tensor)[:GROUPS].dequantize()
        else:
            matrices = [weight for weight in module.parameters(recurse=False) if weight.dim() > 1]
            yield from (weight.detach().flatten(0, -2)[:GROUPS].float() for weight in matrices)


def _levels(rows: Tensor) -> float | None:
    width = rows.shape[-1] // GROUP * GROUP
    if not width:
        return None
    groups = rows[:, :width].unflatten(-1, (-1, GROUP)).flatten(0, 1)[: GROUPS * 4].sort(-1).values
    different = 1 + (groups[:, 1:] != groups[:, :-1]).sum(-1)
    return float(different.float().median())
