"""Headers of GGUF files: right ones are read, lying ones get one sentence each and take little memory."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keye.errors import KeyeError
from keye.weights.gguf.reader import read_gguf
from tests.support.gguf import ARRAY, TEXT, U32, U64, Draft, Entry, plain, text

MATRIX = plain("m.weight", np.arange(12).reshape(3, 4))


def good(**changes: Any) -> Draft:
    metadata = {
        "general.architecture": "qwen3", "n": 7, "x": 0.5, "flag": True, "words": ["a", "", "déjà"],
        "numbers": np.array([1, -2, 3]),
    }  # fmt: skip
    entries = (MATRIX, Entry("q.weight", (2, 256), bytes(288), 12))
    return Draft(**{"metadata": metadata, "entries": entries, **changes})


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_and_tensors_are_read(version: int, tmp_path: Path) -> None:
    file = read_gguf(good(version=version).write(tmp_path / "a.gguf"))
    assert {name: item for name, item in file.metadata.items() if name != "numbers"} == {
        "general.architecture": "qwen3", "n": 7, "x": 0.5, "flag": True, "words": ["a", "", "déjà"],
    }  # fmt: skip
    assert file.metadata["numbers"].tolist() == [1, -2, 3]
    tensor = file.tensors["q.weight"]
    assert (tensor.type.name, tensor.shape, tensor.nbytes) == ("Q4_K", (2, 256), 288)
    matrix = file.tensors["m.weight"]
    with open(matrix.file, "rb") as raw:
        raw.seek(matrix.start)
        assert np.frombuffer(raw.read(matrix.nbytes), "<f4").tolist() == list(range(12))


def with_value(encoded: bytes) -> Draft:
    return good(metadata={"key": encoded})


LIES = {
    "not a GGUF file": good(magic=b"GGML"),
    "big-endian": good(version=struct.unpack(">I", struct.pack("<I", 3))[0]),
    "version 1; keye reads versions 2 and 3": good(version=1),
    "promises 18446744073709551615 tensors": good(tensor_count=(1 << 64) - 1),
    "promises 4611686018427387904 metadata entries": good(key_count=1 << 62),
    "ends inside key; it was cut short or its header lies": with_value(struct.pack("<IQ", TEXT, 1 << 60)),
    "promises 1152921504606846976 texts in key": with_value(struct.pack("<IIQ", ARRAY, TEXT, 1 << 60)),
    "ends inside key": with_value(struct.pack("<IIQ", ARRAY, U64, 1 << 61)),
    "an array of arrays": with_value(struct.pack("<IIQ", ARRAY, ARRAY, 1)),
    "key of the unknown type 99": with_value(struct.pack("<I", 99)),
    "neither true nor false": with_value(struct.pack("<IB", 7, 2)),
    "metadata key of 65537 bytes": good(metadata={"k" * 65537: 1}),
    "not valid UTF-8": Draft(metadata={}, entries=(Entry(b"\xff", (1,), bytes(4)),)),  # type: ignore[arg-type]
    "0 dimensions; it must be 1 to 4": good(entries=(Entry("t", (), b""),)),
    "9 dimensions": good(entries=(Entry("t", (1,) * 9, bytes(4)),)),
    "which the file cannot hold": good(entries=(Entry("t", (1 << 62, 1 << 62), bytes(4)),)),
    "the shape [0, 3]": good(entries=(Entry("t", (3, 0), bytes(4)),)),
    "type 77, which keye does not know": good(entries=(Entry("t", (1,), bytes(4), 77),)),
    "does not divide into blocks of 256": good(entries=(Entry("t", (1, 300), bytes(400), 12),)),
    "ends before the numbers of t do": good(entries=(Entry("t", (64,), bytes(32)),)),
    "not a multiple of 32": good(entries=(Entry("t", (1,), bytes(64), offset=4),)),
    "puts t over m.weight": good(entries=(MATRIX, Entry("t", (4,), bytes(16), offset=32))),
    "two tensors m.weight": good(entries=(MATRIX, MATRIX)),
    "general.alignment 3; it must be a power of two": good(metadata={"general.alignment": 3}),
}  # fmt: skip


@pytest.mark.parametrize("sentence", LIES)
def test_a_lying_header_gets_one_sentence(sentence: str, tmp_path: Path) -> None:
    path = LIES[sentence].write(tmp_path / "a.gguf")
    tracemalloc.start()
    with pytest.raises(KeyeError) as error:
        read_gguf(path)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sentence in str(error.value)
    assert str(path) in str(error.value)
    assert used < 4_000_000


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    draft = good(metadata={"a": 1, "b": 2})
    path = tmp_path / "a.gguf"
    path.write_bytes(draft.encode().replace(text("b"), text("a")))
    with pytest.raises(KeyeError, match="two values of a"):
        read_gguf(path)


def test_every_file_cut_short_and_every_flipped_byte_is_read_or_rejected(tmp_path: Path) -> None:
    """Nothing but `KeyeError` comes out of a damaged header. benchmarks/fuzz_gguf.py does this for longer."""
    data, path, chance = good().encode(), tmp_path / "a.gguf", random.Random(0)
    variants = [data[:length] for length in range(0, len(data), 3)]
    for _ in range(600):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 4))):
            changed[chance.randrange(400)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        variants.append(bytes(changed))
    sentences = []
    for variant in variants:
        path.unlink(missing_ok=True)  # file systems write a file out when it is replaced in place
        path.write_bytes(variant)
        try:
            read_gguf(path)
        except KeyeError as error:
            sentences.append(str(error))
    assert len(sentences) > 300
    assert not any("\n" in sentence for sentence in sentences)


def split(number: int, **changes: Any) -> Draft:
    metadata = {"split.no": number, "split.count": 2, "split.tensors.count": 2, **changes}
    return Draft(metadata=metadata, entries=(plain(f"t{number}", [1.0]),))


def test_a_split_model_is_read_from_any_of_its_files(tmp_path: Path) -> None:
    paths = [split(n).write(tmp_path / f"m-{n + 1:05}-of-00002.gguf") for n in range(2)]
    for path in paths:
        file = read_gguf(path)
        assert {name: tensor.file for name, tensor in file.tensors.items()} == {"t0": paths[0], "t1": paths[1]}
    paths[1].unlink()
    with pytest.raises(KeyeError, match=r"one of 2 files, of which m-00002-of-00002\.gguf is missing"):
        read_gguf(paths[0])
    split(0).write(paths[1])
    with pytest.raises(KeyeError, match="is not file 2 of 2"):
        read_gguf(paths[0])
    paths[0].rename(tmp_path / "m.gguf")
    with pytest.raises(KeyeError, match="keep their names"):
        read_gguf(tmp_path / "m.gguf")


def test_files_that_llama_cpp_joined_are_one_file(tmp_path: Path) -> None:
    path = Draft(metadata={"split.count": 0}, entries=(plain("t", [1.0]),)).write(tmp_path / "m.gguf")
    assert list(read_gguf(path).tensors) == ["t"]


def test_numbers_of_the_header_are_what_they_were(tmp_path: Path) -> None:
    wide = struct.pack("<Iq", 11, -(1 << 60)), struct.pack("<Id", 12, 0.1), struct.pack("<IQ", U64, (1 << 64) - 1)
    draft = Draft(metadata=dict(zip("abc", wide, strict=True)), entries=(MATRIX,))
    metadata = read_gguf(draft.write(tmp_path / "a.gguf")).metadata
    assert metadata == {"a": -(1 << 60), "b": 0.1, "c": (1 << 64) - 1}
    bits = struct.pack("<IIQ4I", ARRAY, U32, 4, 0, 1, 2, 1 << 31)
    numbers = read_gguf(Draft(metadata={"n": bits}, entries=(MATRIX,)).write(tmp_path / "a.gguf")).metadata["n"]
    assert numbers.tolist() == [0, 1, 2, 1 << 31]
