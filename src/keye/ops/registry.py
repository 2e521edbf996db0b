"""Attention of one layer of a step, sparse or dense, behind one table of backends.

A step holds tokens of several sequences behind one another; a `Stretch` says which of its rows belong to one sequence
and where the past of that sequence lies. Backends: `reference` (plain torch, any device, the definition), `cpu` (the
compiled core) and `triton` (GPUs). A fast one says which stretches it can take; the reference takes the others, and
both give the same sets, and the same outputs up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, get_args

import torch
from torch import Tensor

from keye.config import kernel_config
from keye.errors import KeyeError
from keye.ops import reference
from keye.ops.kv_blocks import LayerPages
from keye.ops.reference import KeyTiles, Rows

BackendName = Literal["auto", "reference", "cpu", "triton"]
#: How attention over selected keys is computed: over the gathered union of neighbouring queries' sets, or over every
#: key with a mask. The same function; `auto` takes whichever was measured to be faster at this length.
Kernel = Literal["auto", "union", "masked"]
Selected = Iterable[tuple[int, Tensor]]


@dataclass(frozen=True)
class Stretch:
    """Rows `start .. stop` of a step: tokens of one sequence, the first at absolute position `first`. Their own keys
    are already stored. `counts` int64 [>= first + stop - start], if given, counts how often each key was selected.

    `fixed` asks for results that do not depend on which queries are computed together.
    """

    start: int
    stop: int
    first: int
    rows: Rows
    key_tiles: KeyTiles | None = None
    pages: LayerPages | None = None
    counts: Tensor | None = None
    fixed: bool = False

    @property
    def length(self) -> int:
        """Keys that the last query sees."""
        return self.first + self.stop - self.start


class Backend(Protocol):
    """One way to compute. Shapes: `q` [T, H, D], `index_q` [T, J, I], `gate` float32 [T, J]; outputs [T, H, D] in the
    dtype of `q`. Rows outside every stretch are not read, and stay undefined in outputs."""

    name: str

    def takes(self, q: Tensor, stretch: Stretch) -> bool:
        """Whether this backend can compute this stretch."""

    def dense(self, q: Tensor, stretches: Sequence[Stretch], out: Tensor) -> None:
        """Causal attention over every earlier key, written to `out`."""

    def select(self, index_q: Tensor, gate: Tensor, stretch: Stretch, topk: int) -> Iterator[tuple[int, Tensor]]:
        """The selected sets, as `reference.select_topk` yields them (offsets count from `stretch.start`)."""

    def attend(self, q: Tensor, selected: Selected, stretch: Stretch, out: Tensor, kernel: Kernel = "auto") -> None:
        """Attention over given sets, written to `out`."""

    def sparse(
        self, q: Tensor, index_q: Tensor, gate: Tensor, stretches: Sequence[Stretch], topk: int, out: Tensor
    ) -> None:
        """`select` and `attend` of every stretch, fused where the backend can."""


class ReferenceBackend:
    """The definition, `keye.ops.reference`, one stretch after another."""

    name = "reference"

    def takes(self, q: Tensor, stretch: Stretch) -> bool:
        return True

    def dense(self, q: Tensor, stretches: Sequence[Stretch], out: Tensor) -> None:
        for stretch in stretches:
            part = slice(stretch.start, stretch.stop)
            out[part] = reference.dense_attention(q[part], stretch.rows, stretch.first)

    def select(self, index_q: Tensor, gate: Tensor, stretch: Stretch, topk: int) -> Iterator[tuple[int, Tensor]]:
        part = slice(stretch.start, stretch.stop)
        assert stretch.key_tiles is not None
        return reference.select_topk(index_q[part], gate[part], stretch.key_tiles, stretch.first, topk)

    def attend(self, q: Tensor, selected: Selected, stretch: Stretch, out: Tensor, kernel: Kernel = "auto") -> None:
        part = slice(stretch.start, stretch.stop)
        out[part] = reference.sparse_attention(q[part], _counted(selected, stretch.counts), stretch.rows)

    def sparse(
        self, q: Tensor, index_q: Tensor, gate: Tensor, stretches: Sequence[Stretch], topk: int, out: Tensor
    ) -> None:
        for stretch in stretches:
            self.attend(q, self.select(index_q, gate, stretch, topk), stretch, out)


def _counted(selected: Selected, counts: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Adds every selected position to `counts` on the way through."""
    for offset, positions in selected:
        if counts is not None:
            chosen = positions[positions >= 0].to(counts.device)
            counts.index_add_(0, chosen, torch.ones_like(chosen, dtype=counts.dtype))
        yield offset, positions


