"""Which frames an answer rests on: how often the indexers selected each frame's visual tokens while it was written.

Counted are the steps that produced the tokens of the reply, from the one that produced the first; `counted_layers` says
in which layers. A set of selected keys is shared by all heads. It is what the model read, which is not yet a proof of
why it answered so. Knows counts and the layout of a prompt, not pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from torch import Tensor

from keye.config import KeyeConfig
from keye.config.media import MediumKind
from keye.engine.prompt import Prompt
from keye.media.processor import VisualSpan

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
    sums = np.concatenate([[0], counts[layers, : prompt.length].sum(0).cpu().numpy().cumsum()])
    spans = [np.array(frames).T for frames in frame_spans(prompt)]
    hits = [sums[stops] - sums[starts] for starts, stops in spans]
    total = max(1, sum(int(frames.sum()) for frames in hits))
    media: list[MediumEvidence] = []
    for (kind, name, times), (starts, stops), frames in zip(_iter_facts(prompt), spans, hits, strict=True):
        shares, sizes = frames / max(1, frames.sum()), stops - starts
        lifts, share = shares * sizes.sum() / sizes, int(frames.sum()) / total
        media.append(MediumEvidence(kind, name, times, tuple(shares.tolist()), tuple(lifts.tolist()), share))
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
        sizes = [piece.tokens for piece in pieces if isinstance(piece, VisualSpan)]
        if len(sizes) == 1 and 1 < frames <= sizes[0]:  # Preview has one span for all frames, which are of one size
            sizes = [sizes[0] // frames] * frames
        for tokens in sizes:
            first = int(places[done])
            spans.append((first, first + tokens))
            done += tokens
        yield spans


def _iter_facts(prompt: Prompt) -> Iterator[tuple[MediumKind, str, tuple[float, ...]]]:
    """Kind, name and times of each medium, an indexed video first."""
    if prompt.indexed is not None:
        yield "video", prompt.indexed.name, prompt.indexed.timestamps
    for item in prompt.media:
        yield item.kind, item.plan.name if item.plan is not None else "<memory>", item.timestamps
