"""The trial of a newly built library: a small problem of every kind, compared with the reference.

Runs in a process of its own, since a wrong library may crash it. Ends with exit code 0 when all is right.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from keye.ops import elementwise, scales, tree_tiles
from keye.ops.backend import REFERENCE, Stretch
from keye.ops.cpu import elementwise as cpu_elementwise
from keye.ops.cpu import gemv, train
from keye.ops.cpu.backend import CpuBackend
from keye.ops.cpu.quantized_trial import check_quantized
from keye.ops.cpu.scales import ScaleLibrary
from keye.ops.kv_blocks import KV_BLOCK, BlockRows, RowFormat, RowKind
from keye.ops.tree_tiles import Needs, Operands

#: Largest difference of outputs from the reference, for values of about 1.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


class Problem:
    """One sequence with random keys, values and indexer keys of `length` tokens as a store holds them."""

    def __init__(
        self, length: int, groups: int, dim: int, indexer_dim: int, dtype: torch.dtype, generator: torch.Generator,
        kind: RowKind | None = None, indexer_kind: RowKind | None = None, integers: bool = False,
    ) -> None:  # fmt: skip
        plain: RowKind = "float32" if dtype == torch.float32 else "bfloat16"
        kv = RowFormat(kind or plain, groups, dim)
        forms = {"k": kv, "v": kv, "indexer_k": RowFormat(indexer_kind or plain, 1, indexer_dim)}
        self.dtype, self.length = dtype, length
        self.blocks: dict[str, BlockRows] = {}
        self.memory: dict[str, Tensor] = {}
        for name, form in forms.items():
            shape = (length, form.heads, form.dim)
            # Small integers give exactly equal scores wherever they are multiplied.
            numbers = torch.randint(-1, 2, shape, generator=generator).float()
            x = numbers if integers else torch.randn(shape, generator=generator)
            blocks = -(-length // KV_BLOCK)
            memory = torch.zeros(blocks, KV_BLOCK, form.row_bytes, dtype=torch.uint8)
            memory.view(-1, form.row_bytes)[:length] = form.encode(x.to(dtype))
            self.blocks[name] = BlockRows(form, memory.data_ptr() + torch.arange(blocks) * form.block_bytes)
            self.memory[name] = memory  # must outlive the addresses

    def _decode(self, name: str, positions: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        form = self.blocks[name].format
        return form.decode(self.memory[name].view(-1, form.row_bytes)[positions], dtype or self.dtype)

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._decode("k", positions), self._decode("v", positions)

    def indexer_keys(self, start: int, stop: int) -> Tensor:
        exact = torch.float32 if self.blocks["indexer_k"].format.kind == "int8" else None
        return self._decode("indexer_k", torch.arange(start, stop), exact)[:, 0]

    def stretch(self, start: int, n: int, fixed: bool = False, counts: Tensor | None = None) -> Stretch:
        """The last `n` tokens as queries, at rows start .. start + n of the step."""
        return Stretch(
            start, start + n, self.length - n, self.rows, self.indexer_keys, self.blocks, counts=counts, fixed=fixed
        )


def check(backend: CpuBackend, dtype: torch.dtype, kind: RowKind | None, indexer_kind: RowKind | None = None) -> None:
    """Selection must be equal (integers: exact scores), outputs near; `AssertionError` otherwise."""
    generator = torch.Generator().manual_seed(0)
    for length, n, topk in ((70, 70, 70), (700, 40, 90), (333, 1, 64)):
        problem = Problem(length, 2, 64, 64, dtype, generator, kind, indexer_kind, integers=True)
        q = torch.randn(n, 8, 64, generator=generator).to(dtype)
        indexer_q = torch.randint(-2, 3, (n, 4, 64), generator=generator).to(dtype)
        gate = torch.randint(-2, 3, (n, 4), generator=generator).float()
        stretch = problem.stretch(0, n)
        sets = [torch.cat([positions for _, positions in used.select(indexer_q, gate, stretch, topk)])
                for used in (backend, REFERENCE)]  # fmt: skip
        assert torch.equal(*sets), "the selected sets differ from the reference"
        ours, wanted = torch.empty_like(q), torch.empty_like(q)
        for run in ("sparse", "dense"):
            for used, out in ((backend, ours), (REFERENCE, wanted)):
                if run == "sparse":
                    used.sparse(q, indexer_q, gate, [stretch], topk, out)
                else:
                    used.dense(q, [stretch], out)
            difference = float((ours.float() - wanted.float()).abs().max())
            assert difference <= TOLERANCE[dtype], f"{run} attention differs from the reference by {difference:.2g}"


def check_scales(library: ScaleLibrary) -> None:
    """Scales whose squared error is that of the reference; `AssertionError` otherwise."""
    x = torch.randn(77, 32, generator=torch.Generator().manual_seed(0))
    for low, high, affine in ((-8, 7, False), (0, 15, True)):
        wanted = scales.search_affine(x, high) if affine else scales.search_symmetric(x, low, high)
        errors = []
        for (scale, minimum), encode in ((wanted, scales.encode), (library.search(x, low, high, affine=affine),
                                                                   library.encode)):  # fmt: skip
            y = (encode(x, scale, minimum, low, high).float() + low) * scale[:, None]
            errors.append(float((y + (0 if minimum is None else minimum[:, None]) - x).square().sum()))
        assert abs(errors[1] / errors[0] - 1) <= 1e-4, f"scales have the squared errors {errors}"


def check_few_rows(backend: CpuBackend) -> None:
    """Products of few rows must be near torch's."""
    library, generator = backend.library(), torch.Generator().manual_seed(1)
    assert library is not None
    for rows, outputs, columns in ((1, 300, 96), (3, 13, 32), (8, 64, 512)):
        x, weight = (torch.randn(n, columns, generator=generator).bfloat16() for n in (rows, outputs))
        bias = torch.randn(outputs, generator=generator).bfloat16()
        _compare(gemv.linear(library, x, weight, bias), F.linear(x.float(), weight.float(), bias.float()), "a product")
    x, experts, chosen = torch.randn(3, 64, generator=generator).bfloat16(), 4, torch.tensor([[0, 3], [3, 2], [2, 0]])
    gate_up = (0.1 * torch.randn(experts, 192, 64, generator=generator)).bfloat16().mT
    down, weights = (
        torch.randn(experts, 64, 96, generator=generator).bfloat16().mT,
        torch.rand(3, 2, generator=generator),
    )
    wanted = torch.zeros(3, 64)
    for t, k in ((t, k) for t in range(3) for k in range(2)):
        e = chosen[t, k]
        wanted[t] += weights[t, k] * (elementwise.swiglu(x[t].float() @ gate_up[e].float()) @ down[e].float())
    _compare(gemv.mix_experts(library, x, weights, chosen, gate_up, down), wanted, "a mixture of experts")


