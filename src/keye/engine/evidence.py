"""Which frames an answer rests on: how often the indexers selected each frame's visual tokens while it was written.

Counted are the steps that produced the tokens of the reply, from the one that produced the first; `counted_layers` says
in which layers. A set of selected keys is shared by all heads. It is what the model read, which is not yet a proof of
why it answered so. Knows counts and the layout of a prompt, not pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from keye.config import KeyeConfig
from keye.engine.prompt import Prompt
from keye.media.processor import Kind, MediaItem, VisualSpan

#: Frames that a summary names.
TOP_FRAMES: Final = 5
#: Digits of shares and lifts in plain data.
_DIGITS: Final = 5


@dataclass(frozen=True)
class MediumEvidence:
    """One medium of a request. Of each frame (an image has one): its time in seconds if known, the share of the
    medium's selections that fell on it, all together 1, and the lift: the share over that of an even spread over the
    medium's tokens. `share` is that of the medium among all media. Without any selection all shares are 0."""

    kind: Kind
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


def make_evidence(counts: Tensor | None, steps: int, prompt: Prompt, config: KeyeConfig) -> Evidence:
    """The evidence of a reply to `prompt`.

    `counts` int64 [layers, positions >= T] of the counted steps (`keye.models.attention.Span`), None where attention
    was dense; `steps` is how many there were with more than k tokens before them.
    """
    seen = list(_media(prompt))
    if not seen:
        return Evidence((), 0, "the request has no media")
    if config.text.sparse is None or counts is None:
        return Evidence((), 0, "attention was dense: every token was read, none selected")
    if steps == 0:
        return Evidence(
            (), 0, f"the context is not longer than the {config.text.sparse.topk:,} tokens that the indexer selects: "
            "every token was read",
        )  # fmt: skip
    layers = counted_layers(counts.shape[0])
    selected = counts[layers, : prompt.token_ids.shape[0]].sum(0).cpu().numpy()
    per_frame = [_per_frame(selected, spans) for spans in frame_spans(prompt, config)]
    total = max(1, sum(int(found.sum()) for found, _ in per_frame))
    made = [
        _of_medium(one, found, sizes, int(found.sum()) / total)
        for one, (found, sizes) in zip(seen, per_frame, strict=True)
    ]
    return Evidence(tuple(made), steps)


class _Seen(NamedTuple):
    """What evidence needs of a medium: its frames' tokens and times."""

    kind: Kind
    name: str
    frame_tokens: list[int]
    times: tuple[float, ...]


def _media(prompt: Prompt) -> Iterator[_Seen]:
    """The media of a prompt in order, that of an index first."""
    if (video := prompt.indexed) is not None:
        tokens = [piece.tokens for piece in video.pieces if isinstance(piece, VisualSpan)]
        yield _Seen("video", str(video.plan.get("name", video.name)), tokens, video.timestamps)
    for item in prompt.media:
        name = item.plan.name if item.plan is not None else "<memory>"
        yield _Seen(item.kind, name, _tokens_per_frame(item), item.timestamps)


def frame_spans(prompt: Prompt, config: KeyeConfig) -> Iterator[list[tuple[int, int]]]:
    """Of each medium the first and one past the last visual token of every frame, as positions in the prompt."""
    ids = prompt.token_ids.numpy()
    places = {kind: np.flatnonzero(ids == token) for kind, token in
              (("image", config.image_token_id), ("video", config.video_token_id))}  # fmt: skip
    done = {"image": 0, "video": 0}
    for one in _media(prompt):
        spans = []
        for tokens in one.frame_tokens:
            first = int(places[one.kind][done[one.kind]])
            spans.append((first, first + tokens))
            done[one.kind] += tokens
        yield spans


def _tokens_per_frame(item: MediaItem) -> list[int]:
    """Preview has one span for all frames of a video, which are of one size."""
    spans = [piece.tokens for piece in item.pieces if isinstance(piece, VisualSpan)]
    frames = item.frame_count
    return spans if len(spans) == frames else [spans[0] // frames] * frames


def _per_frame(
    selected: NDArray[np.int64], spans: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Selections and tokens of each frame."""
    sums = np.concatenate([[0], np.cumsum(selected)])
    starts, stops = np.array(spans).T
    return sums[stops] - sums[starts], stops - starts


def _of_medium(one: _Seen, found: NDArray[np.int64], sizes: NDArray[np.int64], share: float) -> MediumEvidence:
    shares = found / max(1, found.sum())
    lifts = shares * sizes.sum() / sizes
    return MediumEvidence(one.kind, one.name, one.times, tuple(shares.tolist()), tuple(lifts.tolist()), share)
