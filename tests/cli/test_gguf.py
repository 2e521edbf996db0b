"""Verbs with a model in a GGUF file and its vision part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from keye.hub import asset
from tests.support.gguf import write_model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """keye-nano in Q8_0, and its vision part in another folder."""
    folder = tmp_path_factory.mktemp("gguf")
    model, vision = write_model(asset("nano"), folder, kind="Q8_0")
    (folder / "vision").mkdir()
    return model, vision.rename(folder / "vision" / "part.gguf")


def test_asking_takes_a_gguf_file(run: Callable, files: tuple[Path, Path]) -> None:
    question = "ask", asset("demo.mp4"), "when is the cyan triangle visible?"
    answer = run(*question, "--model", files[0], "--mmproj", files[1], "--json").data["text"]
    assert answer == run(*question, "--json").data["text"]
    alone = run(*question, "--model", files[0])
    assert alone.code == 2
    assert "loaded without its vision part and reads text alone: load it with its --mmproj file" in alone.err


def test_a_gguf_file_is_described(run: Callable, files: tuple[Path, Path]) -> None:
    data = run("inspect", files[0], "--mmproj", files[1], "--json").data
    assert data["files"]["fits_config"]
    assert data["files"]["files"] == 2
    assert set(data["files"]["bytes_by_dtype"]) >= {"Q8_0", "F32"}
    assert data["tokenizer"]["disagreements"] == []
    text = run("inspect", files[0])
    assert "none: the model answers text" in text.out


def test_media_are_planned_for_a_gguf_file(run: Callable, files: tuple[Path, Path]) -> None:
    plan = "plan", asset("demo.mp4"), "--json"
    from_file = run(*plan, "--model", files[0], "--mmproj", files[1]).data
    assert from_file["visual_tokens"] == run(*plan).data["visual_tokens"]


def test_mmproj_is_for_gguf_files(run: Callable, files: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("ask", asset("demo.mp4"), "what?", "--mmproj", files[1])
    assert result.code == 2
    assert "--mmproj is for a model in a GGUF file" in result.err


def test_a_gguf_file_of_8_bits_is_quantised(run: Callable, files: tuple[Path, Path], tmp_path: Path) -> None:
    question = asset("demo.mp4"), "when is the cyan triangle visible?", "--json"
    model, vision = files[0], ("--mmproj", files[1])
    result = run("quantize", model, *vision, "--to", "int4", "-o", tmp_path / "int4")
    assert result.code == 0, result.err
    assert not (tmp_path / "int4" / "gguf.link").exists()
    assert run("ask", "--model", tmp_path / "int4", *question).data["intervals"]
