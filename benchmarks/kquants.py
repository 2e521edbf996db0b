"""Quantising weights to the block formats of GGUF: error and speed beside llama.cpp's own quantiser.

    python -m benchmarks.kquants --json [--rows 768] [--columns 2048] [--torch]

Of every format: the relative error of the weights, ours over llama.cpp's, on weights of four distributions, and MB of
bfloat16 a second of CPU time of one thread (median of repetitions). `--torch` also measures the definition in plain
torch, which is taken where the core cannot be compiled. llama.cpp comes from `make peers`; without it the command gives
our own figures alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.scale import machine
from keye.weights.gguf.dequantize import dequantize
from keye.weights.gguf.kquants import FORMATS, quantize
from keye.weights.gguf.types import BY_NAME, TensorType
from tests.peers import llama_cpp
from tests.peers.install import FOLDER

SHAPES = ("normal", "heavy tails", "shifted", "outliers")


def weights(shape: str, rows: int, columns: int) -> torch.Tensor:
    """Numbers that bfloat16 holds, as float32, of one kind of distribution."""
    random = np.random.default_rng(0)
    x = random.standard_t(5, (rows, columns)) if shape == "heavy tails" else random.standard_normal((rows, columns))
    if shape == "shifted":
        x += 1.5
    if shape == "outliers":
        x[:, ::97] *= 20
    return torch.from_numpy(0.02 * x).bfloat16().float()


def error(form: TensorType, data: np.ndarray, x: torch.Tensor) -> float:
    """Of the weights, relative: root of the squared differences over that of the squares."""
    values = torch.from_numpy(dequantize(form, data.reshape(-1))).double()
    return float((values - x.double().view(-1)).norm() / x.double().norm())


def speed(work: Callable[[], object], x: torch.Tensor, repeat: int) -> float:
    """MB of bfloat16 a second."""
    times = []
    for _ in range(repeat):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return 2e-6 * x.numel() / statistics.median(times)


def measure(kind: str, rows: int, columns: int, repeat: int, with_torch: bool) -> dict[str, Any]:
    form, has_peer = BY_NAME[kind], (FOLDER / ".ready").is_file()
    row_bytes = form.count_bytes(columns)
    result: dict[str, Any] = {"format": kind, "bits": 8 * form.nbytes / form.block}
    for shape in SHAPES:
        x = weights(shape, rows, columns)
        ours = error(form, quantize(x, kind).numpy(), x)
        result[shape] = {"error": ours}
        if has_peer:
            theirs = error(form, llama_cpp.quantize_rows(x.numpy(), form.number, row_bytes), x)
            result[shape] |= {"llama_cpp": theirs, "ratio": ours / theirs}
    x = weights("normal", rows, columns)
    result["mb_s"] = speed(lambda: quantize(x, kind), x, repeat)
    if with_torch:
        with mock.patch("keye.ops.cpu.scales._load", return_value=None):
            result["mb_s_torch"] = speed(lambda: quantize(x, kind), x, repeat)
    if has_peer:
        array = x.numpy()
        result["mb_s_llama_cpp"] = speed(lambda: llama_cpp.quantize_rows(array, form.number, row_bytes), x, repeat)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(kind, options.rows, options.columns, options.repeat, options.torch) for kind in FORMATS]
    if options.json:
        print(json.dumps({"benchmark": "kquants", "machine": machine(), "results": results}, indent=2))
        return
    for result in results:
        ratios = ", ".join(f"{shape} {result[shape].get('ratio', float('nan')):.4f}" for shape in SHAPES)
        speeds = ", ".join(f"{name} {value:.0f}" for name, value in result.items() if name.startswith("mb_s"))
        print(f"{result['format']}: error over llama.cpp's {ratios}; {speeds}")


if __name__ == "__main__":
    main()
