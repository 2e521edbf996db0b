"""Reading selected keys from a mapped file: what advice to the system changes, and what it costs beside memory.

    python benchmarks/kv_tiers.py --json [--tokens 262144] [--folder DIR]

One layer of Keye-VL-2.0 (4 heads of 128): keys of `tokens` tokens lie in a file that is mapped as an index is. A step
gathers 2,048 rows at random places (`topk` of the model), the next one keeps 3 of 4 of them. Before the first step the
kernel is asked to forget the file's pages. `first_read_mb` are bytes that came from the disk (/proc/self/io), medians
of the repeats. `fetched` is what keye does: the map is advised that single rows are read (MADV_RANDOM), and the rows of
a step are asked for together (MADV_WILLNEED) before they are touched; `advised` does only the first, `plain` neither.
`memory` is ordinary memory. Linux only.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch

from keye.cache.slabs import KVFormat, KVLayout
from keye.config import load_model_config
from keye.hub import asset
from keye.models.attention import cache_rows
from keye.ops.mapped import advise, fetch_rows, map_tensor

TOPK, DEVICE_SHARE = 2048, 0.75


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object; this is the only form")
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--kv", choices=get_args(KVFormat), default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the file is written (default: the system's)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = load_model_config(asset("configs/2.0")).text
    width = KVLayout.of(cache_rows(text), torch.bfloat16, options.kv).rows["k"].row_bytes
    result: dict[str, Any] = {"tokens": options.tokens, "row_bytes": width, "rows": TOPK, "kept": DEVICE_SHARE}
    stored = torch.randint(0, 256, (options.tokens, width), dtype=torch.uint8)
    result["memory"] = measure(lambda: stored, lambda: None, options.repeats)
    with tempfile.TemporaryDirectory(prefix="keye-tiers-", dir=options.folder) as folder:
        path = Path(folder) / "keys"
        stored.numpy().tofile(path)
        for name, advised, fetched in (("fetched", True, True), ("advised", True, False), ("plain", False, False)):
            result[name] = measure(
                lambda advised=advised: map_keys(path, stored.shape, advised),
                lambda: forget(path),
                options.repeats,
                fetched=fetched,
            )
    print(json.dumps(result, indent=2))


def map_keys(path: Path, shape: torch.Size, advised: bool) -> torch.Tensor:
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if advised:
        advise(mapped, "MADV_RANDOM", 0, len(mapped))
    return map_tensor(mapped, 0, shape)


def forget(path: Path) -> None:
    """Writes the file out and asks the kernel to drop its pages."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    open_keys: Callable[[], torch.Tensor], before: Callable[[], None], repeats: int, *, fetched: bool = False
) -> dict[str, float]:
    """Milliseconds and megabytes read of a first step and of the next one."""
    runs = []
    for repeat in range(repeats):
        before()
        keys, generator = open_keys(), torch.Generator().manual_seed(repeat)
        places = torch.randperm(keys.shape[0], generator=generator)[:TOPK]
        others = torch.randint(0, keys.shape[0], (TOPK,), generator=generator)
        following = torch.where(torch.rand(TOPK, generator=generator) < DEVICE_SHARE, places, others)
        runs.append([*gather(keys, places, fetched), *gather(keys, following, fetched)])
    names = ("first_ms", "first_read_mb", "next_ms", "next_read_mb")
    return {
        name: round(statistics.median(column), 3) for name, column in zip(names, zip(*runs, strict=True), strict=True)
    }


def gather(keys: torch.Tensor, places: torch.Tensor, fetched: bool) -> tuple[float, float]:
    read, begin = read_bytes(), time.perf_counter()
    if fetched:
        fetch_rows(keys, places)
    keys[places]
    return (time.perf_counter() - begin) * 1e3, (read_bytes() - read) / 1e6


def read_bytes() -> int:
    """Bytes that this process has had read from disks."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


if __name__ == "__main__":
    main()
