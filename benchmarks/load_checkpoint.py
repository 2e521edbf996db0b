"""Loading a checkpoint of many gigabytes against a plain sequential read of the same files, and the memory it takes.

    python benchmarks/load_checkpoint.py --gb 8

Writes a synthetic checkpoint in the layout of Keye-VL-2.0 (bfloat16, shards of 1 GB, as many layers as the size asks
for) to a temporary folder, then times in turn, each with the files' page cache dropped before: reading every file from
front to back into one buffer, `load_model` in a fresh process, and filling as much fresh memory with ones in another.
Prints one JSON object; a ratio is the rate of a load over that of the read before it. Targets: ratio >= 0.8,
anonymous memory <= model + 300 MB. Linux only (posix_fadvise, /proc).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SHARD_BYTES = 10**9
BUFFER_BYTES = 16 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=8.0, help="size of the checkpoint in gigabytes")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of one read and one load; their median counts")
    parser.add_argument("--folder", type=Path, help="where to write the files for a while (default: the system's)")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # the child process: loads this folder and reports
    parser.add_argument("--fill", type=int, help=argparse.SUPPRESS)  # the child process: fills so many bytes
    arguments = parser.parse_args()
    if arguments.fill is not None:
        print(fill(arguments.fill))
        return
    if arguments.load is not None:
        print(json.dumps(load(arguments.load)))
        return
    with tempfile.TemporaryDirectory(prefix="keye-load-", dir=arguments.folder) as name:
        print(json.dumps(measure(Path(name), arguments.gb, arguments.repeats)))


def measure(folder: Path, gigabytes: float, repeats: int) -> dict[str, Any]:
    """Writes the checkpoint and runs both ways of reading it in turn."""
    total = write_checkpoint(folder, gigabytes)
    reads: list[float] = []
    loads: list[dict[str, Any]] = []
    fills: list[float] = []
    for _ in range(repeats):
        drop_cache(folder)
        reads.append(read_plainly(folder))
        drop_cache(folder)
        command = [sys.executable, __file__, "--load", str(folder)]
        loads.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        command = [sys.executable, __file__, "--fill", str(loads[0]["model_bytes"])]
        fills.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    usage, anonymous = loads[0]["model_bytes"], max(item["anonymous_peak"] for item in loads)
    read_rates = [total / seconds / 1e9 for seconds in reads]
    load_rates = [usage / item["seconds"] / 1e9 for item in loads]
    ratios = [loaded / read for loaded, read in zip(load_rates, read_rates, strict=True)]
    return {
        "checkpoint_gb": round(total / 1e9, 3),
        "files": len(list(folder.glob("*.safetensors"))),
        "read_gb_per_s": [round(rate, 3) for rate in read_rates],
        "load_gb_per_s": [round(rate, 3) for rate in load_rates],
        "fill_gb_per_s": [round(usage / seconds / 1e9, 3) for seconds in fills],
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 3),
        "ratio_target": 0.8,
        "model_mb": round(usage / 1e6, 1),
        "anonymous_peak_mb": round(anonymous / 1e6, 1),
        "anonymous_before_mb": round(loads[0]["anonymous_before"] / 1e6, 1),
        "anonymous_beyond_model_mb": round((anonymous - usage) / 1e6, 1),
        "anonymous_beyond_model_target_mb": 300,
    }


def config(layers: int) -> dict[str, Any]:
    """Keye-VL-2.0 with another number of layers."""
    from keye.config import read_json
    from keye.hub import asset

    return read_json(asset("configs/2.0") / "config.json") | {"num_hidden_layers": layers}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    from keye.models.outline import outline

    return dict(outline(config(layers)).shapes)


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """Writes shards of random bytes with their index; returns the bytes of all tensors."""
    import torch
    from safetensors.torch import save_file

    def size(tensors: dict[str, tuple[int, ...]]) -> int:
        return sum(2 * torch.Size(shape).numel() for shape in tensors.values())

    item = size(shapes(2)) - size(shapes(1))
    layers = max(1, round((gigabytes * 1e9 - size(shapes(1))) / item) + 1)
    noise = torch.empty(2**24, dtype=torch.int16).random_().view(torch.bfloat16)
    wanted, weight_map = shapes(layers), dict[str, str]()
    (folder / "config.json").write_text(json.dumps(config(layers)))
    shard: dict[str, torch.Tensor] = {}
    for position, (name, shape) in enumerate(wanted.items(), start=1):
        count = torch.Size(shape).numel()
        shard[name] = noise.repeat(-(-count // len(noise)))[:count].view(shape)
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES or position == len(wanted):
            file = f"model-{position:05}.safetensors"
            save_file(shard, folder / file)
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return size(wanted)


def drop_cache(folder: Path) -> None:
    """Writes the files out and asks the kernel to forget their pages."""
    for file in folder.glob("*.safetensors"):
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(folder: Path) -> float:
    """Seconds to read all files one after the other."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    begin = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return time.perf_counter() - begin


def load(folder: Path) -> dict[str, Any]:
    """Loads the model in this process; anonymous memory is sampled while it loads."""
    import torch

    from keye.config import load_model_config
    from keye.models.load import load_model

    torch.set_num_threads(1)
    chosen = load_model_config(folder)
    before = anonymous_bytes()
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    model, _ = load_model(folder, chosen)
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    usage = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {"seconds": seconds, "model_bytes": usage, "anonymous_before": before,
            "anonymous_peak": max(*peak, anonymous_bytes())}  # fmt: skip


def fill(size: int) -> float:
    """Seconds to write to every page of fresh memory, with the same request for huge pages as loading."""
    import torch

    from keye.weights.source import ask_for_huge_pages

    torch.set_num_threads(1)
    memory = torch.empty(size, dtype=torch.uint8)
    ask_for_huge_pages(memory)
    begin = time.perf_counter()
    memory.fill_(1)
    return time.perf_counter() - begin


def anonymous_bytes() -> int:
    """Memory of this process that no file backs (RssAnon)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
