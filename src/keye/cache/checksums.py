"""KV blocks of an index are compared with their checksums when they are first read; noise never becomes an answer.

What was compared is remembered for as long as the file does not change, so that the next question need not do it again.
Knows bytes and checksums, not what they hold.
"""

from __future__ import annotations

import mmap
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from keye.errors import KeyeError
from keye.ops.kv_blocks import KV_BLOCK

#: Bytes of notes on what was compared, one for each block, that are remembered of all files.
_REMEMBERED: Final = 64 << 20
#: Device, inode, size, times of the last changes of content and of the inode, and where in the file the blocks are.
Identity = tuple[int, int, int, int, int, int]
#: That of a file of which nothing is remembered.
FRESH: Final[Identity] = (-1, -1, -1, -1, -1, -1)
_sound: OrderedDict[Identity, NDArray[np.bool_]] = OrderedDict()
_lock = threading.Lock()


def identity_of(file: int, start: int = 0) -> Identity:
    """What tells a part of an open file from others, and from itself before it was changed."""
    status = os.fstat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, start


class BlockCheck:
    """The KV blocks of one mapped file. `sections` are name, offset and bytes of a block of each kind of rows, in the
    order of `crcs`, uint32 [kinds, layers, blocks]. `damage` is the error of the first block that differed."""

    def __init__(
        self, path: Path, mapped: mmap.mmap, sections: Sequence[tuple[str, int, int]], crcs: NDArray[np.uint32],
        identity: Identity,
    ) -> None:  # fmt: skip
        self._path, self._mapped, self._crcs = path, mapped, crcs
        self._first, self._total = 0, crcs.shape[2]
        self._sections = {name: (number, offset, size) for number, (name, offset, size) in enumerate(sections)}
        self.damage: KeyeError | None = None
        with _lock:
            sound = _sound.pop(identity, None)
            self._sound = np.zeros(crcs.shape, dtype=bool) if sound is None else sound
            if identity != FRESH:
                _sound[identity] = self._sound
            while sum(known.nbytes for known in _sound.values()) > _REMEMBERED and len(_sound) > 1:
                _sound.popitem(last=False)

    def part(self, first: int, count: int) -> BlockCheck:
        """The same for `count` blocks from `first` on, which are those of one of several sequences."""
        part = copy(self)
        part._first, part.damage = self._first + first, None
        part._crcs, part._sound = self._crcs[:, :, first : first + count], self._sound[:, :, first : first + count]
        return part

    def is_complete(self, layer: int) -> bool:
        """Whether every block of a layer has been compared."""
        return bool(self._sound[:, layer].all())

    def compare_reads(self, layer: int, names: Sequence[str], counts: Tensor | None = None) -> None:
        """Compares the rows of a layer that were read: those of positions whose `counts` (int64 [positions]) are not 0,
        or all."""
        blocks = None
        if counts is not None:
            full = counts.shape[0] // KV_BLOCK
            blocks = counts[: full * KV_BLOCK].view(full, KV_BLOCK).amax(1).nonzero().squeeze(1).numpy()
        for name in names:
            self.compare(name, layer, blocks)

    def compare(self, name: str, layer: int, blocks: NDArray[np.int64] | None = None) -> None:
        """Compares some blocks of a layer, or all, that were not compared before."""
        if name not in self._sections:
            return
        number, offset, size = self._sections[name]
        sound, total = self._sound[number, layer], self._sound.shape[2]
        wanted = np.arange(total) if blocks is None else blocks[blocks < total]
        for block in wanted[~sound[wanted]].tolist():
            number_in_file = layer * self._total + self._first + block
            start = offset + number_in_file * size
            if zlib.crc32(self._mapped[start : start + size]) == int(self._crcs[number, layer, block]):
                sound[block] = True
            elif self.damage is None:
                why = f"KV block {number_in_file} of its {name} differs from its checksum"
                self.damage = damage_error(self._path, why)


def damage_error(path: Path, why: str) -> KeyeError:
    """The error for a file that is not as it was written."""
    return KeyeError(f"{path} is damaged ({why}): copy it again, or index the video again with keye index")
