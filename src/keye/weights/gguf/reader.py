"""The header of a GGUF file, read as untrusted bytes: every count, length and offset is compared with the file's size
before it is used, and memory stays in proportion to the header.

Versions 2 and 3, little endian, also in several files (`NAME-00001-of-00003.gguf`). Knows bytes, no model.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from keye.errors import KeyeError
from keye.units import format_bytes, one_line
from keye.weights.gguf.types import BY_NUMBER, TensorType

MAGIC: Final = b"GGUF"
#: Beginnings of tensor data are multiples of it where the file does not say otherwise.
ALIGNMENT: Final = 32
#: Limits far above those of any model: bytes of a header, of a key or name, texts in arrays, entries, files.
MAX_HEADER, MAX_NAME, MAX_TEXTS, MAX_KEYS, MAX_TENSORS, MAX_FILES = 1 << 28, 1 << 16, 1 << 22, 1 << 16, 1 << 20, 1000
MAX_DIMENSIONS: Final = 4

#: Numbers of value types: the struct formats of scalars, then text and array.
_SCALARS: Final = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_TEXT, _ARRAY, _BOOL = 8, 9, 7
#: Bytes that are read at once.
_CHUNK: Final = 1 << 20
_SPLIT: Final = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE | re.DOTALL)

Value = bool | int | float | str | list[str] | np.ndarray


class GGUFError(KeyeError):
    """A GGUF file cannot be read, or is not what it says. Names in the sentence come from the file: it is made one
    printable line."""

    def __init__(self, sentence: str) -> None:
        super().__init__(one_line(sentence))


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: `shape` as in torch (the reverse of ggml's), its `nbytes` begin at byte `start`."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


@dataclass(frozen=True)
class GGUF:
    """A GGUF file, or the files of a split model together. Arrays of numbers in `metadata` are numpy arrays, float32
    values are Python floats of the same value."""

    path: Path
    version: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...] = field(default=())

    def text(self, name: str) -> str | None:
        """A text in the metadata, None where there is none; `GGUFError` for another kind of value."""
        value = self.metadata.get(name)
        if value is not None and not isinstance(value, str):
            raise GGUFError(f"{self.path} has {name} that is not a text; convert the model again")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """The same for true and false."""
        value = self.metadata.get(name, default)
        if not isinstance(value, bool):
            raise GGUFError(f"{self.path} has {name} that is neither true nor false; convert the model again")
        return value

    def integer(self, name: str) -> int | None:
        """The same for a whole number."""
        value = self.metadata.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise GGUFError(f"{self.path} has {name} that is not a whole number; convert the model again")
        return value

    def token(self, name: str) -> int | None:
        """The same for the id of a token, `tokenizer.ggml.NAME_token_id`."""
        return self.integer(f"tokenizer.ggml.{name}_token_id")


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> GGUF:
    """The header of a GGUF file, and those of the other files where the model is split. No tensor is read.

    `GGUFError` with one sentence for whatever does not fit: a file cut short, counts, lengths or offsets beyond the
    file, overlapping tensors, unknown types, missing files of a split model.
    """
    first = _read_file(path)
    count = first.integer("split.count")
    if count in (None, 0, 1):  # 0: several files that llama.cpp joined
        return first
    if count is None or not 1 < count <= MAX_FILES:
        raise GGUFError(f"{path} has split.count {count}; it must be a whole number up to {MAX_FILES}")
    match = _SPLIT.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise GGUFError(
            f"{path} is one of {count} files; keep their names, NAME-00001-of-{count:05}.gguf, and give the first"
        )
    paths = [
        path.with_name(f"{match['stem']}-{number:05}-of-{count:05}{path.suffix}") for number in range(1, count + 1)
    ]
    if lacking := [other.name for other in paths if not other.is_file()]:
        raise GGUFError(f"{path} is one of {count} files, of which {lacking[0]} is missing; put all in one folder")
    return _join(path, [first if other == path else _read_file(other) for other in paths])


def _join(path: Path, parts: list[GGUF]) -> GGUF:
    tensors: dict[str, TensorInfo] = {}
    for number, part in enumerate(parts):
        if (part.integer("split.count"), part.integer("split.no")) != (len(parts), number):
            raise GGUFError(
                f"{part.path} is not file {number + 1} of {len(parts)} of this model; fetch the files again"
            )
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise GGUFError(f"{name} is both in {tensors[name].file} and in {part.path}; fetch the files again")
            tensors[name] = tensor
    total = parts[0].integer("split.tensors.count")
    if total not in (None, len(tensors)):
        raise GGUFError(f"{path} promises {total} tensors, its files hold {len(tensors)}; fetch the files again")
    first = parts[0]
    return GGUF(path, first.version, first.metadata, tensors, tuple(part.path for part in parts))


def _read_file(path: Path) -> GGUF:
    try:
        with path.open("rb") as file:
            return _Header(path, file).read()
    except OSError as error:
        raise GGUFError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None


class _Header:
    """Reads one header from front to back. `left` is what of the file has not been read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self.size = file.seek(0, 2)
        file.seek(0)
        self.position, self._buffer, self._at = 0, b"", 0
        self._texts = 0

    @property
    def left(self) -> int:
        return self.size - self.position

    def read(self) -> GGUF:
        if self._take(4, "its first bytes") != MAGIC:
            raise GGUFError(f"{self.path} is not a GGUF file; give a file that begins with GGUF")
        version = self._number("I", "its version")
        if version.to_bytes(4, "big")[:2] != b"\0\0":
            raise GGUFError(f"{self.path} is big-endian; use a little-endian GGUF file")
        if version not in (2, 3):
            raise GGUFError(f"{self.path} is GGUF version {version}; keye reads versions 2 and 3: convert it again")
        tensor_count = self._count("tensors", 32, MAX_TENSORS)
        key_count = self._count("metadata entries", 13, MAX_KEYS)
        metadata: dict[str, Value] = {}
        for _ in range(key_count):
            key = self._name("a metadata key")
            if key in metadata:
                raise GGUFError(f"{self.path} has two values of {_brief(key)}; convert the model again")
            metadata[key] = self._value(self._number("I", f"the type of {_brief(key)}"), key)
        entries = [self._tensor() for _ in range(tensor_count)]
        start = _align(self.position, self._alignment(metadata))
        tensors = self._place(entries, start, self._alignment(metadata))
        return GGUF(self.path, version, metadata, tensors, (self.path,))

    # Values

    def _take(self, count: int, what: str) -> bytes:
        """The next bytes of the header; `GGUFError` before anything is read where the file has fewer."""
        if count > self.left:
            raise self._short(what)
        if self.position + count > MAX_HEADER:
            raise GGUFError(
                f"the header of {self.path} is larger than {format_bytes(MAX_HEADER)}; no model of Keye needs that"
            )
        end = self._at + count
        if end > len(self._buffer):
            rest = self._buffer[self._at :]
            self._buffer, self._at, end = (
                rest + self._file.read(min(max(_CHUNK, count - len(rest)), self.left - len(rest))),
                0,
                count,
            )
            if len(self._buffer) < count:  # it became shorter meanwhile
                raise self._short(what)
        self.position += count
        self._at, begin = end, self._at
        return self._buffer[begin:end]

    def _short(self, what: str) -> GGUFError:
        return GGUFError(f"{self.path} ends inside {what}; it was cut short or its header lies: fetch it again")

    def _number(self, kind: str, what: str) -> int:
        number = struct.unpack("<" + kind, self._take(struct.calcsize("<" + kind), what))[0]
        return number

    def _count(self, what: str, least: int, most: int) -> int:
        """How many things follow, each of at least `least` bytes."""
        count = self._number("Q", f"the number of {what}")
        if count > most or count * least > self.left:
            raise GGUFError(f"{self.path} promises {count} {what}, more than the file can hold; fetch it again")
        return count

    def _name(self, what: str) -> str:
        length = self._number("Q", what)
        if length > MAX_NAME:
            raise GGUFError(f"{self.path} has {what} of {length} bytes, at most {MAX_NAME} are allowed; fetch it again")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise GGUFError(f"{self.path} has {what} that is not valid UTF-8; fetch it again") from None

    def _text(self, what: str) -> str:
        return self._take(self._number("Q", what), what).decode("utf-8", "replace")

    def _value(self, kind: int, key: str) -> Value:
        what = _brief(key)
        if kind == _TEXT:
            return self._text(what)
        if kind == _ARRAY:
            return self._array(what)
        if kind not in _SCALARS:
            raise GGUFError(f"{self.path} has {what} of the unknown type {kind}; fetch it again")
        if kind == _BOOL:
            byte = self._take(1, what)
            if byte not in (b"\0", b"\1"):
                raise GGUFError(f"{self.path} has {what} that is neither true nor false; fetch it again")
            return byte == b"\1"
        return self._number(_SCALARS[kind], what)

    def _array(self, what: str) -> Value:
        kind, count = self._number("I", what), self._number("Q", what)
        if kind == _ARRAY:
            raise GGUFError(f"{self.path} has {what}, an array of arrays, which keye does not read")
        if kind == _TEXT:
            self._texts += count
            if count * 8 > self.left or self._texts > MAX_TEXTS:
                raise GGUFError(f"{self.path} promises {count} texts in {what}, more than it can hold; fetch it again")
            return [self._text(what) for _ in range(count)]
        if kind not in _SCALARS:
            raise GGUFError(f"{self.path} has {what} of the unknown type {kind}; fetch it again")
        item = np.dtype("<" + _SCALARS[kind])
        return np.frombuffer(self._take(count * item.itemsize, what), np.uint8 if kind == _BOOL else item)

    # Tensors

    def _tensor(self) -> tuple[str, TensorType, tuple[int, ...], int]:
        """Name, type, shape and offset from the beginning of the data."""
        name = self._name("a tensor's name")
        what = f"tensor {_brief(name)}"
        dimensions = self._number("I", what)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise GGUFError(f"{self.path} gives {what} {dimensions} dimensions; it must be 1 to {MAX_DIMENSIONS}")
        shape = tuple(self._number("Q", what) for _ in range(dimensions))
        number, offset = self._number("I", what), self._number("Q", what)
        if number not in BY_NUMBER:
            raise GGUFError(f"{self.path} stores {what} as type {number}, which keye does not know; use another file")
        kind = BY_NUMBER[number]
        if min(shape) < 1 or math.prod(shape) > self.size * kind.block:
            raise GGUFError(
                f"{self.path} gives {what} the shape {list(shape)}, which the file cannot hold; fetch it again"
            )
        if shape[0] % kind.block:
            raise GGUFError(f"{self.path} gives {what} rows of {shape[0]} numbers, which {kind.name} does not divide "
                            f"into blocks of {kind.block}; convert it again")  # fmt: skip
        return name, kind, shape[::-1], offset

    def _alignment(self, metadata: Mapping[str, Value]) -> int:
        value = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value & (value - 1) or value > _CHUNK:
            raise GGUFError(f"{self.path} has general.alignment {str(value)[:40]}; it must be a power of two")
        return value

    def _place(
        self, entries: Iterable[tuple[str, TensorType, tuple[int, ...], int]], start: int, alignment: int
    ) -> dict[str, TensorInfo]:
        """The tensors in the file's order, none beyond its end and none over another."""
        tensors: dict[str, TensorInfo] = {}
        for name, kind, shape, offset in entries:
            nbytes = kind.count_bytes(math.prod(shape))
            label = _brief(name)
            if name in tensors:
                raise GGUFError(f"{self.path} has two tensors {label}; convert the model again")
            if offset % alignment:
                raise GGUFError(f"{self.path} puts {label} at {offset}, not a multiple of {alignment}; fetch it again")
            if start + offset + nbytes > self.size:
                raise GGUFError(f"{self.path} ends before the numbers of {label} do; it was cut short: fetch it again")
            tensors[name] = TensorInfo(name, kind, shape, self.path, start + offset, nbytes)
        end, last = start, ""
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
            if tensor.start < end:
                raise GGUFError(f"{self.path} puts {_brief(tensor.name)} over {_brief(last)}; fetch it again")
            end, last = tensor.start + tensor.nbytes, tensor.name
        return tensors


def _align(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _brief(name: str) -> str:
    """The beginning of a name that may be very long."""
    return name if len(name) <= 80 else f"{name[:80]}..."
