"""How much memory this machine has, and how much of it is free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: Limit and use of this process's control group (version 2), where a container sets one.
_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """Bytes of one device's memory; `free` can still be had."""

    device: str
    total: int
    free: int


def main_memory(meminfo: Path = Path("/proc/meminfo"), group: Path = _GROUP) -> Memory | None:
    """Memory of the processor: what Linux says, or the limit of a container where that is lower. None elsewhere."""
    try:
        lines = meminfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.split()[-1] == "kB"}
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no group, or the word "max"
        return Memory("cpu", total, free)
    return Memory("cpu", min(total, limit), max(0, min(free, limit - used)))


def memories() -> list[Memory]:
    """Main memory and that of every GPU that torch can use."""
    import torch

    found = [memory for memory in [main_memory()] if memory is not None]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            found.append(Memory(f"cuda:{i}", total, free))
    return found
