"""GGUF files for tests: a small writer of whatever a test wants, right or wrong, and models in such files."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from keye.config import read_json
from keye.releases import releases_by_architecture
from keye.weights.gguf.metadata import FILE_KEY, FILES, text_metadata, vision_metadata
from keye.weights.gguf.names import Sizes, take_part, write_recipe
from keye.weights.gguf.tokens import token_metadata
from keye.weights.names import VISION
from keye.weights.safetensors import open_checkpoint

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
        data, end = list[bytes](), 0
        for entry in self.entries:
            offset = end if entry.offset is None else entry.offset
            dims = [*entry.shape][::-1]
            head += text(entry.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, entry.kind, offset)
            data += entry.data, bytes(-len(entry.data) % ALIGNMENT)
            end += len(entry.data) + len(data[-1])
        return b"".join((head, bytes(-len(head) % ALIGNMENT), *data))

    def write(self, path: Path) -> Path:
        path.write_bytes(self.encode())
        return path


def plain(name: str, array: Any) -> Entry:
    """A float32 tensor."""
    array = np.asarray(array, "<f4")
    return Entry(name, array.shape, array.tobytes())


# --------------------------------------------------------------------------------------------------------------------
# Models


def encode_numbers(array: np.ndarray, kind: str) -> bytes:
    """Numbers in a type of ggml; in Q8_0 rounded to the nearest code."""
    if kind == "F32":
        return array.astype("<f4").tobytes()
    if kind == "F16":
        return array.astype("<f2").tobytes()
    blocks = array.astype("<f4").reshape(-1, 32)
    scales = (np.abs(blocks).max(-1, keepdims=True) / 127).astype("<f2")
    divisors = np.where(scales == 0, 1, scales).astype("<f4")
    codes = np.rint(blocks / divisors).clip(-127, 127).astype("i1")
    return np.concatenate([scales.view("u1"), codes.view("u1")], -1).tobytes()


_KINDS = {"F32": 0, "F16": 1, "Q8_0": 8}


def model_entries(tensors: Mapping[str, Any], sizes: Sizes, kind: str) -> list[Entry]:
    """The tensors of a model as a file in `kind` has them: vectors and routers in float32."""
    entries = []
    for name, tensor in tensors.items():
        recipe = write_recipe(name, tuple(tensor.shape), sizes)
        assert recipe is not None, name
        for part in recipe.parts:
            array = take_part(recipe, part, tensor).float().numpy()
            is_matrix = array.ndim > 1 and "gate_inp" not in part.tensor and "position" not in part.tensor
            own = kind if is_matrix and (kind != "Q8_0" or array.shape[-1] % 32 == 0) else "F32"
            entries.append(Entry(part.tensor, array.shape, encode_numbers(array, own), _KINDS[own]))
    return entries


def write_model(
    folder: Path, out: Path, *, kind: str = "F16", architecture: str = "keye-vl2", **changes: Any
) -> tuple[Path, Path]:
    """A checkpoint folder as a GGUF file and its vision part in `out`: their paths. `changes` replace metadata; None
    leaves a key out."""
    raw = read_json(folder / "config.json")
    release = releases_by_architecture()[raw["architectures"][0]]
    sparse = raw.get("sa_config") or {}
    sizes = Sizes(sparse.get("indexer_num_heads", 0), sparse.get("indexer_head_dim", 0))
    tensors = {name: tensor.read() for name, tensor in open_checkpoint(folder).items()}
    vision = {name: tensors.pop(name) for name in list(tensors) if name.startswith(VISION)}
    metadata = {
        "general.architecture": architecture, "general.type": "model", **text_metadata(raw, architecture),
        **token_metadata(read_json(folder / "tokenizer.json"), raw["vocab_size"]),
        "tokenizer.ggml.eos_token_id": raw["eos_token_id"], "tokenizer.ggml.padding_token_id": raw["pad_token_id"],
        **{FILE_KEY + name: (folder / name).read_text() for name in FILES if (folder / name).exists()}, **changes,
    }  # fmt: skip
    model = Draft({k: v for k, v in metadata.items() if v is not None}, model_entries(tensors, sizes, kind))
    preprocessor = read_json(folder / "preprocessor_config.json")
    part = Draft(
        {"general.architecture": "clip", "general.type": "mmproj", **vision_metadata(raw, preprocessor, release)},
        model_entries(vision, sizes, kind),
    )  # fmt: skip
    return model.write(out / "model.gguf"), part.write(out / "mmproj-model.gguf")
