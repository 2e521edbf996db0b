"""Questions of the data, answered by the engine before and after training."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Final

from keye.api import load
from keye.chat.messages import Medium, Message
from keye.config import load_model_config
from keye.data.samples import Sample
from keye.errors import KeyeError
from keye.files import complete_file
from keye.models.quant_fill import stored_policy
from keye.train.finetune.measure import name_medium
from keye.train.recipes.family.batches import open_stream, prepare
from keye.train.recipes.family.config import FamilyConfig
from keye.train.report import AnsweredSample

#: Questions and their answers before training, in the output folder: a run that goes on does not ask again.
ANSWERS_FILE: Final = "answers.json"
#: Most tokens of an answer; no more than twice those of the data's, and some.
MOST_TOKENS: Final = 512
_MORE_TOKENS: Final = 32
_THINKING: Final = {"think": True, "no_think": False}


def choose_questions(run: FamilyConfig, count: int) -> list[Sample]:
    """The first samples of the held-out data, or of the data where nothing is held out, that end in a reply."""
    (stage,) = run.stages
    stream = open_stream(stage.val_data or stage.data, run.output, seed=0, epochs=1.0)
    replies = (sample for sample in stream if len(sample.messages) > 1 and sample.messages[-1].role == "assistant")
    return [prepare(sample, stage.media, None) for sample in islice(replies, count)]


def answer_questions(run: FamilyConfig, questions: Sequence[Sample], *, trained: bool) -> list[str]:
    """The likeliest reply to each question, of the model or of what was trained: what `keye ask` would print. A
    question that cannot be answered has the reason in its place."""
    folder, adapters = run.model, dict[str, Any]()
    if trained and run.lora is not None:
        adapters = {"adapters": {"trained": run.output}, "adapter": "trained"}
    elif trained:
        folder = run.output
    is_plain = stored_policy(load_model_config(folder)) is None  # the dtype of quantised files is theirs
    dtype = run.dtype if is_plain and run.quant is None else None
    model = load(folder, device=run.device, dtype=dtype, quant=run.quant, **adapters)
    answers = []
    for sample in questions:
        thinking = _THINKING.get(sample.mode or "")
        expected = len(model.tokenizer.encode(_text(sample.messages[-1])))
        most = min(MOST_TOKENS, 2 * expected + _MORE_TOKENS)
        try:
            answer = model.chat(sample.messages[:-1], thinking=thinking, tools=sample.tools, temperature=0.0,
                                max_tokens=most)  # fmt: skip
            answers.append(answer.text)
        except KeyeError as error:
            answers.append(f"({error})")
    del model
    gc.collect()  # the training loop, or the next command, gets the memory
    return answers


def describe_question(sample: Sample) -> AnsweredSample:
    """Question and reply of the data, without answers of a model."""
    *before, reply = sample.messages
    media = [name_medium(medium)[-200:] for medium in sample.media]
    return AnsweredSample("\n".join(map(_text, before)), _text(reply), media=media)


def save_answers(folder: Path, answers: Sequence[AnsweredSample]) -> None:
    """Writes questions and answers into the output folder."""
    data = [asdict(sample) for sample in answers]
    with complete_file(folder / ANSWERS_FILE) as draft:
        draft.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def load_answers(folder: Path) -> list[AnsweredSample]:
    """What `save_answers` wrote; nothing where there is none that can be read."""
    try:
        data: Any = json.loads((folder / ANSWERS_FILE).read_text(encoding="utf-8"))
        return [AnsweredSample(**entry) for entry in data]
    except (OSError, ValueError, TypeError):
        return []


def _text(message: Message) -> str:
    return "".join("[image]" if isinstance(part, Medium) and part.kind == "image" else "[video]"
                   if isinstance(part, Medium) else part for part in message.parts)  # fmt: skip
