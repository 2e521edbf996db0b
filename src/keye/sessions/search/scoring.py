"""A question put to many windows at once: how sure the model is of "yes" in each, and which frames it looked at.

The answer is read from one pair of logits, without writing a word. What the indexers selected while they read the
question says where in a window the model looked; the same for a null question, which asks for nothing in particular, is
stored with each window and is subtracted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keye.engine.continuations import Continuation, StoredSequence, continue_sequences
from keye.engine.engine import Engine
from keye.engine.evidence import counted_layers
from keye.engine.runtime import Runtime
from keye.errors import KeyeError
from keye.sessions.search.search_index import SearchIndex

#: What is asked of every window when it is stored.
NULL_QUESTION: Final = "is there anything in the video?"
YES_NO: Final = ("yes", "no")


@dataclass(frozen=True)
class WindowScore:
    """What a question scored on window `number` of an index. `yes` is the log-odds of the first answer against the
    second, `probability` the same as one, and `mass` the probability of either: where it is small, the model would have
    said something else. `prior` is the log-odds under the null question, None where there is none. `raw_lifts` float32
    [frames] are the shares of each frame in the indexers' selections while the question was read, times the number of
    frames; `lifts` the same minus those of the null question. None where every token was read. `tokens` of the question
    were computed. `evidence` float32 [tokens, frames] are the indexer's scores of each frame for each token of the
    question; None under dense attention."""

    index: SearchIndex
    number: int
    yes: float
    probability: float
    mass: float
    prior: float | None
    tokens: int
    lifts: NDArray[np.float32] | None = field(default=None, repr=False)
    raw_lifts: NDArray[np.float32] | None = field(default=None, repr=False)
    evidence: NDArray[np.float32] | None = field(default=None, repr=False)


def score_windows(
    engine: Engine, windows: Sequence[tuple[SearchIndex, int]], question: str, *,
    answers: tuple[str, str] = YES_NO, evidence: bool = True, check: Callable[[], None] | None = None,
) -> Iterator[WindowScore]:  # fmt: skip
    """Puts a question to windows of one or several indexes, in their order, many in one pass. `answers` are the two
    whose probabilities are compared. `check` is called between passes and may raise. `KeyeError` where an answer is
    more than one token, `OutOfMemory` where memory does not suffice for a single window."""
    if not windows:
        return
    runtime, mode = engine.runtime, windows[0][0].head.attention
    if any(index.head.attention != mode for index, _ in windows):
        raise KeyeError("the indexes were made with different modes of attention; search them one after the other")
    ids, readers = encode_question(runtime, question), [answer_ids(runtime, answer) for answer in answers]

    def open_sequences(start: int, stop: int) -> list[StoredSequence]:
        if runtime.model.device.type != "cpu":  # what was copied for the windows before makes room
            for index in {id(index): index for index, _ in windows}.values():
                index.release()
        return [index.sequence(number) for index, number in windows[start:stop]]

    results = continue_sequences(engine, open_sequences, len(windows), ids, attention=mode, count=evidence, check=check)
    for item in results:
        index, number = windows[item.number]
        yes, mass = read_answer(item.logits, readers)
        shares = frame_shares(item, index.frame_spans(number)) if item.counts is not None else None
        window, lifts, raw = index.all[number], None, None
        if shares is not None:
            raw = shares * len(shares)
            null = 1.0 if window.null_shares is None else window.null_shares * len(shares)
            lifts = (raw - null).astype(np.float32)
        yield WindowScore(
            index, number, yes, float(torch.sigmoid(torch.tensor(yes))), mass, window.prior, len(ids), lifts, raw,
            None if item.scores is None else item.scores.numpy(),
        )  # fmt: skip


def rank_evidence(scores: Sequence[WindowScore]) -> list[NDArray[np.float32]]:
    """What the indexers alone say of every frame, float32 [frames] for each of the windows that a question was put to:
    the score of each token of the question in standard deviations above its mean over all frames of all windows, the
    greatest over the tokens. Empty without evidence."""
    parts = [score.evidence for score in scores if score.evidence is not None]
    if len(parts) != len(scores) or not parts:
        return []
    joined = np.concatenate(parts, axis=1)
    mean, spread = joined.mean(1, keepdims=True), joined.std(1, keepdims=True)
    return [((part - mean) / np.maximum(spread, 1e-6)).max(0).astype(np.float32) for part in parts]


def encode_question(runtime: Runtime, question: str) -> list[int]:
    """Token ids of a question behind the frames of a window."""
    if not question.strip():
        raise KeyeError("the question is empty; ask something about the video")
    return runtime.prompts.encode_around(question, template=runtime.template, thinking=thinking_of(runtime))[1]


def thinking_of(runtime: Runtime) -> bool | None:
    """False where a model may reason and is asked not to, so that the answer comes first. Models that say what they
    were made for do not reason, and never read that they should not."""
    may_reason = "</think>" in runtime.tokenizer.added_tokens and runtime.generation_config.scope is None
    return False if may_reason else None


def answer_ids(runtime: Runtime, answer: str) -> Tensor:
    """The tokens that begin a reply with an answer: as it is and with a capital."""
    forms = {answer, answer.capitalize(), f" {answer}", f" {answer.capitalize()}"}
    single = sorted({ids[0] for form in forms if len(ids := runtime.tokenizer.encode(form)) == 1})
    if not single:
        raise KeyeError(f"the answer {answer!r} is more than one token of {runtime.name}; choose a shorter one")
    return torch.tensor(single)


def read_answer(logits: Tensor, answers: Sequence[Tensor]) -> tuple[float, float]:
    """Log-odds of the first answer against the second under logits float32 [V], and the probability of either."""
    logs = logits.log_softmax(-1)
    first, second = (logs[ids.to(logs.device)].logsumexp(-1) for ids in answers)
    return float(first - second), float(torch.logaddexp(first, second).exp().clamp(max=1.0))


def frame_shares(item: Continuation, spans: NDArray[np.int64]) -> NDArray[np.float32]:
    """The share of the frames' selections that fell on each, float32 [frames], all together 1; even where nothing was
    selected."""
    assert item.counts is not None
    layers = counted_layers(item.counts.shape[0])
    sums = np.concatenate([[0], item.counts[layers].sum(0).numpy().cumsum()])
    hits = (sums[spans[:, 1]] - sums[spans[:, 0]]).astype(np.float32)
    total = float(hits.sum())
    return hits / np.float32(total) if total else np.full(len(spans), 1 / len(spans), dtype=np.float32)
