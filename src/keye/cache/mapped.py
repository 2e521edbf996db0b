"""Files without a name for keys and values, mapped into memory, and the room on disks."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from keye.cache.ledger import OutOfMemory
from keye.errors import KeyeError
from keye.ops.mapped import advise, map_tensor
from keye.units import format_bytes

#: Bytes that are left free on a disk.
DISK_RESERVE: Final = 1 << 30


def scratch_tensor(folder: Path, shape: Sequence[int], *, reserve: int = DISK_RESERVE) -> Tensor:
    """A uint8 tensor in a new file of `folder` that has no name, and is gone with the tensor or the process.

    Its room on disk is taken at once, since a map that runs out of disk kills the process. `OutOfMemory` where that
    leaves less than `reserve` bytes.
    """
    nbytes = torch.Size(shape).numel()
    check_disk(folder, nbytes, reserve)
    try:
        with tempfile.TemporaryFile(dir=folder, prefix="keye-kv-") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:
                os.ftruncate(file.fileno(), nbytes)
            mapped = mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        raise OutOfMemory(f"{folder} cannot hold {format_bytes(nbytes)} of keys and values ({error.strerror}); "
                          "name another folder") from None  # fmt: skip
    advise(mapped, "MADV_RANDOM", 0, nbytes)
    return map_tensor(mapped, 0, shape)


def check_disk(folder: Path, nbytes: int, reserve: int = DISK_RESERVE) -> None:
    """`OutOfMemory` when `nbytes` more in `folder` would leave less than `reserve`; `KeyeError` for no folder."""
    if not folder.is_dir():
        raise KeyeError(f"{folder} is not a folder: name a folder for keys and values")
    free = shutil.disk_usage(folder).free
    if free - nbytes < reserve:
        raise OutOfMemory(
            f"{format_bytes(nbytes)} of keys and values, and {format_bytes(reserve)} that stay free, do not fit on the "
            f"disk of {folder}, where {format_bytes(free)} are free; free some, name a folder on another disk, or "
            "store them in fewer bits"
        )
