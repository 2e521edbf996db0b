"""Vectors stored beside an index: appended, read back, and what a killed process leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from keye.errors import KeyeError
from keye.library.vectors import VectorWriter, rank_frames, read_vectors


class MeanColors:
    """A frame's mean colour; a text is the name of a channel."""

    def __init__(self, name: str = "mean colors", rows: int | None = None) -> None:
        self.name, self.dim, self.rows = name, 3, rows

    def embed_frames(self, frames: NDArray[np.uint8]) -> NDArray[np.floating[Any]]:
        return frames.mean(axis=(1, 2))[: self.rows]

    def embed_text(self, text: str) -> NDArray[np.floating[Any]]:
        return np.eye(3)[("red", "green", "blue").index(text)]


def paint(*colors: tuple[int, int, int]) -> NDArray[np.uint8]:
    return np.array([[[color] * 4] * 4 for color in colors], np.uint8)


RED, GREEN, BLUE = (200, 0, 0), (0, 90, 0), (0, 0, 7)


def test_the_best_frame_has_the_highest_cosine(tmp_path: Path) -> None:
    writer = VectorWriter(tmp_path / "1.keye", MeanColors())
    writer.append(paint(RED, GREEN), [0.0, 1.0])
    VectorWriter(tmp_path / "1.keye", MeanColors()).append(paint(BLUE), [2.0])  # goes on
    stored = read_vectors(tmp_path / "1.keye")
    assert stored is not None and stored.times.tolist() == [0.0, 1.0, 2.0]
    assert stored.match(torch.tensor([0.0, 0.0, 1.0], dtype=torch.bfloat16)).tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("suffix", [".vectors", ".times"])
def test_an_incomplete_row_is_ignored_and_replaced(tmp_path: Path, suffix: str) -> None:
    index = tmp_path / "1.keye"
    VectorWriter(index, MeanColors()).append(paint(RED, GREEN), [0.0, 1.0])
    file = index.with_suffix(suffix)
    file.write_bytes(file.read_bytes()[:-1])
    stored = read_vectors(index)
    assert stored is not None and stored.times.tolist() == [0.0]
    VectorWriter(index, MeanColors()).append(paint(BLUE), [1.0])
    stored = read_vectors(index)
    assert stored is not None and stored.times.tolist() == [0.0, 1.0]
    assert stored.match(torch.tensor([0.0, 0.0, 1.0], dtype=torch.bfloat16)).tolist() == [0.0, 1.0]


def test_vectors_of_another_embedder_are_begun_again(tmp_path: Path) -> None:
    VectorWriter(tmp_path / "1.keye", MeanColors()).append(paint(RED), [0.0])
    VectorWriter(tmp_path / "1.keye", MeanColors("other"))
    stored = read_vectors(tmp_path / "1.keye")
    assert stored is not None and stored.embedder == "other" and len(stored.times) == 0


def test_an_embedder_that_leaves_frames_out_is_an_error(tmp_path: Path) -> None:
    writer = VectorWriter(tmp_path / "1.keye", MeanColors(rows=1))
    with pytest.raises(KeyeError, match="not 2 finite vectors of 3"):
        writer.append(paint(RED, GREEN), [0.0, 1.0])


@pytest.mark.parametrize("content", [b"", b"x" * 5000, b"keye vectors 1\0\0" + b"\xff" * 4080])
def test_damaged_vectors_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "1.vectors").write_bytes(content)
    (tmp_path / "1.times").write_bytes(b"\0" * 8)
    assert read_vectors(tmp_path / "1.keye") is None


def test_the_best_frames_of_many_videos(tmp_path: Path) -> None:
    indexes = [tmp_path / f"{number}.keye" for number in range(3)]
    VectorWriter(indexes[0], MeanColors()).append(paint(RED, BLUE, BLUE), [0.0, 10.0, 12.0])
    VectorWriter(indexes[1], MeanColors("other")).append(paint(BLUE), [0.0])
    VectorWriter(indexes[2], MeanColors()).append(paint((9, 0, 9), RED), [3.0, 30.0])
    matches, without = rank_frames(indexes, MeanColors(), "blue", 2)
    assert [(match.number, match.time) for match in matches] == [(0, 10.0), (2, 3.0)]  # 12.0 is too near
    assert matches[1].cosine == pytest.approx(0.707, abs=0.01) and without == [1]
