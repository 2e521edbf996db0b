"""What a backend of attention is: its interface, the stretches of a step that it computes, and the definition in torch.

Backends import this module and not the registry that chooses among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from keye.ops import reference
from keye.ops.kv_blocks import BlockRows
from keye.ops.reference import KeyTiles, Rows

#: How attention over selected keys is computed: over the gathered union of neighbouring queries' sets, or over every
#: key with a mask. The same function; `auto` takes whichever was measured to be faster at this length.
Kernel = Literal["auto", "union", "masked"]
#: Offsets of queries, and the positions int64 [n, K] that those from there on attend to: ascending, then -1.
Selected = Iterable[tuple[int, Tensor]]


@dataclass(frozen=True)
class Stretch:
    """Rows `start .. stop` of a step: tokens of one sequence, the first at absolute position `first`. Their own keys
    are already stored. `counts` int64 [>= first + stop - start], if given, counts how often each key was selected.

    `rows` and `key_tiles` read what is stored, keys of tiles exactly: where they are int8, queries are rounded as well,
    by `reference.round_queries`. `blocks` says where the same rows are, by their names (`k`, `v` and, in
    sparse models, `indexer_k`), None where they are not in KV blocks. `fixed` asks for results that do not depend on
    which queries are computed together.
    """

    start: int
    stop: int
    first: int
    rows: Rows
    key_tiles: KeyTiles | None = None
    blocks: Mapping[str, BlockRows] | None = None
    counts: Tensor | None = None
    fixed: bool = False

    @property
    def length(self) -> int:
        """Keys that the last query sees."""
        return self.first + self.stop - self.start


class Backend(Protocol):
    """One way to compute. Shapes: `q` [T, H, D], `indexer_q` [T, J, I], `gate` float32 [T, J]; outputs [T, H, D] in the
    dtype of `q`. Rows outside every stretch are not read, and stay undefined in outputs."""

    name: str

    def takes(self, q: Tensor, stretch: Stretch) -> bool:
        """Whether this backend can compute this stretch."""

    def dense(self, q: Tensor, stretches: Sequence[Stretch], out: Tensor) -> None:
        """Causal attention over every earlier key, written to `out`."""

    def select(self, indexer_q: Tensor, gate: Tensor, stretch: Stretch, topk: int) -> Iterator[tuple[int, Tensor]]:
        """The selected sets, as `reference.select_topk` yields them (offsets count from `stretch.start`)."""

    def select_all(self, indexer_q: Tensor, gate: Tensor, stretches: Sequence[Stretch], sets: Tensor) -> None:
        """The selected sets of several stretches, written to their rows of `sets` int32 [T, topk]."""

    def attend(self, q: Tensor, selected: Selected, stretch: Stretch, out: Tensor, kernel: Kernel = "auto") -> None:
        """Attention over given sets, written to `out`."""

    def sparse(
        self, q: Tensor, indexer_q: Tensor, gate: Tensor, stretches: Sequence[Stretch], topk: int, out: Tensor
    ) -> None:
        """`select` and `attend` of every stretch, fused where the backend can."""


class SelectionByStretch:
    """`Backend.select_all` by `select`, one stretch after another."""

    def select_all(self: Backend, indexer_q: Tensor, gate: Tensor, stretches: Sequence[Stretch], sets: Tensor) -> None:
        for stretch in stretches:
            for offset, positions in self.select(indexer_q, gate, stretch, sets.shape[1]):
                start = stretch.start + offset
                sets[start : start + positions.shape[0]] = positions


class ReferenceBackend(SelectionByStretch):
    """The definition, `keye.ops.reference`, one stretch after another."""

    name = "reference"

    def takes(self, q: Tensor, stretch: Stretch) -> bool:
        return True

    def dense(self, q: Tensor, stretches: Sequence[Stretch], out: Tensor) -> None:
        for stretch in stretches:
            part = slice(stretch.start, stretch.stop)
            out[part] = reference.dense_attention(q[part], stretch.rows, stretch.first)

    def select(self, indexer_q: Tensor, gate: Tensor, stretch: Stretch, topk: int) -> Iterator[tuple[int, Tensor]]:
        part = slice(stretch.start, stretch.stop)
        assert stretch.key_tiles is not None
        if stretch.blocks is not None and stretch.blocks["indexer_k"].format.kind == "int8":
            indexer_q = reference.round_queries(indexer_q)
        return reference.select_topk(indexer_q[part], gate[part], stretch.key_tiles, stretch.first, topk)

    def attend(self, q: Tensor, selected: Selected, stretch: Stretch, out: Tensor, kernel: Kernel = "auto") -> None:
        part = slice(stretch.start, stretch.stop)
        out[part] = reference.sparse_attention(q[part], _count_selected(selected, stretch.counts), stretch.rows)

    def sparse(
        self, q: Tensor, indexer_q: Tensor, gate: Tensor, stretches: Sequence[Stretch], topk: int, out: Tensor
    ) -> None:
        for stretch in stretches:
            self.attend(q, self.select(indexer_q, gate, stretch, topk), stretch, out)


def _count_selected(selected: Selected, counts: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Adds every selected position to `counts` on the way through."""
    for offset, positions in selected:
        if counts is not None:
            chosen = positions[positions >= 0].to(counts.device)
            counts.index_add_(0, chosen, torch.ones_like(chosen, dtype=counts.dtype))
        yield offset, positions


REFERENCE: Final = ReferenceBackend()