def check_norms(backend: CpuBackend) -> None:
    """Norms, rotations and transforms must be near the plain ones."""
    library, generator = backend.library(), torch.Generator().manual_seed(2)
    assert library is not None
    small, plain = cpu_elementwise.make(library), elementwise.PLAIN
    x = torch.randn(9, 4, 64, generator=generator).bfloat16()
    weight, bias = torch.randn(2, 64, generator=generator).bfloat16()
    cos, sin = torch.randn(2, 9, 32, generator=generator)
    with torch.no_grad():
        for used, name in ((small.rms_norm(x, weight, 1e-6), "rms_norm"),
                           (small.norm_rotate(x, weight, 1e-6, cos, sin), "norm_rotate"),
                           (small.index_query(x, weight, 1e-6, cos, sin), "index_query")):  # fmt: skip
            rest = () if name == "rms_norm" else (cos, sin)
            _compare(used, getattr(plain, name)(x, weight, 1e-6, *rest).float(), name)
        ours = small.index_key(x, weight, bias, 1e-6, cos, sin)
        _compare(ours, plain.index_key(x, weight, bias, 1e-6, cos, sin).float(), "index_key")
        for ours, wanted in zip(small.add_rms_norm(x, x, weight, 1e-6), plain.add_rms_norm(x, x, weight, 1e-6),
                                strict=True):  # fmt: skip
            _compare(ours, wanted.float(), "add_rms_norm")


def check_training(backend: CpuBackend) -> None:
    """Outputs and gradients of attention in training must be near the definition's."""
    library, generator = backend.library(), torch.Generator().manual_seed(3)
    assert library is not None
    shapes = ((50, 4, 32), (60, 2, 32), (60, 2, 32), (50, 3, 32), (60, 32), (50, 3))
    sets = torch.rand(50, 60, generator=generator).argsort(1)[:, :20].sort(1).values.to(torch.int32)
    for dtype, tolerance in TOLERANCE.items():
        q, k, v, indexer_q, indexer_k, gate = (torch.randn(shape, generator=generator) for shape in shapes)
        operands = Operands(*(x.to(dtype) for x in (q, k, v, indexer_q, indexer_k)))._replace(gate=gate)
        upstream = torch.randn(50, 4, 32, generator=generator).to(dtype)
        ours, _ = train.forward(library, operands, (), sets, teach=True)
        wanted, _ = tree_tiles.forward(operands, (), sets, teach=True)
        rest = (upstream, torch.tensor(1.0), Needs(attention=True, indexer=True))
        pairs = [
            (ours.out, wanted.out), *zip(train.backward(library, operands, (), sets, ours, *rest),
                                         tree_tiles.backward(operands, (), sets, wanted, *rest), strict=True)
        ]  # fmt: skip
        for mine, other in pairs:
            assert mine is not None and other is not None
            _compare(mine, other.float(), "attention in training", tolerance)


def check_encoding(backend: CpuBackend) -> None:
    """Rows of codes must have the errors of the definition's."""
    x = torch.randn(50, 2, 64, generator=torch.Generator().manual_seed(2))
    kinds: tuple[RowKind, ...] = ("int8", "int4")
    for kind in kinds:
        form = RowFormat(kind, 2, 64)
        rows = backend.encode(form, x)
        assert rows is not None
        errors = [float((form.decode(some, torch.float32) - x).square().sum()) for some in (rows, form.encode(x))]
        assert abs(errors[0] / errors[1] - 1) < 1e-4, f"{kind} rows have the squared errors {errors}"


def _compare(ours: Tensor, wanted: Tensor, what: str, tolerance: float = TOLERANCE[torch.bfloat16]) -> None:
    difference = float((ours.float() - wanted).abs().max() / wanted.abs().max())
    assert difference <= tolerance, f"{what} differs from the reference by {difference:.2g}"


def main(path: str) -> None:
    """Tries a library; an exception or a signal is the verdict against it."""
    torch.set_num_threads(1)
    check_scales(ScaleLibrary(Path(path)))
    backend = CpuBackend(Path(path))
    kinds: tuple[RowKind | None, ...] = (None, "int8", "int4")
    for dtype in TOLERANCE:
        for kind in kinds:
            check(backend, dtype, kind)
        check(backend, dtype, None, indexer_kind="int8")
    check_few_rows(backend)
    check_encoding(backend)
    check_norms(backend)
    check_training(backend)
    library = backend.library()
    assert library is not None
    check_quantized(library)
