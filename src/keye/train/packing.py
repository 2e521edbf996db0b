"""Packs: samples of unequal lengths in one ragged batch, in which what they share stands once. Samples about one video
share its tokens and pixels, several questions their beginning, several replies their question.

Legend: T tokens of a pack, n segments, R grid rows, M media, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from keye.media.processor import MediaItem
from keye.train.layout import LaidOut, LengthError, length_error
from keye.train.tree import IGNORE, Branch, Tree

#: A numpy array where batches are made, a tensor where they are learnt.
Array = TypeVar("Array")
#: Packs that still take samples, so that packing many samples takes time in proportion to their number.
OPEN_PACKS = 32


@dataclass(frozen=True)
class PackedMedium:
    """One medium of a pack: the key of its content, its grid rows and its visual tokens."""

    key: bytes
    rows: int
    tokens: int


@dataclass(frozen=True)
class Packed(Generic[Array]):
    """A ragged batch of T tokens in n segments that form trees. A token sees every token of the segments above its own
    and those before it in its own.

    `token_ids` int64 [T]; `position_ids` int64 [3, T]; `labels` int64 [T], the next token where it is learnt, else
    `IGNORE`; `weights` float32 [T], what the loss of each label counts, 0 without one; `segments` int64 [n, 3], start,
    stop and the segment above (-1 for none), those above first; `segment_sample` int64 [n], the sample whose labels a
    segment has, and `rejected` bool [n], whether they are those of a reply that lost; `is_visual` bool [T].

    `pixels` float32 [patches, 3, side, side] and `grids` int64 [R, 3] of all `media`, in the order of their tokens.
    `features` [V, width] in place of the pixels are visual tokens computed before (`keye.train.features`).
    """

    token_ids: Array
    position_ids: Array
    labels: Array
    weights: Array
    segments: Array
    segment_sample: Array
    rejected: Array
    is_visual: Array
    pixels: Array | None
    grids: Array
    media: tuple[PackedMedium, ...] = ()
    features: Array | None = None


@dataclass(frozen=True)
class Pack:
    """Samples that are learnt together, and the tree of their tokens."""

    samples: tuple[LaidOut, ...]
    tree: Tree

    @property
    def length(self) -> int:
        """Tokens of the tree."""
        return self.tree.length


def pack(laid_out: Sequence[LaidOut], max_tokens: int, *, skipped: list[LengthError] | None = None) -> list[Pack]:
    """Packs of at most `max_tokens`: each sample joins the pack that it shares most with, else the first with room.
    The same samples give the same packs.

    A sample that is longer by itself is a `LengthError`, or is left out and its error added to `skipped`.
    """
    packs: list[tuple[list[LaidOut], Tree]] = []
    open_packs: list[tuple[list[LaidOut], Tree]] = []
    for sample in laid_out:
        if sample.length > max_tokens:
            error = length_error(sample.sample.place, sample.length, sample.visual_tokens, max_tokens)
            if skipped is None:
                raise error
            skipped.append(error)
            continue
        shared = [tree.count_shared(sample.paths[0]) for _, tree in open_packs]
        fits = [i for i, (_, tree) in enumerate(open_packs) if tree.length + sample.length - shared[i] <= max_tokens]
        if fits:
            members, tree = open_packs[max(fits, key=lambda i: (shared[i], -i))]
        else:
            members, tree = [], Tree()
            packs.append((members, tree))
            open_packs = [*open_packs[-OPEN_PACKS + 1 :], packs[-1]]
        for path in sample.paths:
            tree.add(path, len(members))
        members.append(sample)
    return [Pack(tuple(members), tree) for members, tree in packs]


def load(pack: Pack) -> Packed[NDArray]:
    """The pack as arrays, with the pixels of its media, which are decoded now."""
    branches = list(pack.tree.branches())
    parts = [slice(branch.start, branch.stop) for branch, _ in branches]
    stops = np.cumsum([branch.stop - branch.start for branch, _ in branches])

    def joined(field: str, axis: int = 0) -> NDArray:
        return np.concatenate(
            [getattr(b.path, field)[..., part] for (b, _), part in zip(branches, parts, strict=True)], axis=axis
        )

    labels, sizes = joined("labels"), np.diff(stops, prepend=0)
    weights = np.repeat([pack.samples[branch.sample].sample.weight for branch, _ in branches], sizes)
    items = [item for branch, _ in branches for item in _media_of(branch)]
    visions = [item.vision for item in items]
    return Packed(
        joined("token_ids"), joined("position_ids", axis=1), labels,
        np.where(labels == IGNORE, 0.0, weights).astype(np.float32),
        np.stack([stops - sizes, stops, [parent for _, parent in branches]], axis=1).astype(np.int64),
        np.array([branch.sample for branch, _ in branches], np.int64),
        np.array([branch.path.rejected for branch, _ in branches], bool),
        joined("is_visual"),
        np.concatenate([vision.pixel_values for vision in visions]) if visions else None,
        np.concatenate([np.zeros((0, 3), np.int64), *(vision.grid_thw for vision in visions)]),
        tuple(PackedMedium(item.key or b"", len(item.grid_thw), item.visual_tokens) for item in items),
    )  # fmt: skip


def _media_of(branch: Branch) -> list[MediaItem]:
    """The media whose tokens a branch holds."""
    spans = zip(branch.path.media, branch.path.spans, strict=True)
    inside = [(item, start, stop) for item, (start, stop) in spans if branch.start <= start < branch.stop]
    assert all(stop <= branch.stop for _, _, stop in inside), "a branch ends within a medium"
    return [item for item, _, _ in inside]
