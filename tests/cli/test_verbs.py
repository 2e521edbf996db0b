"""`plan`, `train`, `eval` and `doctor`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from keye.commands import doctor
from keye.train import loop as trainer
from tests.support.clips import write_with_sound


def test_plan_of_a_video_and_an_image(run: Callable, model_folder: Path, video: Path, tmp_path: Path) -> None:
    Image.new("RGB", (300, 200)).save(tmp_path / "picture.png")
    arguments = ["plan", video, tmp_path / "picture.png", "--fps", 1, "--model", model_folder]
    data = run(*arguments, "--json").data
    assert [(plan["kind"], plan["visual_tokens"]) for plan in data["media"]] == [("video", 64), ("image", 12)]
    assert data["media"][0]["timestamps"] == [0.0, 1.0, 2.5, 3.5]
    assert (data["visual_tokens"], data["context"]) == (76, 1024)
    text = run(*arguments).out
    assert "frames at 0.0 1.0 2.5 3.5 s" in text and "76 visual tokens, 7.4% of the 1,024 tokens" in text


def test_settings_that_are_not_honoured_are_notes(run: Callable, model_folder: Path, video: Path) -> None:
    result = run("plan", video, "--max-pixels", 1, "--json", "--model", model_folder)
    assert result.code == 0 and result.data["media"][0]["frames"] == 8
    assert result.err == "keye: --max-pixels 1 cannot be met for short.mp4: it gets 56x56 pixels a frame\n"
    result = run("ask", video, "what?", "--min-frames", 20, "--max-tokens", 1, "--model", model_folder)
    assert result.err.count("keye: --min-frames 20 cannot be met for short.mp4: it gets 8 frames\n") == 1


def test_a_note_comes_once(run: Callable, model_folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (300, 200)).save(tmp_path / "picture.png")
    words = [tmp_path / "picture.png", "what?", "--max-pixels", 1, "--max-tokens", 1, "--model", model_folder]
    assert run("ask", *words).err.count("--max-pixels 1 cannot be met for picture.png") == 1


def test_a_late_first_frame(run: Callable, model_folder: Path, tmp_path: Path) -> None:
    """Times are those of players in plans, parts and live replay; the note comes with each, also from an index."""
    late = write_with_sound(tmp_path / "late.mp4", video_start=1.5)
    note = (
        "keye: late.mp4: its first frame is shown at 1.5 s; all times count from the start of the file, as players do\n"
    )
    result = run("plan", late, "--start", 2, "--end", 3, "--model", model_folder, "--json")
    (plan,) = result.data["media"]
    assert (plan["timestamps"], plan["start_offset"], plan["duration"]) == ([2.0, 3.0], 1.5, 5.5)
    assert result.err == note
    assert run("ask", late, "what?", "--max-tokens", 1, "--model", model_folder).err.count(note) == 1
    words = ["live", late, "what?", "--every", 2, "--max-tokens", 1, "--model", model_folder, "--json"]
    assert [json.loads(line)["time"] for line in run(*words).out.splitlines()] == [1.5, 3.7, 5.4]
    assert run("index", late, "-o", tmp_path / "late.keye", "--model", model_folder).err.count(note) == 1
    requested = run("ask", tmp_path / "late.keye", "what?", "--max-tokens", 1, "--model", model_folder, "--json")
    assert requested.err.count(note.replace("late.mp4", "late.keye")) == 1
    assert requested.data["notes"] == [note.replace("late.mp4", "late.keye").removeprefix("keye: ").strip()]


def test_a_share_of_the_budget(run: Callable, model_folder: Path, video: Path) -> None:
    arguments = ["plan", video, "--total-pixels", 784 * 100, "--model", model_folder, "--json"]
    complete, share = (run(*arguments, *flags).data["visual_tokens"] for flags in ([], ["--adaptive-budget"]))
    assert complete == run(*arguments, "--no-adaptive-budget").data["visual_tokens"] > 2 * share


def test_plan_says_when_a_video_does_not_fit(run: Callable, own_model: Path, video: Path) -> None:
    config = json.loads((own_model / "config.json").read_text()) | {"max_position_embeddings": 100}
    (own_model / "config.json").write_text(json.dumps(config))
    result = run("plan", video, "--model", own_model)
    assert result.code == 0 and "This does not fit" in result.out


def test_plan_reads_no_weights(run: Callable, own_model: Path, video: Path) -> None:
    (own_model / "model.safetensors").unlink()
    assert run("plan", video, "--model", own_model).code == 0


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration, and a trainer that reports twice."""

    def fake(config: Any, recipe: Any, *, resume: bool, report: Any, decode: str | None = None) -> Path:
        assert decode is None, "batches are made by a process of the run's own unless an address is given"
        for step in (1, 2):
            report({"stage": config.stages[0].name, "step": step, "minutes": 0.5, "loss": 1 / step, "resume": resume})
        return Path(config.output)

    monkeypatch.setattr(trainer, "train", fake)
    path = tmp_path / "run.toml"
    path.write_text(
        'recipe = "nano"\nmodel = "m"\noutput = "out"\n'
        '[[stage]]\nname = "look"\ntrains = "vision"\nsteps = 2\nnano = {kind = "vision"}\n'
    )
    return path


