"""Which frames an answer rests on: how often the indexers selected each frame's visual tokens while it was written.

Counted are the steps that produced the tokens of the reply, from the one that produced the first; `counted_layers` says
in which layers. A set of selected keys is shared by all heads. It is what the model read, which is not yet a proof of
why it answered so. Knows counts and the layout of a prompt, not pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from keye.config import KeyeConfig
from keye.config.media import MediumKind
from keye.engine.prompt import Prompt
from keye.media.processor import Piece, VisualSpan

#: Frames that a summary names.
TOP_FRAMES: Final = 5
#: Digits of shares and lifts in plain data.
_DIGITS: Final = 5


@dataclass(frozen=True)
class MediumEvidence:
    """One medium of a request. Of each frame (an image has one): its time in seconds if known, the share of the
    medium's selections that fell on it, all together 1, and the lift: the share over that of an even spread over the
    medium's tokens. `share` is that of the medium among all media. Without any selection all shares are 0."""

    kind: MediumKind
    name: str
    times: tuple[float, ...]
    shares: tuple[float, ...]
    lifts: tuple[float, ...]
    share: float

    def top(self, count: int = TOP_FRAMES) -> list[int]:
        """The frames selected most for their size, the first one first, at most `count`; none that was selected less
        than an even spread would have it."""
        order = sorted(range(len(self.lifts)), key=lambda i: (-self.lifts[i], i))
        return [i for i in order[:count] if self.lifts[i] >= 1]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `top` are indices of frames."""
        return {
            "kind": self.kind, "name": self.name, "share": round(self.share, _DIGITS), "top": self.top(),
            "times": list(self.times), "shares": [round(share, _DIGITS) for share in self.shares],
            "lifts": [round(lift, _DIGITS) for lift in self.lifts],
        }  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """What an answer rests on: the media in order, or the `reason` why nothing was selected. `steps` of the reply were
    counted: those before the context grew beyond the model's top-k select everything and tell nothing."""

    media: tuple[MediumEvidence, ...]
    steps: int
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"reason": self.reason, "steps": self.steps, "media": [medium.to_dict() for medium in self.media]}


def counted_layers(layers: int) -> slice:
    """The layers whose selections are evidence: all but the lowest third, whose choices are no better than chance in
    keye-nano. Chosen on training clips among those that `benchmarks/evidence.py` compares."""
    return slice(layers // 3, layers)


def make_evidence(
    counts: Tensor | None, steps: int, prompt: Prompt, config: KeyeConfig, *, has_text: bool = True
) -> Evidence:
    """The evidence of a reply to `prompt`.

    `counts` int64 [layers, positions >= T] of the counted steps (`keye.models.attention.Span`), None where attention
    was dense; `steps` is how many there were with more than k tokens before them. An answer without
    text rests on nothing.
    """
    if not prompt.media and prompt.indexed is None:
        return Evidence((), 0, "the request has no media")
    if config.text.sparse is None or counts is None:
        return Evidence((), 0, "attention was dense: every token was read, none selected")
    if not has_text:
        return Evidence((), 0, "the answer is empty: it rests on no frame")
    if steps == 0:
        return Evidence(
            (), 0, f"the context is not longer than the {config.text.sparse.topk:,} tokens that the indexer selects: "
            "every token was read",
        )  # fmt: skip
    layers = counted_layers(counts.shape[0])
    selected = counts[layers, : prompt.token_ids.shape[0]].sum(0).cpu().numpy()
    per_frame = [_per_frame(selected, spans) for spans in frame_spans(prompt)]
    total = max(1, sum(int(hits.sum()) for hits, _ in per_frame))
    media = [
        _of_medium(facts, hits, sizes, int(hits.sum()) / total)
        for facts, (hits, sizes) in zip(_iter_facts(prompt), per_frame, strict=True)
    ]
    return Evidence(tuple(media), steps)


def frame_spans(prompt: Prompt) -> Iterator[list[tuple[int, int]]]:
    """Of each medium, an indexed video first, the first and one past the last visual token of every frame, as positions
    in the prompt."""
    places, done = np.flatnonzero(prompt.is_visual.numpy()), 0
    media = [(item.pieces, item.frame_count) for item in prompt.media]
    if prompt.indexed is not None:
        media.insert(0, (prompt.indexed.pieces, prompt.indexed.plan.get("frames", 1)))
    for pieces, frames in media:
        spans = []
        for tokens in _tokens_per_frame(pieces, frames):
            first = int(places[done])
            spans.append((first, first + tokens))
            done += tokens
        yield spans


def _tokens_per_frame(pieces: Sequence[Piece], frames: int) -> list[int]:
    """Preview has one span for all frames of a video, which are of one size."""
    spans = [piece.tokens for piece in pieces if isinstance(piece, VisualSpan)]
    return [spans[0] // frames] * frames if len(spans) == 1 and 1 < frames <= spans[0] else spans


def _per_frame(
    selected: NDArray[np.int64], spans: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Selections and tokens of each frame."""
    sums = np.concatenate([[0], np.cumsum(selected)])
    starts, stops = np.array(spans).T
    return sums[stops] - sums[starts], stops - starts


def _iter_facts(prompt: Prompt) -> Iterator[tuple[MediumKind, str, tuple[float, ...]]]:
    """Kind, name and times of each medium, an indexed video first."""
    if prompt.indexed is not None:
        yield "video", prompt.indexed.name, prompt.indexed.timestamps
    for item in prompt.media:
        yield item.kind, item.plan.name if item.plan is not None else "<memory>", item.timestamps


def _of_medium(
    facts: tuple[MediumKind, str, tuple[float, ...]], hits: NDArray[np.int64], sizes: NDArray[np.int64], share: float
) -> MediumEvidence:
    kind, name, times = facts
    shares = hits / max(1, hits.sum())
    lifts = shares * sizes.sum() / sizes
    return MediumEvidence(kind, name, times, tuple(shares.tolist()), tuple(lifts.tolist()), share)
