"""Numbers in GGUF files: bit for bit as the gguf package de-quantises them, and kept as integers with their scales."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from keye.errors import KeyeError
from keye.weights.gguf.dequantize import dequantize
from keye.weights.gguf.names import Sizes, read_recipes
from keye.weights.gguf.source import FORMATS, GGUFTensor
from keye.weights.gguf.types import BY_NAME, TensorType
from tests.support.gguf import Draft, Entry

READABLE = [kind for kind in BY_NAME.values() if kind.is_readable]
#: Where the scales of a block are, in bytes: random ones would often be infinite or NaN.
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def random_blocks(kind: TensorType, blocks: int, seed: int = 0) -> np.ndarray:
    """Bytes of random blocks with finite numbers, uint8 [blocks, nbytes]."""
    rng = np.random.default_rng(seed)
    if kind.block == 1 or kind.name == "Q8_K":
        count = blocks if kind.block == 1 else blocks * 73
        numbers = rng.standard_normal(count).astype({2: "<f2", 8: "<f8"}.get(kind.nbytes, "<f4"))
        return numbers.view(np.uint8).reshape(blocks, -1)
    data = rng.integers(0, 256, (blocks, kind.nbytes), np.uint8)
    for place in SCALES[kind.name]:
        scale = rng.standard_normal((blocks, 1)).astype("<f2")
        data[:, place : place + 2] = scale.view(np.uint8)
    return data


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_numbers_equal_those_of_the_gguf_package(kind: TensorType) -> None:
    package = pytest.importorskip("gguf")
    data = random_blocks(kind, 512)
    got = dequantize(kind, data.reshape(-1))
    assert got.dtype == np.float32
    if kind.name in ("F64", "Q8_K"):  # the package does not de-quantise them
        assert np.isfinite(got).all()
        return
    want = package.dequantize(data, package.GGMLQuantizationType[kind.name]).reshape(-1)
    assert got.tobytes() == want.astype(np.float32).tobytes()


def test_q8_k_is_codes_times_the_scale() -> None:
    block = np.concatenate(
        [np.array([0.5], "<f4").view("u1"), np.arange(-128, 128).astype("i1").view("u1"), np.ones(32, "u1")]
    )
    assert dequantize(BY_NAME["Q8_K"], block).tolist() == [code / 2 for code in range(-128, 128)]


def sources(tmp_path: Path, kind: TensorType, shape: tuple[int, ...], name: str) -> dict[str, GGUFTensor]:
    """The official tensors of a file that holds one tensor."""
    from keye.weights.gguf.reader import read_gguf
    from keye.weights.gguf.source import _tensors

    data = random_blocks(kind, int(np.prod(shape)) // kind.block)
    file = read_gguf(Draft({}, (Entry(name, shape, data.tobytes(), kind.number),)).write(tmp_path / "t.gguf"))
    return _tensors(file, read_recipes({name: shape}, Sizes(), "t.gguf"))


@pytest.mark.parametrize("name", FORMATS)
def test_integers_and_scales_are_kept(name: str, tmp_path: Path) -> None:
    (source,) = sources(tmp_path, BY_NAME[name], (24, 512), "output.weight").values()
    quantised = source.quantized()
    assert quantised.format == source.format == FORMATS[name]
    assert torch.equal(quantised.dequantize(), source.read())
    compact = replace(source, is_compact=True).quantized()
    assert torch.equal(compact.codes, quantised.codes)
    assert torch.equal(compact.scales, quantised.scales.half())
    if not name.endswith("_K"):
        assert torch.equal(compact.dequantize(), source.read())
    rows = source.part(5, 17)
    assert torch.equal(rows.quantized().dequantize(), source.read()[5:17])
    assert torch.equal(rows.part(1, 3).read(), source.read()[6:8])  # type: ignore[union-attr]


def test_experts_are_read_one_by_one(tmp_path: Path) -> None:
    both = sources(tmp_path, BY_NAME["Q4_K"], (3, 8, 256), "blk.2.ffn_gate_up_exps.weight")
    assert len(both) == 6
    up = both["model.layers.2.mlp.experts.1.up_proj.weight"]
    data = random_blocks(BY_NAME["Q4_K"], 24)
    want = torch.from_numpy(dequantize(BY_NAME["Q4_K"], data.reshape(-1))).view(3, 8, 256)[1, 4:]
    assert up.shape == (4, 256)
    assert torch.equal(up.read(), want)
    target = torch.empty(256, 4, dtype=torch.bfloat16).t()
    for piece in up.pieces(target):
        piece()
    assert torch.equal(target, want.bfloat16())


def test_a_file_that_became_shorter_is_reported(tmp_path: Path) -> None:
    (source,) = sources(tmp_path, BY_NAME["F32"], (8, 8), "output.weight").values()
    path = tmp_path / "t.gguf"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(KeyeError, match=r"t\.gguf ends inside output\.weight"):
        source.read()


@pytest.mark.parametrize(("kind", "at"), [("Q8_0", 0), ("Q4_1", 2)])  # a scale, and a minimum
def test_scales_that_are_not_finite_are_an_error(kind: str, at: int, tmp_path: Path) -> None:
    (source,) = sources(tmp_path, BY_NAME[kind], (2, 32), "output.weight").values()
    path = tmp_path / "t.gguf"
    data = bytearray(path.read_bytes())
    start = source.place[1] + at
    data[start : start + 2] = np.array([np.inf], "<f2").tobytes()
    path.write_bytes(data)
    with pytest.raises(KeyeError, match=r"scales in output\.weight that are NaN or infinite"):
        source.quantized()
