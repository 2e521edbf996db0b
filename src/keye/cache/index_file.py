"""The file that `keye index` writes: keys, values and indexer keys of a prompt's first tokens, and what they are of.

    prelude     magic, version, place and SHA-256 of the header
    index, keys, values
                uint8 [layers, blocks, 64, row_bytes] each: slabs as a `KVStore` has them, to be mapped as they are
    tokens      int64 [4, T]: token ids, then their positions on the three axes
    checksums   uint32 [sections, layers, blocks]: CRC-32 of every page of index, keys and values, in this order
    header      JSON

The header comes last, so that the file is written front to back; sections begin at multiples of 64 KiB. A file is data:
nothing in it is executed, sizes are limited, and every place is checked against the file before it is read. Checksums
find damage; they do not prove who wrote a file. Knows bytes and formats, not models.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keye.cache.checksums import FRESH, Identity, PageCheck, damaged, identity_of
from keye.cache.mapped import DISK_RESERVE, check_disk, map_file, map_tensor, read_rows, read_soon
from keye.cache.sequence import KINDS, KVCache
from keye.cache.slabs import Kinds, KVLayout
from keye.errors import KeyeError
from keye.files import check_output, output_file
from keye.media.source.fetch import INDEX_MAGIC
from keye.ops.kv_blocks import KV_BLOCK, RowFormat

VERSION: Final = 1
#: Sections begin at multiples of this: pages of memory are no larger on any system.
ALIGN: Final = 1 << 16
MAX_HEADER_BYTES: Final = 16 << 20
#: Pages of each section that are compared with their checksums when a file is opened.
SAMPLED_PAGES: Final = 16
#: Magic, version, place and length of the header, SHA-256 of the header.
_PRELUDE: Final = struct.Struct("<16sIQQ32s")
#: More of anything than this is damage.
_MOST: Final = 1 << 24
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Section:
    """Bytes of a file."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class IndexFile:
    """A file whose header has been read and found sound. `about` is what its writer said of it; `size` in bytes;
    `crcs` uint32 [sections, layers, blocks]; `tokens` int64 [4, T]."""

    path: Path
    about: Mapping[str, Any]
    layout: KVLayout
    length: int
    size: int
    sections: Mapping[str, Section]
    tokens: Tensor
    crcs: NDArray[np.uint32]

    @property
    def blocks(self) -> int:
        return -(-self.length // KV_BLOCK)

    def kinds(self, mapped: mmap.mmap) -> Kinds:
        """Keys, values and indexer keys in a map of the file. Rows of keys and values will be read one by one, all
        indexer keys soon."""
        for name in ("keys", "values"):
            read_rows(mapped, self.sections[name].offset, self.sections[name].nbytes)
        index = None
        if self.layout.index is not None:
            read_soon(mapped, self.sections["index"].offset, self.sections["index"].nbytes)
            index = self._kind(mapped, "index", self.layout.index)
        return self._kind(mapped, "keys", self.layout.keys), self._kind(mapped, "values", self.layout.values), index

    def checker(self, mapped: mmap.mmap, identity: Identity) -> PageCheck:
        """What compares pages of a map of the file with their checksums."""
        sections = [(name, self.sections[name].offset, rows.block_bytes) for name, rows in _kinds_of(self.layout)]
        return PageCheck(self.path, mapped, sections, self.crcs, identity)

    def _kind(self, mapped: mmap.mmap, name: str, rows: RowFormat) -> Tensor:
        shape = (self.layout.layers, self.blocks, KV_BLOCK, rows.row_bytes)
        return map_tensor(mapped, self.sections[name].offset, shape)


def _kinds_of(layout: KVLayout) -> list[tuple[str, RowFormat]]:
    """The slabs of a file in their order."""
    index = [] if layout.index is None else [("index", layout.index)]
    return [*index, ("keys", layout.keys), ("values", layout.values)]


# Writing


def index_bytes(layout: KVLayout, tokens: int) -> int:
    """Bytes that an index of so many tokens takes, up to its header and gaps."""
    return -(-tokens // KV_BLOCK) * layout.block_bytes + 32 * tokens


def check_index_disk(path: Path, layout: KVLayout, tokens: int) -> None:
    """`OutOfMemory` where an index of so many tokens does not fit on the disk, on which as much again is left free, but
    at most the usual reserve."""
    nbytes = index_bytes(layout, tokens)
    check_disk(path.absolute().parent, nbytes, min(DISK_RESERVE, nbytes))


def check_index_output(path: Path, *, overwrite: bool = False) -> None:
    """`KeyeError` where an index cannot be written to a file, or would replace one that is no index."""
    check_output(path, _has_magic, overwrite=overwrite)


def _has_magic(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(INDEX_MAGIC)) == INDEX_MAGIC


def write_index_file(path: Path, cache: KVCache, tokens: Tensor, about: Mapping[str, Any]) -> None:
    """Writes what a sequence has stored, page by page. `tokens` int64 [4, T] are its ids and positions, `about` plain
    data for the header. The file appears when it is complete. `KeyeError` where it cannot be written."""
    assert cache.store is not None and tokens.shape == (4, cache.length(0))
    layout = cache.store.layout
    check_index_disk(path, layout, cache.length(0))
    with output_file(path) as draft, draft.open("wb") as file:
        _write(file, cache, layout, tokens, about)
        file.flush()
        os.fsync(file.fileno())


def _write(file: BinaryIO, cache: KVCache, layout: KVLayout, tokens: Tensor, about: Mapping[str, Any]) -> None:
    storage: dict[str, Any] = {"layers": layout.layers, "length": cache.length(0)}
    crcs: list[int] = []
    file.write(bytes(_PRELUDE.size))
    for name, rows in _kinds_of(layout):
        _pad(file)
        start = file.tell()
        for layer in range(layout.layers):
            for page in cache.stored_pages(KINDS.index(name), layer):
                stored = page.numpy().data
                crcs.append(zlib.crc32(stored))
                file.write(stored)
        storage[name] = {
            "kind": rows.kind, "heads": rows.heads, "dim": rows.dim, "offset": start, "bytes": file.tell() - start,
        }  # fmt: skip
    for name, data in (("tokens", tokens.contiguous().numpy()), ("checksums", np.array(crcs, dtype="<u4"))):
        _pad(file)
        storage[name] = {
            "offset": file.tell(), "bytes": data.nbytes, "sha256": hashlib.sha256(data.tobytes()).hexdigest(),
        }  # fmt: skip
        file.write(data.tobytes())
    # Names of files may hold bytes that are no text.
    header = json.dumps({**about, "storage": storage}, ensure_ascii=False).encode("utf-8", "replace")
    if len(header) > MAX_HEADER_BYTES:
        raise KeyeError("the plan of the video is too long for an index: sample fewer frames")
    place = file.tell()
    file.write(header)
    file.seek(0)
    file.write(_PRELUDE.pack(INDEX_MAGIC, VERSION, place, len(header), hashlib.sha256(header).digest()))


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGN))