def test_training_reports_lines(run: Callable, training: Path) -> None:
    result = run("train", training)
    assert result.code == 0
    assert "look: step 2, 0.5 min, loss 0.5, resume 1\n" in result.err
    assert result.out == f"The model is in {training.parent / 'out'}.\n"


def test_training_reports_json_lines(run: Callable, training: Path) -> None:
    first, second, last = map(json.loads, run("train", training, "--json", "--no-resume").out.splitlines())
    assert (first["step"], second["loss"], second["resume"]) == (1, 0.5, False)
    assert last == {"output": str(training.parent / "out")}


def test_a_small_evaluation(run: Callable, model_folder: Path) -> None:
    arguments = ["eval", "frameforge", "--n", 3, "--frames", "4", "--objects", 1, "--model", model_folder]
    data = run(*arguments, "--json").data
    assert data["model"] == "tiny" and data["questions"] == 3 and {"accuracy", "miou", "tasks"} <= data.keys()
    assert data["options"]["frames"] == [4, 4]
    assert "FrameForge, split test, 4 to 4 frames" in run(*arguments).out


def test_doctor(run: Callable, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keye.api.resolve", lambda name, **options: model_folder)
    result = run("doctor", "--json")
    checks = {check["name"]: check for check in result.data["checks"]}
    assert result.data["ok"] == (result.code == 0)
    assert checks["python"]["ok"] and checks["torch"]["ok"] and checks["video"]["ok"] and checks["nano"]["ok"]
    assert checks["decoding"]["finding"] == "h264 448x448, 2 frames read"
    assert checks["decode limits"]["ok"] is not False


def test_doctor_finds_a_missing_model(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keye.commands.doctor.CHECKS", [doctor.check_nano])
    monkeypatch.setattr("keye.hub.PACKAGED", {"nano": "no such folder"})
    result = run("doctor")
    assert result.code == 1
    assert "nano" in result.out and "FAILED" in result.out and "missing from this installation" in result.out


def test_the_package_is_a_command() -> None:
    displayed = subprocess.run([sys.executable, "-m", "keye", "--version"], capture_output=True, text=True, check=True)
    assert displayed.stdout.startswith("keye")
    assert subprocess.run([sys.executable, "-m", "keye", "juggle"], capture_output=True).returncode == 2


def test_a_picture_is_not_drawn_over(run: Callable, model_folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "picture.png")
    before = (tmp_path / "picture.png").read_bytes()
    result = run("ask", tmp_path / "picture.png", "where?", "--draw", tmp_path / "picture.png", "--model", model_folder)
    assert result.code == 2
    assert "is the input itself" in result.err
    assert (tmp_path / "picture.png").read_bytes() == before


def test_a_template_that_is_not_there(run: Callable, model_folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "picture.png")
    words = [tmp_path / "picture.png", "what?", "--model", model_folder, "--template", tmp_path / "none.jinja"]
    result = run("ask", *words)
    assert result.code == 2
    assert "none.jinja does not exist" in result.err
