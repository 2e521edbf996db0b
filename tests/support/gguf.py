"""GGUF files for tests: a small writer of whatever a test wants, right or wrong, and models in such files."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ALIGNMENT = 32
U32, I32, F32, BOOL, TEXT, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    """A metadata value with its type before it."""
    if isinstance(item, bool):
        return struct.pack("<I?", BOOL, item)
    if isinstance(item, int):
        return struct.pack("<II", U32, item)
    if isinstance(item, float):
        return struct.pack("<If", F32, item)
    if isinstance(item, str):
        return struct.pack("<I", TEXT) + text(item)
    if isinstance(item, np.ndarray):
        kind = {"i": I32, "u": U32, "f": F32}[item.dtype.kind]
        data = item.astype({I32: "<i4", U32: "<u4", F32: "<f4"}[kind]).tobytes()
        return struct.pack("<IIQ", ARRAY, kind, len(item)) + data
    return struct.pack("<IIQ", ARRAY, TEXT, len(item)) + b"".join(map(text, item))


@dataclass
class Entry:
    """A tensor of a file: `shape` as in torch, `kind` ggml's number of its type. `offset` None: behind the last."""

    name: str
    shape: Sequence[int]
    data: bytes
    kind: int = 0
    offset: int | None = None


@dataclass
class Draft:
    """A file to be written; counts and magic may lie."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    entries: Sequence[Entry] = ()
    version: int = 3
    magic: bytes = b"GGUF"
    tensor_count: int | None = None
    key_count: int | None = None

    def encode(self) -> bytes:
        counts = (self.tensor_count, len(self.entries)), (self.key_count, len(self.metadata))
        numbers = [actual if claimed is None else claimed for claimed, actual in counts]
        head = self.magic + struct.pack("<IQQ", self.version, *numbers)
        for name, item in self.metadata.items():
            head += text(name) + (item if isinstance(item, bytes) else value(item))
        data = b""
        for entry in self.entries:
            offset = len(data) if entry.offset is None else entry.offset
            dims = [*entry.shape][::-1]
            head += text(entry.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, entry.kind, offset)
            data += entry.data + bytes(-len(entry.data) % ALIGNMENT)
        return head + bytes(-len(head) % ALIGNMENT) + data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.encode())
        return path


def plain(name: str, array: Any) -> Entry:
    """A float32 tensor."""
    array = np.asarray(array, "<f4")
    return Entry(name, array.shape, array.tobytes())