# Reading


def read_index_file(path: Path) -> IndexFile:
    """Reads the header, and checks it, the tokens and the table of checksums. `KeyeError` with one sentence for
    anything that is no sound index of this version."""
    if path.exists() and not path.is_file():
        raise KeyeError(f"{path} is no file: name an index of a video")
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except OSError as error:
        raise KeyeError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from None


def _read(path: Path, file: BinaryIO) -> IndexFile:
    size = os.fstat(file.fileno()).st_size
    start = file.read(_PRELUDE.size)
    if start[: len(INDEX_MAGIC)] != INDEX_MAGIC:
        raise KeyeError(f"{path} is no index of a video: make one with keye index VIDEO -o FILE")
    if len(start) < _PRELUDE.size:
        raise damaged(path, "it is cut short")
    _, version, place, length, digest = _PRELUDE.unpack(start)
    if version != VERSION:
        raise KeyeError(f"{path} has version {version} of the index format, but this keye reads version {VERSION}: "
                        "index the video again")  # fmt: skip
    if length > MAX_HEADER_BYTES or place < _PRELUDE.size:
        raise damaged(path, "its header is not where one can be")
    if place + length != size:
        raise damaged(path, f"it has {size:,} bytes instead of {place + length:,}")
    file.seek(place)
    text = file.read(length)
    if hashlib.sha256(text).digest() != digest:
        raise damaged(path, "its header differs from its checksum")
    try:
        header = json.loads(text, parse_int=_number, parse_float=_number, parse_constant=_number)
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise damaged(path, "its header is not JSON") from None
    return _checked(path, file, header, place)


