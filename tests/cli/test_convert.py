"""`keye convert` through the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from keye.weights.gguf.reader import read_gguf
from keye.weights.safetensors import open_checkpoint
from tests.support.disk import largest_file


def test_two_gguf_files_become_a_folder_again(run: Callable, model_folder: Path, tmp_path: Path) -> None:
    result = run("convert", model_folder, "--type", "bf16", "-o", tmp_path / "model.gguf", "--json")
    assert (result.code, result.data["type"]) == (0, "BF16")
    assert result.data["bytes"] == (tmp_path / "model.gguf").stat().st_size
    assert run("inspect", tmp_path / "model.gguf", "--json").data["fits"][0]["dtype"] == "bfloat16"
    assert run("convert", model_folder, "--mmproj", "-o", tmp_path / "mmproj-model.gguf").code == 0
    result = run("convert", tmp_path / "model.gguf", "-o", tmp_path / "back", "--json")
    assert (result.code, result.data["part"]) == (0, "model")
    assert run("inspect", tmp_path / "back", "--json").data["files"]["fits_config"] is True


def test_the_default_is_the_mix_that_most_people_take(run: Callable, model_folder: Path, tmp_path: Path) -> None:
    result = run("convert", model_folder, "--text-only", "-o", tmp_path / "text.gguf")
    assert (result.code, result.out) == (0, "")
    assert result.err.splitlines()[-1].endswith("Q4_K_M")
    assert read_gguf(tmp_path / "text.gguf").metadata["general.file_type"] == 15
    described = run("inspect", tmp_path / "text.gguf", "--json").data
    assert {row["dtype"] for row in described["fits"]} == {"stored"}
    assert described["fits"][0]["weights"] < described["bytes"]["bfloat16"] and described["recommendation"] is None


def test_a_model_that_keye_quantised_becomes_plain_numbers(run: Callable, model_folder: Path, tmp_path: Path) -> None:
    assert run("quantize", model_folder, "--to", "int8", "-o", tmp_path / "int8").code == 0
    assert run("convert", tmp_path / "int8", "-o", tmp_path / "plain").code == 0
    wanted, plain = open_checkpoint(model_folder), open_checkpoint(tmp_path / "plain")
    for name, tensor in wanted.items():
        x = tensor.read().float()
        assert float((plain[name].read().float() - x).norm()) <= 0.02 * float(x.norm()), name
    result = run("convert", tmp_path / "int8", "--type", "Q8_0", "-o", tmp_path / "model.gguf")
    assert result.code == 0
    assert "the weights are quantised already, and Q8_0 loses more" in result.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-o", "model", "--type", "Q4_K_M"], "Q4_K_M is a format of GGUF files; safetensors take F32, F16, BF16"),
        (["-o", "model.bin", "--to", "gguf"], "model.bin is not called as a GGUF file: end it in .gguf"),
        (["-o", "x.gguf", "--mmproj", "--text-only"], "--mmproj and --text-only exclude each other"),
        (["-o", "x.gguf", "--mmproj", "--type", "Q4_K_M"], "a vision part cannot be written as Q4_K_M; choose one"),
        (["-o", "model", "--mmproj"], "--mmproj and --text-only concern GGUF files"),
        (["-o", "text.gguf"], "text.gguf exists and is not an earlier output of this kind"),
        (["-o", "full"], "full is not empty: name another folder"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(
    run: Callable, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.gguf").write_text("a text")
    Path("full").mkdir()
    Path("full/file").touch()
    result = run("convert", model_folder, *arguments)
    assert (result.code, result.out) == (2, "")
    (line,) = result.err.splitlines()
    assert sentence in line
    assert {path.name for path in tmp_path.iterdir()} == {"text.gguf", "full"}


@pytest.mark.parametrize("output", ["model.gguf", "folder"])
def test_a_full_disk_is_one_sentence(run: Callable, model_folder: Path, tmp_path: Path, output: str) -> None:
    with largest_file(100_000):
        result = run("convert", model_folder, "-o", tmp_path / output)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert f"no room is left to write {tmp_path / output}" in result.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_files_of_others_and_the_input_are_kept(run: Callable, model_folder: Path, tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden/gguf/case-00-Q4_K_M.gguf"
    other, ours = tmp_path / "other.gguf", tmp_path / "ours.gguf"
    other.write_bytes(golden.read_bytes())
    result = run("convert", model_folder, "-o", other)
    assert (result.code, other.read_bytes()) == (2, golden.read_bytes())
    assert run("convert", model_folder, "-o", ours).code == 0
    assert run("convert", model_folder, "--type", "Q8_0", "-o", ours).code == 0
    result = run("convert", ours, "-o", ours)
    assert (result.code, "is the input itself" in result.err) == (2, True)


def test_a_checkpoint_that_is_cut_short_gives_no_file(run: Callable, model_folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in model_folder.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    weights = bad / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    result = run("convert", bad, "-o", tmp_path / "model.gguf")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert not (tmp_path / "model.gguf").exists()
