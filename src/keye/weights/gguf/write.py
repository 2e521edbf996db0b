"""Writing GGUF files tensor by tensor: the header first, then every piece of a tensor at its place, in any order.

A file appears under its name when it is complete. Until then its draft lies beside it, and one that a kill left behind
is continued where the same conversion is started again. Knows the layout of files; what is written is known to
`convert`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Final

import numpy as np
import torch
from torch import Tensor

from keye.errors import KeyeError
from keye.files import DiskFull, unwritable
from keye.units import format_bytes
from keye.weights.gguf.kquants import HALF_MAX, quantize
from keye.weights.gguf.reader import ALIGNMENT, MAGIC, Value
from keye.weights.gguf.types import BY_NAME, TensorType

VERSION: Final = 3
_PLAIN: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Numbers of value types, with the struct format of scalars; of arrays by their numpy type.
_UINT32, _INT32, _FLOAT32, _BOOL, _TEXT, _ARRAY, _INT64 = 4, 5, 6, 7, 8, 9, 11
_ARRAYS: Final = {"uint32": _UINT32, "int32": _INT32, "float32": _FLOAT32, "int64": _INT64}
#: Steps between two notes of what is done.
_NOTE_EVERY: Final = 16


@dataclass(frozen=True)
class Stored:
    """A tensor to write: `shape` as in torch, the bytes begin at byte `start` of the file."""

    type: TensorType
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        return self.type.count_bytes(self.shape[-1])

    @property
    def nbytes(self) -> int:
        return self.type.count_bytes(math.prod(self.shape))


@dataclass(frozen=True)
class Layout:
    """A file before its tensors are written: the bytes of its header, its tensors by name, and its size."""

    header: bytes
    tensors: Mapping[str, Stored]
    size: int


def lay_out(metadata: Mapping[str, Value], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Layout:
    """The layout of a file with `tensors`, (type, shape) by name, in their order."""
    stored, offset = {}, 0
    for name, (kind, shape) in tensors.items():
        stored[name] = Stored(BY_NAME[kind], shape, offset)
        offset += _align(stored[name].nbytes)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(stored), len(metadata))]
    for key, value in metadata.items():
        parts += (_text(key), _value(value))
    for name, tensor in stored.items():
        dims = tensor.shape[::-1]
        parts += (_text(name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.type.number, tensor.start))
    header = b"".join(parts)
    begin = _align(len(header))
    placed = {name: Stored(tensor.type, tensor.shape, begin + tensor.start) for name, tensor in stored.items()}
    return Layout(header, placed, begin + offset)


def _align(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    """The type of a value and its bytes."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        short = 0 <= value < 1 << 32
        return struct.pack("<II" if short else "<Iq", _UINT32 if short else _INT64, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _TEXT) + _text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _TEXT, len(value)) + b"".join(map(_text, value))
    data = np.ascontiguousarray(value.astype(value.dtype.newbyteorder("<")))
    return struct.pack("<IIQ", _ARRAY, _ARRAYS[value.dtype.name], len(value)) + data.tobytes()


def encode_rows(rows: Tensor, kind: str, name: str) -> Tensor:
    """float32 [rows, columns] as the bytes of a type, uint8; `KeyeError` names the tensor whose numbers are not finite
    or too large for half precision."""
    largest = float(rows.abs().max()) if rows.numel() else 0.0
    if not math.isfinite(largest):
        raise KeyeError(
            f"{name} holds NaN or infinite numbers, so that it cannot be converted: fetch the checkpoint again"
        )
    if kind in ("F16", "Q8_0") and largest > HALF_MAX * (127 if kind == "Q8_0" else 1):
        raise KeyeError(f"{name} holds {largest:.3g}, which {kind} cannot: convert to BF16 or F32")
    if kind in _PLAIN:
        return rows.to(_PLAIN[kind]).contiguous().view(torch.uint8)
    return quantize(rows, kind)


class Draft:
    """A file that is being written. `write` may be called from several threads; `steps` counts those that are done, in
    their order, over all attempts."""

    def __init__(self, path: Path, layout: Layout, fingerprint: str) -> None:
        self.path, self.layout = path, layout
        self._file, self._note = _draft_path(path), _draft_path(path).with_suffix(".json")
        self._own = hashlib.sha256(layout.header + fingerprint.encode()).hexdigest()
        self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._descriptor), os.stat(self._file)):
                raise BlockingIOError  # the other process completed it meanwhile
        except OSError:
            os.close(self._descriptor)
            raise KeyeError(f"{path} is being written by another process; wait for it, or name another file") from None
        self._done: set[int] = set()
        self._lock = Lock()
        try:
            self.steps = self._continue()
        except BaseException:
            self.close(complete=False, keep=False)
            raise

    def _continue(self) -> int:
        """Steps that an earlier attempt finished; without one, the header is written and the file gets its size."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads(self._note.read_text(encoding="utf-8"))
            if note["conversion"] == self._own and os.fstat(self._descriptor).st_size == self.layout.size:
                return int(note["steps"])
        self._note.unlink(missing_ok=True)
        os.ftruncate(self._descriptor, 0)
        free = shutil.disk_usage(self.path.parent).free
        if free < self.layout.size:
            size = format_bytes(self.layout.size)
            raise DiskFull(f"{self.path} takes {size}, but {format_bytes(free)} are free there: free some, or name a "
                           "place on another disk")  # fmt: skip
        os.ftruncate(self._descriptor, self.layout.size)
        self._put(self.layout.header, 0)
        return 0

    def write(self, name: str, row: int, data: Tensor) -> None:
        """Puts the bytes of rows at their place, from row `row` of the tensor on."""
        tensor = self.layout.tensors[name]
        start = row * tensor.row_bytes
        assert start + data.numel() <= tensor.nbytes
        self._put(data.numpy().data, tensor.start + start)

    def _put(self, data: bytes | memoryview, position: int) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            count = os.pwrite(self._descriptor, view, position)
            view, position = view[count:], position + count

    def finish(self, step: int) -> None:
        """Notes that a step is written."""
        with self._lock:
            self._done.add(step)
            before = self.steps
            while self.steps in self._done:
                self._done.remove(self.steps)
                self.steps += 1
            if self.steps // _NOTE_EVERY > before // _NOTE_EVERY:
                self._save_note()

    def _save_note(self) -> None:
        scratch = self._note.with_suffix(".new")
        scratch.write_text(json.dumps({"conversion": self._own, "steps": self.steps}), encoding="utf-8")
        scratch.replace(self._note)

    def close(self, *, complete: bool, keep: bool) -> None:
        """Gives a complete file its name; one that is neither complete nor kept is removed."""
        if complete:
            os.replace(self._file, self.path.resolve())
        if keep:
            self._save_note()
        else:
            self._file.unlink(missing_ok=True)
            self._note.unlink(missing_ok=True)
        os.close(self._descriptor)


@contextmanager
def gguf_draft(path: Path, layout: Layout, fingerprint: str) -> Iterator[Draft]:
    """A draft that becomes `path` when the block ends. An interrupted one is kept and continued by the next attempt
    with the same `fingerprint` and layout, any other failure removes it; `KeyeError` where it cannot be written."""
    try:
        draft = Draft(path, layout, fingerprint)
    except OSError as error:
        raise unwritable(path, error) from None
    complete = keep = False
    try:
        yield draft
        complete = True
    except OSError as error:
        raise unwritable(path, error) from None
    except KeyboardInterrupt:
        keep = True
        raise
    finally:
        draft.close(complete=complete, keep=keep)


def _draft_path(path: Path) -> Path:
    target = path.resolve()
    return target.with_name(f".{target.name}.part")
