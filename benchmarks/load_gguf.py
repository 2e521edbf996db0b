"""Loading a language model of 2.0's width from a GGUF file of mixed K-quants: rate, memory, and the bits that are kept.

    python -m benchmarks.load_gguf --layers 3

Writes a file of random blocks in the mix of Q4_K_M (down projections, values and head in Q6_K) to a temporary folder
and loads it twice in fresh processes: as it is, which keeps the bits, and with `quant="none"` as plain bfloat16. Prints
one JSON object: bytes of the file and of the weights in memory, the most anonymous memory while loading beyond them,
and megabytes of the file a second of processor time. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load_checkpoint import anonymous_bytes, config
from keye.models.outline import outline
from keye.weights.gguf.metadata import KEYE2, text_metadata
from keye.weights.gguf.names import Sizes, write_recipe
from keye.weights.gguf.types import BY_NAME, TensorType
from tests.support.gguf import Draft, Entry

#: Places of the scales of a block: random bytes there would often be infinite.
_SCALES = {"Q4_K": (0, 2), "Q6_K": (208,)}


def kind_of(name: str, dimensions: int) -> TensorType:
    """The type of a tensor, much as in llama.cpp's mix."""
    if dimensions == 1 or "ffn_gate_inp" in name:
        return BY_NAME["F32"]
    if "indexer" in name:
        return BY_NAME["F16"]
    return BY_NAME["Q6_K" if name.startswith("output.") or "ffn_down" in name or "attn_v" in name else "Q4_K"]


def random_bytes(kind: TensorType, count: int, noise: dict[str, np.ndarray]) -> bytes:
    """Bytes of `count` numbers; blocks are repeated every few thousand."""
    if kind.name not in noise:
        rng = np.random.default_rng(0)
        if kind.name in _SCALES:
            blocks = rng.integers(0, 256, (4096, kind.nbytes), np.uint8)
            for place in _SCALES[kind.name]:
                blocks[:, place : place + 2] = (rng.random((4096, 1)) * 1e-3).astype("<f2").view(np.uint8)
        else:
            blocks = (rng.standard_normal(1 << 16) * 0.02).astype("<f2" if kind.nbytes == 2 else "<f4").view(np.uint8)
        noise[kind.name] = blocks.reshape(-1)
    wanted, data = kind.count_bytes(count), noise[kind.name]
    return np.resize(data, wanted).tobytes()


def write_file(path: Path, layers: int) -> int:
    """Writes the model; returns the numbers in it."""
    raw = {**config(layers), "vision_config": None}
    sparse, total = raw["sa_config"], 0
    sizes = Sizes(sparse["indexer_num_heads"], sparse["indexer_head_dim"])
    entries, noise = list[Entry](), dict[str, np.ndarray]()
    for name, shape in outline(raw).shapes.items():
        recipe = write_recipe(name, shape, sizes)
        assert recipe is not None
        for part in recipe.parts:
            own = shape if len(shape) == 1 else (*recipe.layout[:-2], part.rows, recipe.layout[-1])
            kind = kind_of(part.tensor, len(own))
            entries.append(Entry(part.tensor, own, random_bytes(kind, int(np.prod(own)), noise), kind.number))
            total += int(np.prod(own))
    metadata = {"general.architecture": KEYE2, "general.type": "model", **text_metadata(raw, KEYE2)}
    Draft(metadata, entries).write(path)
    return total


def load(path: Path, quant: str | None) -> dict[str, Any]:
    """Loads the model in this process."""
    import threading
    import time

    import torch

    from keye.config import load_model_config
    from keye.hub import resolve
    from keye.models.load import load_model
    from keye.quant.layers import QuantizedWeight

    folder = resolve(path)
    chosen, peaks, done = load_model_config(folder), [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peaks.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin, started = time.perf_counter(), time.process_time()
    model, _ = load_model(folder, chosen, dtype=torch.bfloat16, quant=quant)
    seconds, busy = time.perf_counter() - begin, time.process_time() - started
    done.set()
    watcher.join()
    weights = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    size = sum(parameter.nbytes for parameter in model.parameters())
    size += sum(weight.packed.nbytes if weight.packed is not None else weight.tensor.nbytes for weight in weights)
    return {"seconds": seconds, "cpu_seconds": busy, "bytes": size, "beyond": max(peaks) - peaks[0] - size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # the child process
    parser.add_argument("--quant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load is not None:
        print(json.dumps(load(arguments.load, arguments.quant)))
        return
    with tempfile.TemporaryDirectory(prefix="keye-load-gguf-") as folder:
        path = Path(folder) / "model.gguf"
        numbers, result = write_file(path, arguments.layers), dict[str, Any]()
        for name, quant in (("kept", []), ("bfloat16", ["--quant", "none"])):
            command = [sys.executable, "-m", "benchmarks.load_gguf", "--load", str(path), *quant]
            child = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            result[name] = {
                "megabytes": round(child["bytes"] / 1e6), "bits_per_weight": round(8 * child["bytes"] / numbers, 2),
                "megabytes_beyond_while_loading": round(child["beyond"] / 1e6), "seconds": round(child["seconds"], 2),
                "cpu_seconds": round(child["cpu_seconds"], 2),
                "megabytes_a_cpu_second": round(path.stat().st_size / child["cpu_seconds"] / 1e6),
            }  # fmt: skip
        size = path.stat().st_size
        file = {"megabytes": round(size / 1e6), "bits_per_weight": round(8 * size / numbers, 2)}
        print(json.dumps({"layers": arguments.layers, "file": file, **result}))


if __name__ == "__main__":
    main()