def _number(text: str) -> int | float:
    """A number as keye writes them. JSON would also give ones that no float holds; they would fail far from here."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number if any(mark in text for mark in ".eE") else int(text)


def _checked(path: Path, file: BinaryIO, header: Any, end: int) -> IndexFile:
    """The file described by a header; all its places lie before `end`."""
    if not isinstance(header, dict) or not isinstance(storage := header.pop("storage", None), dict):
        raise damaged(path, "its header says nothing of what is stored")
    layers, length = _whole(path, storage, "layers"), _whole(path, storage, "length")
    formats = {name: _format(path, storage[name]) for name in KINDS if storage.get(name) is not None}
    if not {"keys", "values"} <= set(formats):
        raise damaged(path, "its header names no keys and values")
    layout = KVLayout(layers, formats["keys"], formats["values"], formats.get("index"))
    blocks = -(-length // KV_BLOCK)
    sizes = {name: layers * blocks * rows.block_bytes for name, rows in _kinds_of(layout)}
    sizes |= {"tokens": 32 * length, "checksums": 4 * len(sizes) * layers * blocks}
    sections = {name: _section(path, storage, name, nbytes, end) for name, nbytes in sizes.items()}
    tokens = np.frombuffer(_verified(path, file, storage, "tokens", sections), dtype="<i8").reshape(4, length)
    crcs = np.frombuffer(_verified(path, file, storage, "checksums", sections), dtype="<u4")
    size = os.fstat(file.fileno()).st_size
    return IndexFile(
        path, header, layout, length, size, sections, torch.from_numpy(tokens.astype(np.int64)),
        crcs.reshape(-1, layers, blocks),
    )  # fmt: skip


def _verified(
    path: Path, file: BinaryIO, storage: Mapping[str, Any], name: str, sections: Mapping[str, Section]
) -> bytes:
    """A small section as a whole, compared with its SHA-256."""
    file.seek(sections[name].offset)
    data = file.read(sections[name].nbytes)
    if hashlib.sha256(data).hexdigest() != storage[name].get("sha256"):
        raise damaged(path, f"its {name} differ from their checksum")
    return data


def _section(path: Path, storage: Mapping[str, Any], name: str, nbytes: int, end: int) -> Section:
    """A section that must have exactly `nbytes`."""
    given = storage.get(name)
    if not isinstance(given, dict) or given.get("bytes") != nbytes:
        raise damaged(path, f"its {name} have another size than its tokens need")
    offset = given.get("offset")
    if type(offset) is not int or not _PRELUDE.size <= offset <= end - nbytes or offset % ALIGN:
        raise damaged(path, f"its {name} lie outside the file")
    return Section(offset, nbytes)


def _format(path: Path, given: Any) -> RowFormat:
    if not isinstance(given, dict):
        raise damaged(path, "its header names no number format")
    heads, dim, kind = _whole(path, given, "heads"), _whole(path, given, "dim"), given.get("kind")
    try:
        return RowFormat(kind, heads, dim)  # type: ignore[arg-type]  # it checks its kind
    except (KeyeError, TypeError) as error:
        raise damaged(path, str(error)) from None


def _whole(path: Path, given: Mapping[str, Any], name: str) -> int:
    value = given.get(name)
    if type(value) is not int or not 0 < value <= _MOST:
        raise damaged(path, f"{name} in its header is {str(value)[:40]}")
    return value


def open_mapped(path: Path) -> tuple[IndexFile, mmap.mmap, PageCheck]:
    """Reads the header, maps the file, and compares some pages with their checksums: those of the last block, which is
    copied for whoever goes on from it, and some of each section. `KeyeError` for the first that differs."""
    file = read_index_file(path)
    try:
        with path.open("rb") as opened:
            identity = identity_of(opened.fileno())
            mapped = map_file(opened)
    except (OSError, ValueError):
        raise KeyeError(f"{path} cannot be mapped into memory: copy it to a local disk") from None
    if len(mapped) != file.size:
        raise damaged(path, "it changed while it was opened")
    check = file.checker(mapped, identity)
    total = file.layout.layers * file.blocks
    some = {total * i // SAMPLED_PAGES for i in range(SAMPLED_PAGES)}
    some |= {(layer + 1) * file.blocks - 1 for layer in range(file.layout.layers)}
    for name in KINDS:
        for page in sorted(some):
            check.compare(name, page // file.blocks, np.array([page % file.blocks]))
    if check.damage is not None:
        raise check.damage
    return file, mapped, check


def check_whole(path: Path, progress: Progress | None = None) -> IndexFile:
    """Compares every page with its checksum."""
    file, mapped, _ = open_mapped(path)
    names, layers = [name for name, _ in _kinds_of(file.layout)], file.layout.layers
    check = file.checker(mapped, FRESH)
    for number, name in enumerate(names):
        for layer in range(layers):
            check.compare(name, layer)
            if check.damage is not None:
                raise check.damage
            if progress is not None:
                progress((number * layers + layer) * file.blocks, len(names) * layers * file.blocks)
    return file
