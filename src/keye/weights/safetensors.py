"""Safetensors files: their tensors, reading them straight into their place, writing them in shards.

Knows names, shapes and bytes; knows nothing of networks. Only safetensors are opened, so nothing in a checkpoint can
run. `safetensors` itself checks every header; the bytes are read with plain reads in file order, since a memory map
that is faulted in page by page is slower than the disk and counts as memory of this process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from keye.config import read_json
from keye.ops.quantized import QuantFormat, QuantTensor
from keye.weights.names import ROUTER_BIAS
from keye.weights.source import WeightsError

INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"
#: Largest file that saving writes, as in the official releases.
SHARD_BYTES = 5_000_000_000
#: Bytes that are read at once.
PIECE_BYTES = 16 * 2**20
_CODES = re.compile(r"\.(codes|scales|minima)$")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
#: Numbers that a weight may be stored as, by their names in safetensors.
_NUMBERS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: The same and codes of quantised weights, which are numbers together with their scales only.
_DTYPES = {
    **_NUMBERS, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "I32": torch.int32,
    "U32": torch.uint32, "I64": torch.int64,
}  # fmt: skip
#: Those whose numbers are checked as they are read; it costs a tenth of reading them.
_CHECKED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file that has not been read yet: its `nbytes` begin at byte `start`. `dtype` is safetensors'."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int
    format: QuantFormat | None = None

    @property
    def is_readable(self) -> bool:
        return self.dtype in _NUMBERS

    @property
    def place(self) -> tuple[str, int]:
        return str(self.file), self.start

    def part(self, begin: int, end: int) -> StoredTensor:
        row = self.nbytes // self.shape[0]
        shape, start = (end - begin, *self.shape[1:]), self.start + begin * row
        return replace(self, shape=shape, start=start, nbytes=(end - begin) * row)

    def quantized(self) -> QuantTensor:
        raise AssertionError("floating-point numbers are in no quantised format")

    def pieces(self, target: Tensor) -> Iterator[Callable[[], object]]:
        """Pieces of `PIECE_BYTES`; of a target that is not contiguous its matrices, each with a buffer of its size."""
        assert target.shape == self.shape
        dtype = _DTYPES[self.dtype]
        count = self.nbytes // dtype.itemsize
        if not count:
            return
        if not target.is_contiguous():
            matrices = target.flatten(0, -3) if target.dim() > 2 else target.unsqueeze(0)
            step = self.nbytes // len(matrices)
            yield from (partial(self._fill_matrix, matrix, i * step, dtype) for i, matrix in enumerate(matrices))
            return
        flat, step = target.view(-1), PIECE_BYTES // dtype.itemsize
        for begin in range(0, count, step):
            yield partial(self._fill, flat[begin : begin + step], begin * dtype.itemsize, dtype)

    def read(self) -> Tensor:
        """The whole tensor in memory, in the dtype of the file."""
        return self._read(0, torch.empty(self.shape, dtype=_DTYPES[self.dtype]))

    def _fill(self, part: Tensor, start: int, dtype: torch.dtype) -> None:
        """Reads straight into `part` where its dtype and device are the file's, else through a buffer of its size."""
        if part.device.type == "cpu" and part.dtype == dtype:
            self._read(start, part)
        else:
            part.copy_(self._read(start, torch.empty(len(part), dtype=dtype)))

    def _fill_matrix(self, matrix: Tensor, start: int, dtype: torch.dtype) -> None:
        """Reads a matrix through a buffer into a place that is not contiguous."""
        source = self._read(start, torch.empty(matrix.shape, dtype=dtype))
        if matrix.mT.is_contiguous():  # torch transposes matrices fast only in this direction
            matrix, source = matrix.mT, source.mT
        matrix.copy_(source)

    def _read(self, start: int, out: Tensor) -> Tensor:
        """Fills a contiguous CPU tensor with the bytes from `start` of this tensor on. Numbers that are not finite are
        an error: a model with one of them answers, and wrongly."""
        view = out.view(-1).view(torch.uint8).numpy().data
        assert start + len(view) <= self.nbytes
        try:
            with open(self.file, "rb", buffering=0) as file:
                if hasattr(os, "posix_fadvise"):  # doubles how far the kernel reads ahead
                    os.posix_fadvise(file.fileno(), self.start + start, len(view), os.POSIX_FADV_SEQUENTIAL)
                file.seek(self.start + start)
                while len(view):
                    if not (got := file.readinto(view)):
                        raise WeightsError(f"{self.file} ends inside {self.name}; fetch it again")
                    view = view[got:]
        except OSError as error:
            raise WeightsError(f"{self.file} cannot be read: {error}") from None
        if out.dtype in _CHECKED and out.numel() and not all(map(math.isfinite, out.aminmax())):
            raise WeightsError(f"{self.name} holds NaN or infinite numbers; fetch {self.file} again")
        return out


def open_checkpoint(folder: Path, wanted: Callable[[str], bool] | None = None) -> dict[str, StoredTensor]:
    """The tensors of a folder by name: the shards of its index, else `model.safetensors`, else every `*.safetensors`.

    Reads headers only. Shards in which the index lists no `wanted` name are not opened and need not exist.
    """
    files = weight_files(folder, wanted)
    if not files:
        raise WeightsError(f"{folder} holds no .safetensors weights")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _read_header(file):
            if tensor.name in tensors:
                other = tensors[tensor.name].file.name
                raise WeightsError(f"{tensor.name} is both in {other} and in {file.name}; remove the stale file")
            tensors[tensor.name] = tensor
    return {name: tensor for name, tensor in tensors.items() if wanted is None or wanted(name)}


