"""The examples run, and the pictures in the documentation are what their script draws."""

from __future__ import annotations

import ast
import json
import runpy
import sys
import tomllib
from pathlib import Path

import pytest

from keye.hub import asset

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
#: The extra that installs a module, for modules that keye alone does not bring.
EXTRA_OF = {"transformers": "hf", "fastapi": "serve", "httpx": "serve", "ray": "ray", "triton": "gpu", "openai": "dev"}
BASE = {
    "keye",
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "jinja2",
    "PIL",
    "av",
    "rich",
    "click",
}


def modules_of(script: Path) -> set[str]:
    """Names of the modules outside the standard library that a script imports, without their submodules."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_says_which_extra_it_needs(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    description = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    assert f"python examples/{script.name}" in description.splitlines()[0]
    needed = {EXTRA_OF[name] for name in modules_of(script) - BASE}
    if not needed:
        assert "Needs keye alone, no extra." in description
        return
    [extra] = needed
    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"Needs the extra {extra}: pip install 'keye[{extra}]'" in description
    for name in modules_of(script) - BASE:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=rf"the extra {extra} installs: pip install 'keye\[{extra}\]'$"):
        runpy.run_path(str(script))


def test_every_example_is_listed() -> None:
    listed = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    for path in (ROOT / "examples").iterdir():
        assert path.name == "README.md" or f"examples/{path.name}" in listed or f"({path.name})" in listed
    for script in SCRIPTS:
        [row] = [line for line in listed.splitlines() if f"`python examples/{script.name}" in line]
        extras = {EXTRA_OF[name] for name in modules_of(script) - BASE}
        assert row.endswith(f"| extra `{extras.pop()}` |" if extras else "| keye alone |")


@pytest.mark.slow
def test_asking(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/ask.py"))["main"](str(asset("demo.mp4")), "when is the cyan triangle visible?")
    assert "intervals in seconds: ((2.0, 14.0),)" in capsys.readouterr().out


@pytest.mark.slow
def test_cutting_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/clips.py"))["main"](str(asset("demo.mp4")), "the red circle", str(tmp_path))
    assert [Path(line) for line in capsys.readouterr().out.splitlines()] == list(tmp_path.iterdir())


def test_the_pictures_of_the_documentation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/video_pictures.py"))["main"](tmp_path)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn == {name: (ROOT / "docs/images" / name).read_text() for name in drawn}
    # The table in docs/video.md is what the script prints.
    document = (ROOT / "docs/video.md").read_text()
    for line in capsys.readouterr().out.splitlines():
        assert line in document


def test_the_utilities(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/utilities.py"))["main"]()
    text = capsys.readouterr().out
    assert "slow frames of" in text
    assert "<|frame|>0.0" in text


def test_a_script_for_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="needs the extra: pip install keye[hf]")
    runpy.run_path(str(ROOT / "examples/transformers_script.py"))["main"]()
    text = capsys.readouterr().out
    assert "<|frame|>0.5" in text
    assert "[[" in text.splitlines()[-1]


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
    events = records["red, in the form of OpenAI's batches"]["response"]
    assert events["body"]["choices"][0]["message"]["content"] == "[[3.0, 8.5]]"


def test_the_training_loop_learns_and_its_folder_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = ROOT / "examples/train_loop.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 200
    losses = runpy.run_path(str(script))["main"]("", str(tmp_path), "2")
    assert losses[1] < losses[0]
    assert f"The model is in {tmp_path}." in capsys.readouterr().out


def test_a_task_of_ones_own_is_read_and_scored(tmp_path: Path) -> None:
    from keye.evals.task import TaskSettings, find_task

    task = find_task(f"{ROOT / 'examples/own_task.py'}:TASK")
    (tmp_path / "rows.jsonl").write_text('{"id": "1", "video": "a.mp4", "question": "is it?", "answer": "no"}\n')
    (item,) = task.read(tmp_path, TaskSettings())
    assert item.content[0]["video"] == str(tmp_path / "a.mp4") and task.check(tmp_path).is_complete
    replies = ("No.", "<think>yes</think>no", "yes", "maybe")
    assert [task.score(item.document, reply).score for reply in replies] == [1, 1, 0, 0]
