"""The trial of a newly built library: a small problem of every kind, compared with the reference.

Runs in a process of its own, since a wrong library may crash it. Ends with exit code 0 when all is right.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from keye.ops.cpu.backend import CpuBackend
from keye.ops.kv_blocks import PAGE, LayerPages, PagedRows, RowFormat, RowKind
from keye.ops.registry import REFERENCE, Stretch

#: Largest difference of outputs from the reference, for values of about 1.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def pages_of(rows: Tensor, form: RowFormat) -> tuple[PagedRows, Tensor]:
    """Encoded rows uint8 [N, row_bytes] as pages, and the memory that must outlive them."""
    pages = -(-rows.shape[0] // PAGE)
    memory = torch.zeros(pages, PAGE, form.row_bytes, dtype=torch.uint8)
    memory.view(-1, form.row_bytes)[: rows.shape[0]] = rows
    return PagedRows(form, memory.data_ptr() + torch.arange(pages) * form.page_bytes), memory


class Problem:
    """One sequence with random keys, values and indexer keys of `length` tokens as a store holds them."""

    def __init__(
        self,
        length: int,
        groups: int,
        dim: int,
        index_dim: int,
        dtype: torch.dtype,
        generator: torch.Generator,
        kind: RowKind | None = None,
        index_kind: RowKind | None = None,
        whole: bool = False,
    ) -> None:
        plain: RowKind = "float32" if dtype == torch.float32 else "bfloat16"
        forms = [RowFormat(kind or plain, groups, dim)] * 2 + [RowFormat(index_kind or plain, 1, index_dim)]
        self.dtype, self.length, self.memory = dtype, length, []
        paged = []
        for form in forms:
            shape = (length, form.heads, form.dim)
            # Small whole numbers give exactly equal scores wherever they are multiplied.
            numbers = torch.randint(-1, 2, shape, generator=generator).float()
            x = numbers if whole else torch.randn(shape, generator=generator)
            rows, memory = pages_of(form.encode(x.to(dtype)), form)
            paged.append(rows)
            self.memory.append(memory)
        self.pages = LayerPages(length, *paged)

    def _decode(self, which: int, positions: Tensor) -> Tensor:
        form = (self.pages.keys, self.pages.values, self.pages.index)[which]
        assert form is not None
        return form.format.decode(self.memory[which].view(-1, form.format.row_bytes)[positions], self.dtype)

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._decode(0, positions), self._decode(1, positions)

    def index_keys(self, start: int, stop: int) -> Tensor:
        return self._decode(2, torch.arange(start, stop))[:, 0]

    def stretch(self, start: int, n: int, fixed: bool = False, counts: Tensor | None = None) -> Stretch:
        """The last `n` tokens as queries, at rows start .. start + n of the step."""
        return Stretch(
            start, start + n, self.length - n, self.rows, self.index_keys, self.pages, counts=counts, fixed=fixed
        )


def check(backend: CpuBackend, dtype: torch.dtype, kind: RowKind | None) -> None:
    """Selection must be equal (whole numbers: exact scores), outputs near; `AssertionError` otherwise."""
    generator = torch.Generator().manual_seed(0)
    for length, n, topk in ((70, 70, 70), (700, 40, 90), (333, 1, 64)):
        problem = Problem(length, 2, 64, 64, dtype, generator, kind=kind, whole=True)
        q = torch.randn(n, 8, 64, generator=generator).to(dtype)
        index_q = torch.randint(-2, 3, (n, 4, 64), generator=generator).to(dtype)
        gate = torch.randint(-2, 3, (n, 4), generator=generator).float()
        stretch = problem.stretch(0, n)
        for (_, ours), (_, wanted) in zip(
            [_joined(backend.select(index_q, gate, stretch, topk))],
            [_joined(REFERENCE.select(index_q, gate, stretch, topk))],
            strict=True,
        ):
            assert torch.equal(ours, wanted), "the selected sets differ from the reference"
        ours, wanted = torch.empty_like(q), torch.empty_like(q)
        for run in ("sparse", "dense"):
            for used, out in ((backend, ours), (REFERENCE, wanted)):
                if run == "sparse":
                    used.sparse(q, index_q, gate, [stretch], topk, out)
                else:
                    used.dense(q, [stretch], out)
            difference = float((ours.float() - wanted.float()).abs().max())
            assert difference <= TOLERANCE[dtype], f"{run} attention differs from the reference by {difference:.2g}"


def _joined(selected: object) -> tuple[int, Tensor]:
    assert hasattr(selected, "__iter__")
    return 0, torch.cat([positions for _, positions in selected])


def main(library: str) -> None:
    """Tries a library; an exception or a signal is the verdict against it."""
    torch.set_num_threads(1)
    backend = CpuBackend(Path(library))
    kinds: tuple[RowKind | None, ...] = (None, "int8", "int4")
    for dtype in TOLERANCE:
        for kind in kinds:
            check(backend, dtype, kind)
