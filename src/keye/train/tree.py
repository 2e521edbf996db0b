"""Trees of token sequences: what sequences have in common stands once, and each token still sees exactly what it would
see in its own sequence.

A tree is cut into segments. A token sees every token of the segments above its own and those before it in its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from keye.media.processor import MediaItem

#: The label of a token after which nothing is learnt.
IGNORE = -100

Ints = NDArray[np.int64]
#: A numpy array where batches are made, a tensor where they are learnt.
Array = TypeVar("Array")


@dataclass(frozen=True)
class Path:
    """One sequence of n tokens: a prompt and a reply that is learnt.

    `token_ids` int64 [n]; `position_ids` int64 [3, n]; `labels` int64 [n], the next token where it is learnt, else
    `IGNORE`; `is_visual` bool [n]; `media` in the order of their tokens. `rejected` tells the reply that lost from the
    one that it is compared with.
    """

    token_ids: Ints
    position_ids: Ints
    labels: Ints
    is_visual: NDArray[np.bool_]
    media: tuple[MediaItem, ...]
    rejected: bool = False

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """First and one past the last visual token of each medium."""
        places, spans, count = np.flatnonzero(self.is_visual), [], 0
        for item in self.media:
            spans.append((int(places[count]), int(places[count + item.visual_tokens - 1]) + 1))
            count += item.visual_tokens
        assert count == len(places), "a path has other visual tokens than its media"
        return spans

    @cached_property
    def first_label(self) -> int:
        """The first token after which something is learnt."""
        return int(np.argmax(self.labels != IGNORE))

    @cached_property
    def stop(self) -> int:
        """One past the last token after which something is learnt: what follows need not be computed."""
        return int(np.flatnonzero(self.labels != IGNORE)[-1]) + 1

    @cached_property
    def contents(self) -> Ints:
        """What each token is, int64 [n]: its id, or for a visual token a negative number that names its medium. Equal
        beginnings of two paths have equal positions and pixels."""
        contents, places = self.token_ids.copy(), np.flatnonzero(self.is_visual)
        names = [-1 - int.from_bytes((item.key or b"")[:7], "little") for item in self.media]
        contents[places] = np.repeat(np.array(names, np.int64), [item.visual_tokens for item in self.media])
        return contents


@dataclass(eq=False)
class Branch:
    """Tokens start .. stop of `path`, which sample number `sample` brought, and what goes on from them."""

    path: Path
    sample: int
    start: int
    stop: int
    children: list[Branch] = field(default_factory=list)

    def count_shared(self, path: Path) -> int:
        """How many tokens of this branch stand at the same place of `path`, before it learns anything."""
        stop = min(self.stop, path.first_label)
        if stop <= self.start:
            return 0
        differs = self.path.contents[self.start : stop] != path.contents[self.start : stop]
        return int(np.argmax(differs)) if differs.any() else stop - self.start


class Tree:
    """Paths that share their beginnings, up to the first token after which the later one learns something: so every
    token has one label, and the last token of a prompt is repeated before each of its replies."""

    def __init__(self) -> None:
        self.roots: list[Branch] = []
        self.length = 0

    def count_shared(self, path: Path) -> int:
        """How many tokens of `path` are in the tree already."""
        return sum(shared for _, shared in self._walk(path))

    def add(self, path: Path, sample: int) -> None:
        """Adds what is new of a path of sample number `sample`."""
        steps = list(self._walk(path))
        done = sum(shared for _, shared in steps)
        siblings = self.roots
        if steps:
            branch, shared = steps[-1]
            if branch.start + shared < branch.stop:
                below = Branch(branch.path, branch.sample, branch.start + shared, branch.stop, branch.children)
                branch.stop, branch.children = below.start, [below]
            siblings = branch.children
        siblings.append(Branch(path, sample, done, path.stop))
        self.length += path.stop - done

    def branches(self) -> Iterator[tuple[Branch, int]]:
        """Every branch with the number of the one above it, -1 for none; those above come first."""
        waiting, number = [(root, -1) for root in reversed(self.roots)], 0
        while waiting:
            branch, parent = waiting.pop()
            yield branch, parent
            waiting += [(child, number) for child in reversed(branch.children)]
            number += 1

    def _walk(self, path: Path) -> Iterator[tuple[Branch, int]]:
        """The branches that `path` begins with, and how many tokens of each it shares."""
        siblings: Sequence[Branch] = self.roots
        while siblings:
            best, branch = max(((b.count_shared(path), -i) for i, b in enumerate(siblings)), default=(0, 0))
            if best == 0:
                return
            chosen = siblings[-branch]
            yield chosen, best
            siblings = chosen.children if chosen.start + best == chosen.stop else ()


@dataclass(frozen=True)
class PackedMedium:
    """One medium of a pack: the key of its content, its grid rows and visual tokens, and whether the pack has its
    features in place of its pixels."""

    key: bytes
    rows: int
    tokens: int
    cached: bool = False


@dataclass(frozen=True)
class Packed(Generic[Array]):
    """A ragged batch of T tokens in n segments that form trees. A token sees every token of the segments above its own
    and those before it in its own.

    `token_ids` int64 [T]; `position_ids` int64 [3, T]; `labels` int64 [T], the next token where it is learnt, else
    `IGNORE`; `weights` float32 [T], what the loss of each label counts, 0 without one; `segments` int64 [n, 3], start,
    stop and the segment above (-1 for none), those above first; `segment_sample` int64 [n], the sample whose labels a
    segment has, and `rejected` bool [n], whether they are those of a reply that lost; `is_visual` bool [T].

    `grids` int64 [R, 3] are those of all `media`, in the order of their tokens; `pixels` float32 [patches, 3, side,
    side] those of the media whose `features` [n, width] (`keye.train.features`) are not cached. `encode_media` makes
    visual tokens of both.
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