REFERENCE: Final = ReferenceBackend()
_makers: dict[str, Callable[[], Backend | None]] = {}
_made: dict[str, Backend | None] = {}
_chosen: BackendName | None = None  # None: what the environment says


def register(name: str, make: Callable[[], Backend | None]) -> None:
    """Adds a backend; `make` returns None where it cannot run here, and is called once, when first needed."""
    _makers[name] = make


def _make_triton() -> Backend | None:
    from keye.ops import triton  # only where it is asked for

    return triton.make()


register("triton", _make_triton)


def choose(name: BackendName) -> None:
    """Which backend is used from now on in this process; `auto` is the fastest that the device has."""
    global _chosen
    _chosen = _checked(name)


def _checked(name: str) -> BackendName:
    known: dict[str, BackendName] = {known: known for known in get_args(BackendName)}
    if name not in known:
        raise KeyeError(f"the kernels {name!r} are not known; choose one of {', '.join(known)}")
    if name not in ("auto", "reference") and _get(name) is None:
        raise KeyeError(f"the {name} kernels cannot run here; `keye doctor` says why, and 'reference' always can")
    return known[name]


def backend_of(device: torch.device) -> Backend:
    """The backend in use for tensors of a device: what was chosen, else what KEYE_KERNELS says."""
    if _chosen is None:
        choose(_checked(kernel_config().kernels))
    if _chosen is not None and _chosen != "auto":
        return _get(_chosen) or REFERENCE
    return _get("cpu" if device.type == "cpu" else "triton") or REFERENCE


def _make_cpu() -> Backend | None:
    from keye.ops.cpu.backend import make  # imported when first needed: it imports this module

    return make()


register("cpu", _make_cpu)


def _get(name: str) -> Backend | None:
    if name == "reference":
        return REFERENCE
    if name not in _made:
        _made[name] = _makers[name]() if name in _makers else None
    return _made[name]


def dense_attention(q: Tensor, stretches: Sequence[Stretch], out: Tensor) -> None:
    """Causal attention of every stretch over all its keys, written to `out` [T, H, D]."""
    for backend, part in _shared_out(q, stretches):
        backend.dense(q, part, out)


def sparse_attention(
    q: Tensor, index_q: Tensor, gate: Tensor, stretches: Sequence[Stretch], topk: int, out: Tensor
) -> None:
    """Attention of every query over the `topk` keys that the indexer scores highest, written to `out` [T, H, D]."""
    for backend, part in _shared_out(q, stretches):
        backend.sparse(q, index_q, gate, part, topk, out)


def attend_selected(q: Tensor, selected: Selected, stretch: Stretch, out: Tensor) -> None:
    """Attention of one stretch over sets that something else than the indexer chose, written to `out` [T, H, D]."""
    backend = backend_of(q.device)
    (backend if backend.takes(q, stretch) else REFERENCE).attend(q, selected, stretch, out)


def _shared_out(q: Tensor, stretches: Sequence[Stretch]) -> Iterator[tuple[Backend, list[Stretch]]]:
    """The stretches of each backend that has any."""
    backend = backend_of(q.device)
    taken = [stretch for stretch in stretches if backend.takes(q, stretch)]
    if taken:
        yield backend, taken
    if len(taken) < len(stretches):
        yield REFERENCE, [stretch for stretch in stretches if not backend.takes(q, stretch)]
