"""Packs: samples of unequal lengths in one ragged batch, in which what they share stands once. Samples about one video
share its tokens and pixels, several questions their beginning, several replies their question.

Legend: T tokens of a pack, n segments, R grid rows, M media, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keye.media.processor import MediaItem
from keye.train.features import FeatureCache
from keye.train.layout import LaidOut, LengthError, length_error
from keye.train.tree import IGNORE, Array, Branch, Packed, PackedMedium, Tree

__all__ = ["Array", "LengthError", "Pack", "Packed", "PackedMedium", "load", "pack"]

#: Packs that still take samples, so that packing many samples takes time in proportion to their number.
OPEN_PACKS = 32


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


def load(pack: Pack, cache: FeatureCache | None = None) -> Packed[NDArray]:
    """The pack as arrays, with the features of its media that `cache` has, and the pixels of the others, which are
    decoded now."""
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
    features = [None if cache is None else cache.read(item.key or b"") for item in items]
    pixels = [item.vision.pixel_values for item, part in zip(items, features, strict=True) if part is None]
    cached = [part for part in features if part is not None]
    return Packed(
        joined("token_ids"), joined("position_ids", axis=1), labels,
        np.where(labels == IGNORE, 0.0, weights).astype(np.float32),
        np.stack([stops - sizes, stops, [parent for _, parent in branches]], axis=1).astype(np.int64),
        np.array([branch.sample for branch, _ in branches], np.int64),
        np.array([branch.path.rejected for branch, _ in branches], bool),
        joined("is_visual"),
        np.concatenate(pixels) if pixels else None,
        np.concatenate([np.zeros((0, 3), np.int64), *(item.grid_thw for item in items)]),
        tuple(PackedMedium(item.key or b"", len(item.grid_thw), item.visual_tokens, part is not None)
              for item, part in zip(items, features, strict=True)),
        np.concatenate(cached) if cached else None,
    )  # fmt: skip


def _media_of(branch: Branch) -> list[MediaItem]:
    """The media whose tokens a branch holds."""
    spans = zip(branch.path.media, branch.path.spans, strict=True)
    inside = [(item, start, stop) for item, (start, stop) in spans if branch.start <= start < branch.stop]
    assert all(stop <= branch.stop for _, _, stop in inside), "a branch ends within a medium"
    return [item for item, _, _ in inside]
