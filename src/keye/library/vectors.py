"""Vectors of an image-text embedder beside an index: one for each sampled frame, appended as frames are read.

    ID.vectors   4,096 bytes of header (magic, length of JSON, JSON with embedder and dimension), then bfloat16 [N, dim]
    ID.times     float64 [N], seconds

A killed process leaves at most an incomplete last row in either file, which readers ignore. Rows are in the order in
which frames were read; a frame that was read twice is there twice.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keye.errors import KeyeError
from keye.sessions.search.embedders import MAX_DIM, Embedder, unit_vectors

_MAGIC: Final = b"keye vectors 1\0\0"
_HEADER: Final = 4096
#: Seconds between two frames of one video that are both among the best.
APART: Final = 5.0


class VectorWriter:
    """Appends to the vectors of one index; those of another embedder are begun again."""

    def __init__(self, index: Path, embedder: Embedder) -> None:
        self._embedder = embedder
        self._vectors, self._times = _paths(index)
        stored = read_vectors(index)
        if stored is None or (stored.embedder, stored.dim) != (embedder.name, embedder.dim):
            header = json.dumps({"embedder": embedder.name, "dim": embedder.dim}).encode()
            if len(header) > _HEADER - len(_MAGIC) - 4:
                raise KeyeError(f"the name of the embedder has {len(embedder.name)} characters; that is too long")
            self._times.write_bytes(b"")
            self._vectors.write_bytes((_MAGIC + struct.pack("<I", len(header)) + header).ljust(_HEADER, b"\0"))
            return
        # An incomplete last row would shift all that follow.
        with self._vectors.open("r+b") as vectors, self._times.open("r+b") as times:
            vectors.truncate(_HEADER + 2 * stored.dim * len(stored.times))
            times.truncate(8 * len(stored.times))

    def append(self, frames: NDArray[np.uint8], times: Sequence[float]) -> None:
        """Embeds RGB frames uint8 [N, H, W, 3] shown at `times` and appends their vectors. `KeyeError` where the
        embedder returns anything else than vectors."""
        unit = unit_vectors(self._embedder.embed_frames(frames), len(times), self._embedder)
        rows = torch.from_numpy(unit).to(torch.bfloat16).view(torch.uint8)
        with self._vectors.open("ab") as vectors, self._times.open("ab") as file:
            vectors.write(rows.numpy().tobytes())
            file.write(np.asarray(times, np.float64).tobytes())


@dataclass(frozen=True)
class FrameVectors:
    """The vectors of one index: bfloat16 [N, dim] of unit length, mapped from the file, and the seconds of each."""

    embedder: str
    dim: int
    times: NDArray[np.float64]
    vectors: Tensor

    def match(self, text: Tensor) -> NDArray[np.float32]:
        """The cosine of each frame and a text vector of unit length, bfloat16 [dim]."""
        cosines: NDArray[np.float32] = torch.mv(self.vectors, text).float().numpy()
        return cosines


def read_vectors(index: Path) -> FrameVectors | None:
    """The vectors beside an index; None where there are none or the files are damaged."""
    vectors, times = _paths(index)
    try:
        with vectors.open("rb") as file:
            head = file.read(_HEADER)
        size, rows = vectors.stat().st_size - _HEADER, times.stat().st_size // 8
        if len(head) < _HEADER or not head.startswith(_MAGIC):
            return None
        (length,) = struct.unpack_from("<I", head, len(_MAGIC))
        about = json.loads(head[len(_MAGIC) + 4 :][: min(length, _HEADER)])
        name, dim = about["embedder"], about["dim"]
        if not isinstance(name, str) or type(dim) is not int or not 0 < dim <= MAX_DIM:
            return None
        count = min(size // (2 * dim), rows)
        seconds = np.fromfile(times, np.float64, count)
        if not np.isfinite(seconds).all():
            return None
        if count == 0:
            return FrameVectors(name, dim, seconds, torch.empty((0, dim), dtype=torch.bfloat16))
        mapped = np.memmap(vectors, np.uint8, "c", _HEADER, (count * 2 * dim,))
        return FrameVectors(name, dim, seconds, torch.from_numpy(mapped).view(torch.bfloat16).view(count, dim))
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None


def _paths(index: Path) -> tuple[Path, Path]:
    return index.with_suffix(".vectors"), index.with_suffix(".times")


@dataclass(frozen=True)
class Match:
    """The frame at `time` of index number `number`, and its cosine with a text."""

    number: int
    time: float
    cosine: float


def rank_frames(indexes: Sequence[Path], embedder: Embedder, text: str, count: int) -> tuple[list[Match], list[int]]:
    """The `count` frames beside `indexes` that match a text best, no two of one video within `APART` seconds, the best
    first; and the numbers of the indexes without vectors of this embedder."""
    unit = unit_vectors(embedder.embed_text(text), 1, embedder)
    vector = torch.from_numpy(unit[0]).to(torch.bfloat16)
    matches: list[Match] = []
    without: list[int] = []
    for number, index in enumerate(indexes):
        stored = read_vectors(index)
        if stored is None or (stored.embedder, stored.dim) != (embedder.name, embedder.dim) or not len(stored.times):
            without.append(number)
            continue
        cosines = stored.match(vector)
        times: list[float] = []
        for place in np.argsort(-cosines)[: 8 * count].tolist():
            time = float(stored.times[place])
            if len(times) == count:
                break
            if all(abs(time - other) >= APART for other in times):
                times.append(time)
                matches.append(Match(number, time, float(cosines[place])))
    return sorted(matches, key=lambda match: -match.cosine)[:count], without
