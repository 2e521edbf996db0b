"""Quantising: sizes of the published models, megabytes of bfloat16 a second, and the memory that it takes.

    python -m benchmarks.quant_speed                    # sizes, and speeds of a matrix and of fused experts: seconds
    python -m benchmarks.quant_speed --layers 2         # and a checkpoint of 2.0 with so many layers, on disk

`sizes` are of the published configurations on the meta device: bytes in each format, and the share of the bfloat16
bytes that is quantised. `speed` is of one thread in processor time: a matrix [4096, 2048] and 8 fused experts
[2048, 1536], `aware` with weights of inputs. `files` writes a checkpoint of 2.0's width with random numbers to a
temporary folder (4.6 GB for two layers), quantises it (`quantize`) and loads it with `quant="int4"` (`load`), each in a
process of its own: seconds, bytes of the source a second, and the peak of anonymous memory (RssAnon), for `load` beyond
the result.
Targets: int4 with vision <= 17.5e9 bytes, share >= 0.99, >= 150 MB/s or disk-bound, <= 4 GiB, <= result + 2 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from benchmarks.load_checkpoint import anonymous_bytes, config, drop_cache
from keye.config import KeyeConfig, load_model_config, model_config_from_dict
from keye.hub import asset
from keye.models.keye import KeyeModel
from keye.models.load import load_model, replace_layers
from keye.models.quant_fill import plain_state, quantize_layer, quantized_weights
from keye.models.quantize import quantize_checkpoint
from keye.ops.quantized import QuantTensor
from keye.quant.policy import make_format, make_policy
from keye.quant.search import Loss, quantize_into
from keye.weights.safetensors import ShardWriter

KINDS = ("int4", "int8", "fp8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=0, help="layers of a checkpoint that is written and quantised")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch for the checkpoint (default: 1)")
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "SOURCE", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child is not None:
        print(json.dumps(child(*options.child)))
        return
    result: dict[str, Any] = {
        "sizes": {name: sizes(load_model_config(asset(f"configs/{name}"))) for name in ("2.0", "1.5", "preview")},
        "speed_mb_per_s": {kind: speed(kind) for kind in KINDS},
    }
    if options.layers:
        with tempfile.TemporaryDirectory(prefix="keye-quant-") as scratch:
            result["files"] = files(Path(scratch), options.layers, options.threads)
    print(json.dumps(result, indent=2))


def sizes(published: KeyeConfig) -> dict[str, Any]:
    """Bytes of a model in each format, without what no forward pass reads."""
    out: dict[str, Any] = {}
    for kind in KINDS:
        policy = make_policy(kind)
        with torch.device("meta"):
            model = KeyeModel(published).bfloat16()

            def quantise(name: str, layer: torch.nn.Module) -> torch.nn.Module:
                form = policy.format_of(f"{name}.weight")  # noqa: B023 - called in this round
                return layer if form is None else quantize_layer(layer, form)

            replace_layers(model, quantise)
        weights = quantized_weights(model).values()
        plain = sum(tensor.nbytes for tensor in plain_state(model).values())
        before = sum(2 * weight.numel() for weight in weights)
        out |= {"bf16": before + plain, kind: sum(weight.tensor.nbytes for weight in weights) + plain,
                "share_quantised": round(before / (before + plain), 5)}  # fmt: skip
    return out


def speed(kind: str) -> dict[str, float]:
    """Megabytes of bfloat16 a second."""
    form, noise = make_format(kind), torch.randn(4096, 2048).bfloat16()  # type: ignore[arg-type]
    experts, counts = torch.randn(8, 2048, 1536).bfloat16(), torch.rand(2048)

    def matrix(importance: torch.Tensor | None) -> None:
        quantize_into(QuantTensor.empty(form, (4096, 2048)), noise, importance, Loss())

    def fused() -> None:
        quantize_into(QuantTensor.empty(form, (8, 1536, 2048)), experts.transpose(1, 2), None, Loss())

    works: dict[str, tuple[Callable[[], None], int]] = {
        "matrix": (lambda: matrix(None), noise.nbytes), "aware": (lambda: matrix(counts), noise.nbytes),
        "experts": (fused, experts.nbytes),
    }  # fmt: skip
    return {name: round(max(rate(work, size) for _ in range(3)), 1) for name, (work, size) in works.items()}


def rate(work: Callable[[], None], size: int) -> float:
    begin = time.process_time()
    work()
    return size / (time.process_time() - begin) / 1e6


def files(scratch: Path, layers: int, threads: int) -> dict[str, Any]:
    """A checkpoint on disk, quantised and loaded in processes of their own."""
    source = write_checkpoint(scratch / "source", layers)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    results: dict[str, Any] = {"layers": layers, "source_gb": round(size / 1e9, 3), "threads": threads}
    for what in ("quantize", "load"):
        drop_cache(source)
        module = [sys.executable, "-m", "benchmarks.quant_speed", "--threads", str(threads)]
        command = [*module, "--child", what, str(source), str(scratch / "int4")]
        figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        results[what] = {**figures, "mb_per_s": round(size / figures["seconds"] / 1e6, 1),
                         "mb_per_cpu_s": round(size / figures["cpu_seconds"] / 1e6, 1)}  # fmt: skip
    return results


def write_checkpoint(folder: Path, layers: int) -> Path:
    """Random normal numbers in the layout of 2.0, shards of one layer."""
    folder.mkdir()
    raw = config(layers)
    (folder / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        state = {n: tuple(t.shape) for n, t in KeyeModel(model_config_from_dict(raw)).state_dict().items()}
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in state.items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "other"
        groups.setdefault(layer, {})[name] = shape
    noise, weight_map = (torch.randn(1 << 24) * 0.02).bfloat16(), {}
    for layer, shapes in groups.items():
        file = f"model-{layer}.safetensors"
        with ShardWriter(folder / file, {name: (torch.bfloat16, shape) for name, shape in shapes.items()}) as writer:
            for name, shape in shapes.items():
                count = torch.Size(shape).numel()
                writer.write(name, noise.repeat(-(-count // len(noise)))[:count].view(shape))
        weight_map |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def child(what: str, source: str, out: str) -> dict[str, Any]:
    """Quantises or loads in this process, whose anonymous memory is sampled."""
    peak, done = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    chosen, begin, cpu = load_model_config(Path(source)), time.perf_counter(), time.process_time()
    if what == "quantize":
        result = quantize_checkpoint(Path(source), chosen, Path(out), make_policy("int4")).bytes
    else:
        model, _ = load_model(Path(source), chosen, quant="int4")
        result = sum(w.format.nbytes(w.shape) for w in quantized_weights(model).values())
        result += sum(tensor.nbytes for tensor in plain_state(model).values())
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    done.set()
    watcher.join()
    highest = max(*peak, anonymous_bytes())
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "result_bytes": result,
            "peak_mib": round(highest / 2**20), "beyond_result_mib": round((highest - result) / 2**20)}  # fmt: skip


if __name__ == "__main__":
    main()
