"""The examples run, and the pictures in the documentation are what their script draws."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_pictures_of_the_documentation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/video_pictures.py"))["main"](tmp_path)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text() for path in (ROOT / "docs/images").iterdir()}
    # The table in docs/video.md is what the script prints.
    document = (ROOT / "docs/video.md").read_text()
    for line in capsys.readouterr().out.splitlines():
        assert line in document


def test_the_utilities(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/utilities.py"))["main"]()
    shown = capsys.readouterr().out
    assert "slow frames of" in shown
    assert "<|frame|>0.0" in shown


def test_a_script_for_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="needs the extra: pip install keye[hf]")
    runpy.run_path(str(ROOT / "examples/transformers_script.py"))["main"]()
    shown = capsys.readouterr().out
    assert "<|frame|>0.5" in shown
    assert "[[" in shown.splitlines()[-1]


def test_a_live_session(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/live.py"))["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[1] for line in lines] == [" 8 frames", " 16 frames", " 24 frames", " 32 frames"]


def test_evidence_of_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/evidence.py"))["main"](tmp_path / "evidence.png")
    assert "demo.mp4 at 8.5 s: " in capsys.readouterr().out
    assert (tmp_path / "evidence.png").stat().st_size > 1000


def test_the_manifest_of_a_batch(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="needs the extra: pip install keye[serve]")
    from keye.cli import main

    out = tmp_path / "answers.jsonl"
    assert main(["batch", str(ROOT / "examples/questions.jsonl"), "-o", str(out)]) == 0
    records = {
        record.get("custom_id", record["id"]): record for record in map(json.loads, out.read_text().splitlines())
    }
    assert records["red"]["text"] == "[[3.0, 8.5]]"
    told = records["red, in the form of OpenAI's batches"]["response"]
    assert told["body"]["choices"][0]["message"]["content"] == "[[3.0, 8.5]]"
