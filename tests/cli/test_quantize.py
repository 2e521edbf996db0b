"""`keye quantize` and `--quant`: what is printed and written, and one sentence for each mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from keye.errors import KeyeError
from keye.evals.health.calibration import frameforge_prompts, read_prompts


def test_a_table_is_printed_and_kept(run: Callable, folder: Path, tmp_path: Path) -> None:
    result = run("quantize", folder, "--to", "int4", "--group", "32", "--part", "head=int8", "-o", tmp_path / "out")
    assert result.code == 0
    for words in ("experts", "int4 per 32", "int8 per row", "router", "% of the bytes were quantised"):
        assert words in result.out, words
    saved = json.loads((tmp_path / "out/quantization.json").read_text())
    assert {row["part"]: row["format"] for row in saved["rows"]}["head"] == "int8 per row"
    again = run("quantize", folder, "--to", "int8", "-o", tmp_path / "out")
    assert again.code == 2 and "give --overwrite" in again.err
    data = run("quantize", folder, "--to", "int8", "-o", tmp_path / "out", "--overwrite", "--json").data
    assert data["kind"] == "int8" and data["folder"] == str(tmp_path / "out")


def test_a_quantised_model_answers(run: Callable, folder: Path, clips: list[Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("what is seen?\n\nwhen?\n")
    options = ("--to", "int4", "--data-aware", tmp_path / "prompts.txt", "-o", tmp_path / "out")
    result = run("quantize", folder, *options)
    assert result.code == 0 and "by data" in result.out
    for options in (("--model", tmp_path / "out"), ("--model", folder, "--quant", "int8")):
        answer = run("ask", clips[0], "what is seen?", *options, "--max-tokens", "3", "--json")
        assert answer.code == 0 and "text" in answer.data
    result = run("ask", clips[0], "what is seen?", "--model", tmp_path / "out", "--quant", "int8")
    assert result.code == 2 and "quantised already (int4)" in result.err


@pytest.mark.parametrize(("options", "sentence"), [
    (("--to", "int4", "--group", "48"), "48 inputs cannot share a scale in int4; choose 32, 64 or 128"),
    (("--to", "int8", "--group", "7"), "7 inputs cannot share a scale; choose a multiple of 16"),
    (("--to", "int4", "--part", "tail=int8"), "a model has no part 'tail'"),
    (("--to", "int4", "--part", "head"), "'head' does not name a part and its format"),
    (("--to", "int4", "--data-aware", "nowhere"), "nowhere does not exist"),
])  # fmt: skip
def test_mistakes(run: Callable, folder: Path, tmp_path: Path, options: tuple[str, ...], sentence: str) -> None:
    result = run("quantize", folder, "-o", tmp_path / "out", *options)
    assert result.code == 2 and sentence in result.err and not (tmp_path / "out").exists()


def test_bad_checkpoints(run: Callable, folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in folder.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    tensors = load_file(bad / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = torch.nan
    save_file(tensors, bad / "model.safetensors")
    result = run("quantize", bad, "--to", "int4", "-o", tmp_path / "out")
    assert result.code == 2 and "lm_head.weight holds NaN or infinite numbers" in result.err
    raw = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**raw, "quantization_config": {"quant_method": "gptq"}}))
    result = run("quantize", bad, "--to", "int4", "-o", tmp_path / "out")
    assert result.code == 2 and "(gptq)" in result.err and not (tmp_path / "out").exists()


def test_prompts_of_a_user(clips: list[Path], tmp_path: Path) -> None:
    assert len(frameforge_prompts(2)) == 4
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "notes.txt").write_text("no medium")
    with pytest.raises(KeyeError, match="holds no prompts"):
        read_prompts(str(folder))
    (folder / "a.mp4").write_bytes(clips[0].read_bytes())
    assert len(read_prompts(str(folder))) == 1
    manifest = tmp_path / "questions.jsonl"
    manifest.write_text(json.dumps({"video": str(clips[0]), "question": "when?"}) + "\n{broken\n")
    ((message,),) = read_prompts(str(manifest))
    assert message["content"][0]["video"] == str(clips[0])
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(KeyeError, match="is not text"):
        read_prompts(str(tmp_path / "prompts.txt"))
