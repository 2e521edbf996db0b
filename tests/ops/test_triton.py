"""The Triton kernels: their cases run in Triton's interpreter, and every kernel compiles for cards."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keye.ops import triton as kernels

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CASES = Path(__file__).with_name("triton_cases.py")


def test_cases_in_the_interpreter() -> None:
    """The interpreter must be chosen before triton is imported: the cases run in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "--durations=0", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:]


def test_importing_keye_does_not_import_triton() -> None:
    code = "import sys, keye.ops.registry, keye.ops.triton, keye.models.moe; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_status_is_a_sentence() -> None:
    assert kernels.status().startswith("The Triton kernels ")
    assert (kernels.make() is None) == ("cannot run" in kernels.status())


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_attention_compiles_for_cards(capability: int) -> None:
    """To machine code, with the tiles and number formats that cards get; needs no card."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from keye.ops.kv_blocks import RowFormat
    from keye.ops.triton import attention, rows

    kernel = attention._selected_kernel
    rows_of = RowFormat("int8", heads=4, dim=128)
    stored = rows.Operand(rows_of, torch.empty(1, dtype=torch.int8), torch.empty(1, dtype=torch.bfloat16))
    names = [f"{kind}{name}" for kind in "KV" for name in ("KIND", "ROW", "HEAD", "GROUP")]
    constants = dict(zip(names, stored.constants * 2, strict=True))
    constants |= {
        "R": 8,
        "RP": 16,
        "D": 128,
        "BN": 64,
        "PART": 256,
        "SPLIT": False,
        "KV_BLOCK": 64,
        "INTERPRETED": False,
    }
    constants["DOT"] = rows.dot_dtype(torch.empty(0, dtype=torch.bfloat16), rows_of)
    pointers = {"q": "*bf16", "out": "*bf16", "part_sums": "*fp32", "part_stats": "*fp32", "scale": "fp32"}
    pointers |= {"keys": "*i8", "values": "*i8", "key_scales": "*bf16", "value_scales": "*bf16"}
    pointers |= dict.fromkeys(("topk", "heads", "parts"), "i32")
    types = {n: "constexpr" if n in constants else pointers.get(n, "*i32") for n in kernel.arg_names}
    values = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=values)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 2})
    assert compiled.metadata.shared <= 99 * 1024, "more shared memory than the smallest of these cards has"
    assert "mma" in compiled.asm["ptx"], "no tensor cores"


@pytest.mark.slow
def test_training_cases_in_the_interpreter() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(CASES.with_name("triton_train_cases.py")),
    ]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["_attend_kernel", "_loss_kernel", "_attend_backward_kernel", "_teach_kernel"])
def test_training_compiles_for_cards(capability: int, name: str) -> None:
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from keye.ops.triton import train

    kernel = getattr(train, name)
    known = {"R": 8, "RP": 16, "D": 128, "G": 4, "J": 16, "JP": 16, "I": 64, "BN": train.TILE, "DOT": tl.bfloat16}
    constants = {n: value for n, value in (known | {"INTERPRETED": False}).items() if n in kernel.arg_names}
    kinds = dict.fromkeys(("width", "heads", "groups", "indexer_heads"), "i32") | {"scale": "fp32", "root": "fp32"}
    kinds |= dict.fromkeys(("lse", "indexer_lse", "gates", "loss", "grad_kl", "grad_k", "grad_v", "grad_gate"), "*fp32")
    types = {n: "constexpr" if n in constants else (kinds | {"sets": "*i32"}).get(n, "*bf16") for n in kernel.arg_names}
    values = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=values)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 2})
    assert compiled.metadata.shared <= 99 * 1024, "more shared memory than the smallest of these cards has"
    assert "mma" in compiled.asm["ptx"], "no tensor cores"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", [4, 8, 1])
def test_quantised_products_compile_for_cards(capability: int, kind: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from keye.ops.triton.quantized import _quantized_kernel as kernel

    constants = {"KIND": kind, "HAS_MINIMUM": kind == 4, "BM": 64, "BN": 64, "BK": 64, "INTERPRETED": False}
    pointers = dict.fromkeys(("x", "scales", "minima", "out"), "*bf16") | {"codes": "*i8" if kind == 8 else "*u8"}
    pointers |= dict.fromkeys(("expert_of", "begin_of", "stop_of"), "*i32")
    types = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in kernel.arg_names}
    values = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=values)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 2})
    assert compiled.metadata.shared <= 99 * 1024, "more shared memory than the smallest of these cards has"
    assert "mma" in compiled.asm["ptx"], "no tensor cores"
