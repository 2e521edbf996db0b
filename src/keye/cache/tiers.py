"""How one run stores keys and values: in which numbers, and in which memory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

import torch

from keye.cache.ledger import Ledger
from keye.cache.slabs import (
    SLAB_BLOCKS,
    KVFormat,
    KVLayout,
    KVStore,
    SlabMaker,
    check_kv_format,
    file_slabs,
    host_slabs,
    memory_slabs,
)
from keye.errors import KeyeError, Option
from keye.ops.kv_blocks import RowSpec
from keye.process import memory_on

#: Where keys and values lie: in the memory of the model's device, in main memory, or in a mapped file.
Tier = Literal["memory", "host", "file"]
#: Share of the free memory that may be taken where nothing else is said.
FREE_SHARE: Final = 0.85
#: Blocks of a slab in a file: 4,096 tokens, so that the longest context needs few files.
FILE_BLOCKS: Final = 64


def free_memory(device: torch.device | str) -> int | None:
    """Bytes that a model on `device` may take by default: a share of what is free now. None where that is not known."""
    memory = memory_on(str(device))
    return None if memory is None else int(FREE_SHARE * memory.free)


@dataclass(frozen=True)
class KVOptions:
    """`kv` is the format of keys and values, `indexer_kv` that of indexer keys. `folder` is that of the file tier, the
    system's folder for temporary files by default. `memory` bytes may be taken for keys, values and visual tokens, None
    for no limit. KeyeError names a field out of range."""

    kv: KVFormat = "auto"
    indexer_kv: KVFormat = "auto"
    tier: Tier = "memory"
    folder: Path | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        check_kv_format(self.kv)
        check_kv_format(self.indexer_kv)
        if self.tier not in get_args(Tier):
            raise KeyeError("{} is {!r}; choose one of {}", Option("kv_tier"), self.tier, ", ".join(get_args(Tier)))
        if self.folder is not None and self.tier != "file":
            raise KeyeError("{} has no effect without {}", Option("kv_folder"), Option("kv_tier", "file"))

    def ledger(self) -> Ledger:
        """The account book of one model."""
        return Ledger(self.memory)

    def layout(self, specs: Mapping[str, RowSpec], dtype: torch.dtype) -> KVLayout:
        """The formats of the rows that a model with activations of `dtype` declares."""
        return KVLayout.of(specs, dtype, self.kv, self.indexer_kv)

    def store(self, layout: KVLayout, device: torch.device | str, ledger: Ledger | None = None) -> KVStore:
        """A store in this tier for a model on `device`."""
        blocks = FILE_BLOCKS if self.tier == "file" else SLAB_BLOCKS
        return KVStore(layout, ledger=ledger, make_slab=self._slabs(device), slab_blocks=blocks)

    def _slabs(self, device: torch.device | str) -> SlabMaker:
        if self.tier == "file":
            return file_slabs(self.folder or Path(tempfile.gettempdir()), device)
        return host_slabs(device) if self.tier == "host" else memory_slabs(device)
