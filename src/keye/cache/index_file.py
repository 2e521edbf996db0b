"""The file that `keye index` writes: the cached rows of a prompt's first tokens, and the tokens that they are of.

    prelude     magic, version, place and SHA-256 of the header
    rows        uint8 [layers, blocks, 64, row_bytes] for each name, scanned rows first: slabs as a `KVStore` has them,
                to be mapped as they are
    tokens      int64 [4, T]: token ids, then their positions on the three axes
    checksums   uint32 [names, layers, blocks]: CRC-32 of every KV block, names in the order of the header
    header      JSON; `storage.rows` has name, number format and place of each kind of rows

Files of version 1 have the rows `keys`, `values` and, in sparse models, `index` of keye 0.1, directly in `storage`. A
file of version 3 is a series of such images (`keye.cache.segments`), whose places count from the image's own prelude.

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
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keye.cache.checksums import FRESH, BlockCheck, Identity, damage_error, identity_of
from keye.cache.mapped import DISK_RESERVE, check_disk
from keye.cache.sequence import KVCache
from keye.cache.slabs import KVLayout, SlabRows
from keye.errors import KeyeError
from keye.files import check_output, output_file
from keye.media.source.fetch import INDEX_MAGIC
from keye.ops.kv_blocks import KV_BLOCK, RowFormat
from keye.ops.mapped import advise, map_tensor

VERSION: Final = 2
#: The version of files of several images.
SEGMENTS_VERSION: Final = 3
#: Names of rows in files of version 1, in their order, and which of them were scanned.
_VERSION_1: Final = {"index": ("indexer_k", True), "keys": ("k", False), "values": ("v", False)}
#: Names that rows of a file can have.
_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
_MOST_NAMES: Final = 8
#: Sections begin at multiples of this: pages of memory are no larger on any system.
ALIGN: Final = 1 << 16
MAX_HEADER_BYTES: Final = 16 << 20
#: KV blocks of each name that are compared with their checksums when a file is opened.
SAMPLED_BLOCKS: Final = 16
#: Magic, version, place and length of the header, SHA-256 of the header.
_PRELUDE: Final = struct.Struct("<16sIQQ32s")
PRELUDE_BYTES: Final = _PRELUDE.size
#: More of anything than this is damage.
_MOST: Final = 1 << 24
_MOST_DIGITS: Final = 300
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Section:
    """Bytes of a file."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class IndexFile:
    """A file, or an image in one, whose header has been read and checked. `about` is what its writer said of it; `size`
    in bytes; `crcs` uint32 [names of rows, layers, blocks]; `tokens` int64 [4, T]."""

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

    def rows(self, mapped: mmap.mmap) -> SlabRows:
        """The rows in a map of the file. Scanned ones will be read soon, the others one by one."""
        rows = {}
        for name, form in self.layout.rows.items():
            section = self.sections[name]
            advice = "MADV_WILLNEED" if name in self.layout.scanned else "MADV_RANDOM"
            advise(mapped, advice, section.offset, section.nbytes)
            rows[name] = map_tensor(mapped, section.offset, (self.layout.layers, self.blocks, KV_BLOCK, form.row_bytes))
        return rows

    def checker(self, mapped: mmap.mmap, identity: Identity) -> BlockCheck:
        """What compares KV blocks of a map of the file with their checksums."""
        sections = [(name, self.sections[name].offset, form.block_bytes) for name, form in self.layout.rows.items()]
        return BlockCheck(self.path, mapped, sections, self.crcs, identity)


# Writing