def open_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name; reads its header only."""
    return {tensor.name: tensor for tensor in _read_header(file)}


def weight_files(folder: Path, wanted: Callable[[str], bool] | None = None) -> list[Path]:
    """The safetensors files that make up the checkpoint in `folder`, none where it has no weights."""
    index = folder / INDEX_FILE
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise WeightsError(f"{index} has no weight_map from tensor names to files; fetch it again")
        names = sorted({file for name, file in weight_map.items() if wanted is None or wanted(name)})
        if any(Path(name).name != name for name in names):
            raise WeightsError(f"{index} names a shard outside its folder; refusing to follow it")
        return [folder / name for name in names]
    if (folder / WEIGHTS_FILE).exists():
        return [folder / WEIGHTS_FILE]
    return sorted(folder.glob("*.safetensors"))


def _read_header(file: Path) -> list[StoredTensor]:
    """Every tensor of a file. `safe_open` checks dtypes, shapes and bounds; only then are the offsets believed."""
    try:
        with safe_open(file, framework="pt"), open(file, "rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(size))
    except (SafetensorError, OSError) as error:
        short = "; it is cut short: fetch it again" if "not fully covered" in str(error) else ""
        raise WeightsError(f"{file} cannot be read as safetensors: {error}{short}") from None
    header.pop("__metadata__", None)
    return [
        StoredTensor(name, entry["dtype"], tuple(entry["shape"]), file, 8 + size + begin, end - begin)
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    ]


def write_checkpoint(
    tensors: Mapping[str, Tensor], folder: Path, *, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Writes `model.safetensors`, or shards with their index where there are more than `shard_bytes`.

    `dtype` converts floating-point numbers on the way, but not what belongs to quantised weights, and no `ROUTER_BIAS`.
    The files appear together when all are complete, and those of an earlier save vanish; a failure leaves the folder as
    it was. Returns the path of the file or of the index. Extra memory: one tensor, of a mapping that reads tensors when
    it is asked for them too, if its `items` are on the meta device.
    """
    from keye.files import complete_file

    folder.mkdir(parents=True, exist_ok=True)
    described = dict(tensors.items())
    dtypes = {
        name: t.dtype if dtype is None or _CODES.search(name) or ROUTER_BIAS.search(name) else dtype
        for name, t in described.items()
    }
    sizes = {name: t.numel() * dtypes[name].itemsize for name, t in described.items()}
    groups = group_names(sizes, shard_bytes)
    single, count = len(groups) == 1, len(groups)
    names = [WEIGHTS_FILE if single else f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    path = folder / (WEIGHTS_FILE if single else INDEX_FILE)
    with contextlib.ExitStack() as drafts:
        if not single:  # entered first, so that it takes its place last
            draft = drafts.enter_context(complete_file(path))
            weight_map = dict(
                sorted((tensor, name) for name, group in zip(names, groups, strict=True) for tensor in group)
            )
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            draft.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for name, group in zip(names, groups, strict=True):
            shapes = {n: (dtypes[n], tuple(described[n].shape)) for n in group}
            with ShardWriter(drafts.enter_context(complete_file(folder / name)), shapes) as shard:
                for n in group:
                    shard.write(n, tensors[n].detach().to(device="cpu", dtype=dtypes[n]))
    current = {path.name, *names}
    for file in folder.iterdir():
        ours = file.name in (WEIGHTS_FILE, INDEX_FILE) or _SHARD.fullmatch(file.name)
        if ours and file.name not in current:
            file.unlink()
    return path


class ShardWriter:
    """One safetensors file whose tensors are written one by one, in any order; a block that ends well completes it."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self._path, header = path, dict[str, object]({"__metadata__": {"format": "pt"}})
        names, end = {dtype: name for name, dtype in _DTYPES.items()}, 0
        self._starts: dict[str, int] = {}
        for name, (dtype, shape) in sorted(shapes.items(), key=lambda item: -item[1][0].itemsize):  # all are aligned so
            begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            self._starts[name] = begin
            header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self._write(0, len(text).to_bytes(8, "little") + text)
        os.ftruncate(self._file.fileno(), self._data + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor of the declared dtype and shape. `OSError` where the disk is full."""
        self._write(self._data + self._starts[name], tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def _write(self, start: int, data: bytes | memoryview) -> None:
        self._file.seek(start)
        view = memoryview(data)
        while len(view):
            view = view[self._file.write(view) :]

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
            if kind is not None:
                self._path.unlink(missing_ok=True)


def write_index(folder: Path, shards: Mapping[str, Iterable[str]], total_size: int) -> None:
    """Writes the index of shards: the names of the tensors of each file, and their bytes together."""
    weight_map = dict(sorted((tensor, file) for file, tensors in shards.items() for tensor in tensors))
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def group_names(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into groups of at most `limit` bytes; a larger tensor has a group of its own."""
    groups: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if groups[-1] and total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return groups
