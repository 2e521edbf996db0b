"""Products with quantised weights, kernel by kernel: CPU time of one thread, beside the bandwidth that the same run
reads memory with, and beside torch.

    python -m benchmarks.quant_kernels [--outputs 1536] [--inputs 2048] [--rows 1 4 8 16 64 256]

Each product meets a matrix that no cache holds: many of one shape are gone through in turn. `gb_per_second` are bytes
of packed weights over time, `share` is that over the bandwidth of the run, `gop_per_second` counts a multiplication and
an addition as two. `torch_bfloat16` is `F.linear`, `torch_int4` is `_weight_int4pack_mm_for_cpu` with groups of 128.
`experts` is a whole routed layer of Keye-VL-2.0 (128 experts, 8 a token) in one call. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads sleep

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.decode import bandwidth
from benchmarks.scale import machine
from keye.ops import registry
from keye.ops.cpu.quantized import CpuPacked, mix_experts
from keye.ops.quantized import QuantFormat, QuantTensor

FORMATS = {
    "int4": QuantFormat("int4", 64), "int4_group_32": QuantFormat("int4", 32),
    "int4_group_128": QuantFormat("int4", 128),
    "int4_minimum": QuantFormat("int4", 32, has_minimum=True), "int8": QuantFormat("int8"),
}  # fmt: skip
#: Bytes of weights of one kernel: more than any cache holds.
TOTAL = 192 * 2**20


def random_weight(form: QuantFormat, shape: tuple[int, ...]) -> QuantTensor:
    weight = QuantTensor.empty(form, shape)
    codes = weight.codes.view(torch.uint8).view(-1)
    some = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)
    for at in range(0, len(codes), len(some)):
        codes[at : at + len(some)] = some[: len(codes) - at]
    weight.scales.fill_((0.2 if form.kind == "int4" else 0.013) / shape[-1] ** 0.5)
    if weight.minima is not None:
        weight.minima.fill_(0.01)
    return weight


def pack(weight: QuantTensor) -> CpuPacked:
    packed = registry.pack_weight(weight)
    assert isinstance(packed, CpuPacked), "the compiled core cannot be used here: python -m keye.ops.cpu.build says why"
    return packed


def seconds(call: Callable[[int], object], count: int) -> float:
    """CPU seconds of `call(i)`: the best of three rounds over all i."""
    best = float("inf")
    for _ in range(3):
        begin = time.process_time()
        for i in range(count):
            call(i)
        best = min(best, time.process_time() - begin)
    return best / count


def product(form: QuantFormat, rows: int, outputs: int, inputs: int, rate: float) -> dict[str, float]:
    """One kernel at one number of rows."""
    count = max(2, TOTAL // form.nbytes((outputs, inputs)))
    packed, x = [pack(random_weight(form, (outputs, inputs))) for _ in range(count)], activations(rows, inputs)
    duration = seconds(lambda i: packed[i].matmul(x), count if rows < 64 else max(2, count // 8))
    read = packed[0].nbytes / duration
    return {
        "ms": round(duration * 1e3, 4), "gb_per_second": round(read / 1e9, 1), "share": round(read / rate, 2),
        "gop_per_second": round(2 * rows * outputs * inputs / duration / 1e9),
    }  # fmt: skip


def of_torch(rows: int, outputs: int, inputs: int) -> dict[str, float]:
    """Milliseconds of torch's own products."""
    x, some = activations(rows, inputs), max(2, TOTAL // (outputs * inputs * 2))
    plain = [torch.randn(outputs, inputs).bfloat16() for _ in range(some)]
    duration = {"torch_bfloat16_ms": seconds(lambda i: F.linear(x, plain[i]), some if rows < 64 else 4)}
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
    scales = torch.rand(inputs // 128, outputs, 2).bfloat16()
    count = TOTAL // (outputs * inputs // 2)
    packed = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1) for _ in range(count)]
    call = torch.ops.aten._weight_int4pack_mm_for_cpu
    duration["torch_int4_ms"] = seconds(lambda i: call(x, packed[i], 128, scales), count if rows < 64 else 4)
    return {name: round(value * 1e3, 4) for name, value in duration.items()}


def experts(tokens: int, rate: float) -> dict[str, float]:
    """A routed layer of 2.0 in int4: `share` counts the matrices that the tokens choose."""
    form, copies = FORMATS["int4"], 2 if tokens < 64 else 1
    layers = [(pack(random_weight(form, (128, 1536, 2048))), pack(random_weight(form, (128, 2048, 768))))
              for _ in range(copies)]  # fmt: skip
    x, weights = activations(tokens, 2048), torch.full((tokens, 8), 0.125)
    choices = [torch.rand(tokens, 128).topk(8).indices for _ in range(24 if tokens < 64 else 2)]
    duration = seconds(lambda i: mix_experts(*layers[i % copies], x, weights, choices[i]), len(choices))
    touched = sum(len(chosen.unique()) for chosen in choices) / len(choices) / 128
    read = touched * sum(weight.nbytes for weight in layers[0]) / duration
    return {
        "ms": round(duration * 1e3, 3), "gb_per_second": round(read / 1e9, 1), "share": round(read / rate, 2),
        "gop_per_second": round(2 * tokens * 8 * 3 * 2048 * 768 / duration / 1e9),
    }  # fmt: skip


def packing() -> float:
    """Bytes of codes a second that are packed."""
    weight = random_weight(FORMATS["int4"], (32, 1536, 2048))
    return weight.codes.nbytes / seconds(lambda _: pack(weight), 1)


def activations(rows: int, inputs: int) -> Tensor:
    return torch.randn(rows, inputs).bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=1536)
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 64, 256])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 512, 2048], help="of the routed layer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rate, outputs, inputs = bandwidth(), options.outputs, options.inputs
    result: dict[str, Any] = {
        "benchmark": "quant_kernels", "outputs": outputs, "inputs": inputs, "machine": machine(),
        "read_gb_per_second": round(rate / 1e9, 1), "packing_gb_per_second": round(packing() / 1e9, 2),
    }  # fmt: skip
    for name, form in FORMATS.items():
        result[name] = {rows: product(form, rows, outputs, inputs, rate) for rows in options.rows}
    result["torch"] = {rows: of_torch(rows, outputs, inputs) for rows in options.rows}
    result["experts"] = {tokens: experts(tokens, rate) for tokens in options.tokens}
    result["read_gb_per_second_after"] = round(bandwidth() / 1e9, 1)
    print(json.dumps(result))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