def check_index_disk(path: Path, layout: KVLayout, tokens: int) -> None:
    """`OutOfMemory` where an index of so many tokens does not fit on the disk, on which as much again is left free, but
    at most the usual reserve."""
    nbytes = -(-tokens // KV_BLOCK) * layout.block_bytes + 32 * tokens  # up to its header and gaps
    check_disk(path.absolute().parent, nbytes, min(DISK_RESERVE, nbytes))


def check_index_output(path: Path, *, overwrite: bool = False) -> None:
    """`KeyeError` where an index cannot be written to a file, or would replace one that is not an index."""

    def has_magic(path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(len(INDEX_MAGIC)) == INDEX_MAGIC

    check_output(path, has_magic, overwrite=overwrite)


def write_index_file(path: Path, cache: KVCache, tokens: Tensor, about: Mapping[str, Any]) -> None:
    """Writes what a sequence has stored, block by block. `tokens` int64 [4, T] are its ids and positions, `about` plain
    data for the header. The file appears when it is complete. `KeyeError` where it cannot be written."""
    assert cache.store is not None and tokens.shape == (4, cache.length(0))
    layout = cache.store.layout
    check_index_disk(path, layout, cache.length(0))
    with output_file(path) as draft, draft.open("wb") as file:
        _write(file, cache, layout, tokens, about)
        file.flush()
        os.fsync(file.fileno())


def _write(file: BinaryIO, cache: KVCache, layout: KVLayout, tokens: Tensor, about: Mapping[str, Any]) -> None:
    file.write(bytes(PRELUDE_BYTES))
    storage = write_rows(file, [cache], layout, tokens)
    place, header = file.tell(), encode_header({**about, "storage": storage})
    file.write(header)
    file.seek(0)
    file.write(encode_prelude(VERSION, place, header))


def write_rows(
    file: BinaryIO, caches: Sequence[KVCache], layout: KVLayout, tokens: Tensor, start: int = 0
) -> dict[str, Any]:
    """Writes the rows of sequences, each from a block of its own on, their `tokens` and the checksums, and returns the
    `storage` of the header, whose places count from byte `start` of the file."""
    storage: dict[str, Any] = {"layers": layout.layers, "length": tokens.shape[1], "rows": {}}
    crcs: list[int] = []
    for name, form in sorted(layout.rows.items(), key=lambda item: item[0] not in layout.scanned):
        _pad(file)
        begin = file.tell()
        for layer in range(layout.layers):
            for rows in (rows for cache in caches for rows in _iter_blocks(cache, name, layer)):
                crcs.append(zlib.crc32(rows))
                file.write(rows)
        storage["rows"][name] = {
            "kind": form.kind, "heads": form.heads, "dim": form.dim, "scanned": name in layout.scanned,
            "offset": begin - start, "bytes": file.tell() - begin,
        }  # fmt: skip
    for name, data in (("tokens", tokens.contiguous().numpy()), ("checksums", np.array(crcs, dtype="<u4"))):
        _pad(file)
        storage[name] = {
            "offset": file.tell() - start, "bytes": data.nbytes, "sha256": hashlib.sha256(data.tobytes()).hexdigest(),
        }  # fmt: skip
        file.write(data.tobytes())
    return storage


def _iter_blocks(cache: KVCache, name: str, layer: int) -> Iterator[memoryview]:
    """The stored bytes of the blocks of a sequence; zeros where rows were never written."""
    length = cache.length(layer)
    for place, block in enumerate(cache.block_table[: -(-length // KV_BLOCK)]):
        rows = block.slab.rows[name][layer, block.slot].cpu()
        if (rest := length - place * KV_BLOCK) < KV_BLOCK:
            rows = torch.cat((rows[:rest], torch.zeros_like(rows[rest:])))
        yield rows.numpy().data


def encode_header(header: Mapping[str, Any]) -> bytes:
    """The bytes of a header; `KeyeError` where there are too many. Names of files may hold bytes that are no text."""
    text = json.dumps(header, ensure_ascii=False).encode("utf-8", "replace")
    if len(text) > MAX_HEADER_BYTES:
        raise KeyeError("the plan of the video is too long for an index: sample fewer frames")
    return text


def encode_prelude(version: int, place: int, header: bytes) -> bytes:
    """The first bytes of an image whose header is at `place`."""
    return _PRELUDE.pack(INDEX_MAGIC, version, place, len(header), hashlib.sha256(header).digest())


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGN))


# Reading


def read_index_file(path: Path) -> IndexFile:
    """Reads the header, and checks it, the tokens and the table of checksums. `KeyeError` with one sentence for
    anything that is not a sound index."""
    if path.exists() and not path.is_file():
        raise KeyeError(f"{path} is not a file: name an index of a video")
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except OSError as error:
        raise KeyeError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from None


def _read(path: Path, file: BinaryIO) -> IndexFile:
    size = os.fstat(file.fileno()).st_size
    version, place, length, digest = read_prelude(path, file.read(_PRELUDE.size))
    if version == SEGMENTS_VERSION:
        raise KeyeError(f"{path} is an index for searching, whose parts are read one by one: use keye find")
    if place + length != size:
        raise damage_error(path, f"it has {size:,} bytes instead of {place + length:,}")
    file.seek(place)
    header = decode_header(path, file.read(length), digest)
    return read_image(path, file, header, place, size, version=version)


def read_prelude(path: Path, start: bytes) -> tuple[int, int, int, bytes]:
    """Version, and place, length and SHA-256 of the header, from the first bytes of an image."""
    if start[: len(INDEX_MAGIC)] != INDEX_MAGIC:
        raise KeyeError(f"{path} is not an index of a video: make one with keye index VIDEO -o FILE")
    if len(start) < _PRELUDE.size:
        raise damage_error(path, "it is cut short")
    _, version, place, length, digest = _PRELUDE.unpack(start)
    if not 1 <= version <= SEGMENTS_VERSION:
        raise KeyeError(f"{path} has version {version} of the index format, but this keye reads versions up to "
                        f"{SEGMENTS_VERSION}: index the video again with keye index")  # fmt: skip
    if length > MAX_HEADER_BYTES or place < _PRELUDE.size:
        raise damage_error(path, "its header is not where one can be")
    return version, place, length, digest


def decode_header(path: Path, text: bytes, digest: bytes) -> Any:
    """The JSON of a header whose SHA-256 is known."""
    if hashlib.sha256(text).digest() != digest:
        raise damage_error(path, "its header differs from its checksum")
    try:
        return json.loads(text, parse_int=_integer, parse_float=_real, parse_constant=_real)
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise damage_error(path, "its header is not JSON") from None


def _real(text: str) -> float:
    """A number as keye writes them. JSON would also give ones that no float holds; they would fail far from here."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError("a number with too many digits")
    return int(text)


def read_image(
    path: Path, file: BinaryIO, header: Any, end: int, size: int, *, version: int = VERSION, start: int = 0
) -> IndexFile:
    """The image of `size` bytes from byte `start` of a file on, described by a header; all its places are before
    `end`, counted from `start`."""
    if not isinstance(header, dict) or not isinstance(storage := header.pop("storage", None), dict):
        raise damage_error(path, "its header says nothing of what is stored")
    layers, length = _natural(path, storage, "layers"), _natural(path, storage, "length")
    rows = _rows_of_version_1(storage) if version == 1 else storage.get("rows")
    if not isinstance(rows, dict) or not 0 < len(rows) <= _MOST_NAMES or not all(map(_NAME.fullmatch, rows)):
        raise damage_error(path, "its header names no rows")
    formats = {name: _format(path, entry) for name, entry in rows.items()}
    layout = KVLayout(layers, formats, tuple(name for name, entry in rows.items() if entry.get("scanned") is True))
    blocks = -(-length // KV_BLOCK)
    sizes = {name: layers * blocks * form.block_bytes for name, form in formats.items()}
    sections = {name: _section(path, rows, name, nbytes, end) for name, nbytes in sizes.items()}
    small = {"tokens": 32 * length, "checksums": 4 * len(sizes) * layers * blocks}
    sections |= {name: _section(path, storage, name, nbytes, end) for name, nbytes in small.items()}
    tokens = np.frombuffer(_read_section(path, file, storage, "tokens", sections, start), dtype="<i8")
    crcs = np.frombuffer(_read_section(path, file, storage, "checksums", sections, start), dtype="<u4")
    return IndexFile(
        path, header, layout, length, size, sections, torch.from_numpy(tokens.reshape(4, length).astype(np.int64)),
        crcs.reshape(-1, layers, blocks),
    )  # fmt: skip


def _rows_of_version_1(storage: Mapping[str, Any]) -> dict[str, Any] | None:
    """What version 2 has in `storage.rows`; None where keys or values are missing or no entries."""
    entries = {name: storage[name] for name in _VERSION_1 if storage.get(name) is not None}
    if not {"keys", "values"} <= set(entries) or not all(isinstance(entry, dict) for entry in entries.values()):
        return None
    return {_VERSION_1[name][0]: {**entry, "scanned": _VERSION_1[name][1]} for name, entry in entries.items()}


def _read_section(
    path: Path, file: BinaryIO, storage: Mapping[str, Any], name: str, sections: Mapping[str, Section], start: int
) -> bytes:
    """A small section in full, compared with its SHA-256."""
    file.seek(start + sections[name].offset)
    data = file.read(sections[name].nbytes)
    if hashlib.sha256(data).hexdigest() != storage[name].get("sha256"):
        raise damage_error(path, f"its {name} differ from their checksum")
    return data


def _section(path: Path, entries: Mapping[str, Any], name: str, nbytes: int, end: int) -> Section:
    """A section that must have exactly `nbytes`."""
    entry = entries.get(name)
    if not isinstance(entry, dict) or entry.get("bytes") != nbytes:
        raise damage_error(path, f"its {name} have another size than its tokens need")
    offset = entry.get("offset")
    if type(offset) is not int or not _PRELUDE.size <= offset <= end - nbytes or offset % ALIGN:
        raise damage_error(path, f"its {name} are outside the file")
    return Section(offset, nbytes)


def _format(path: Path, entry: Any) -> RowFormat:
    if not isinstance(entry, dict):
        raise damage_error(path, "its header names no number format")
    heads, dim, kind = _natural(path, entry, "heads"), _natural(path, entry, "dim"), entry.get("kind")
    try:
        return RowFormat(kind, heads, dim)  # type: ignore[arg-type]  # it checks its kind
    except (KeyeError, TypeError) as error:
        raise damage_error(path, str(error)) from None


def _natural(path: Path, entry: Mapping[str, Any], name: str) -> int:
    value = entry.get(name)
    if type(value) is not int or not 0 < value <= _MOST:
        raise damage_error(path, f"{name} in its header is {str(value)[:40]}")
    return value


def open_mapped(path: Path) -> tuple[IndexFile, mmap.mmap, BlockCheck]:
    """Reads the header, maps the file, and compares some KV blocks with their checksums: the last ones, which are
    copied for each continuation, and some of each name. `KeyeError` for the first that differs."""
    file = read_index_file(path)
    try:
        with path.open("rb") as opened:
            identity = identity_of(opened.fileno())
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        raise KeyeError(f"{path} cannot be mapped into memory: copy it to a local disk") from None
    if len(mapped) != file.size:
        raise damage_error(path, "it changed while it was opened")
    check = file.checker(mapped, identity)
    total = file.layout.layers * file.blocks
    some = {total * i // SAMPLED_BLOCKS for i in range(SAMPLED_BLOCKS)}
    some |= {(layer + 1) * file.blocks - 1 for layer in range(file.layout.layers)}
    for name in file.layout.rows:
        for number in sorted(some):
            check.compare(name, number // file.blocks, np.array([number % file.blocks]))
    if check.damage is not None:
        raise check.damage
    return file, mapped, check


def check_full(path: Path, progress: Progress | None = None) -> IndexFile:
    """Compares every KV block with its checksum."""
    file, mapped, _ = open_mapped(path)
    names, layers = list(file.layout.rows), file.layout.layers
    check = file.checker(mapped, FRESH)
    for number, name in enumerate(names):
        for layer in range(layers):
            check.compare(name, layer)
            if check.damage is not None:
                raise check.damage
            if progress is not None:
                progress((number * layers + layer) * file.blocks, len(names) * layers * file.blocks)
    return file
