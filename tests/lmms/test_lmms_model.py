"""lmms-eval runs its tasks on keye: the entry point, options and messages, a run of its command line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from keye.data import frameforge
from keye.errors import KeyeError

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed here: make test-lmms")

from keye.evals import lmms_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path_of_packages(tmp_path: Path) -> str:
    """PYTHONPATH with the entry points of pyproject.toml, as an installation of keye has them."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    folder = tmp_path / "packages/keye_entry-1.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: keye-entry\nVersion: 1\n")
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in groups.items()
    ]
    (folder / "entry_points.txt").write_text("".join(lines))
    return os.pathsep.join([str(folder.parent), str(ROOT / "src"), *filter(None, sys.path)])


def write_rows(folder: Path) -> int:
    rows = []
    for seed in range(2):
        clip = frameforge.make_clip(seed, frames=16, split="test", start=0.0, step=0.5)
        frameforge.write_mp4(clip, folder / f"{seed}.mp4")
        for question in frameforge.questions(clip, random.Random(seed), 2, tasks=["ground", "presence", "start"]):
            rows.append({"video": str(folder / f"{seed}.mp4"), "question": question.text, "answer": question.answer})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def test_the_command_line_of_lmms_eval_runs_a_task_on_keye(tmp_path: Path, path_of_packages: str) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    count = write_rows(tasks)
    for name in ("keye_demo.yaml", "keye_demo.py"):
        text = (Path(__file__).parent / name).read_text()
        (tasks / name).write_text(text.replace('"rows.jsonl"', json.dumps(str(tasks / "rows.jsonl"))))
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "keye", "--model_args", "pretrained=nano,max_frames=32",
        "--tasks", "keye_demo", "--include_path", str(tasks), "--output_path", str(tmp_path / "out"), "--log_samples",
        "--batch_size", "2",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": path_of_packages, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    files = list((tmp_path / "out").rglob("*_results.json"))
    assert len(files) == 1, (done.stdout + done.stderr)[-4000:]
    (results,) = files
    scores = json.loads(results.read_text())["results"]["keye_demo"]
    assert next(value for name, value in scores.items() if name.startswith("right") and "stderr" not in name) >= 0.75
    (samples,) = (tmp_path / "out").rglob("*_samples_keye_demo.jsonl")
    assert len(samples.read_text().splitlines()) == count


def test_the_entry_point_names_a_model_of_lmms_eval() -> None:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(lmms_model.manifest())
    assert registry.get_model_class("keye") is registry.get_model_class("keye_vl") is lmms_model.KeyeLmms


def test_media_and_texts_keep_their_order_and_options(tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    frameforge.write_mp4(frameforge.make_clip(0, frames=4, start=0.0), video)
    content = [
        {"type": "image", "url": Image.new("RGB", (8, 8))}, {"type": "text", "text": "between"},
        {"type": "video", "url": str(video), "start_time": 1.0, "end_time": 2.5}, {"type": "text", "text": "when?"},
    ]  # fmt: skip
    options = {"fps": 4, "max_pixels": 12544}
    system = {"role": "system", "content": [{"type": "text", "text": "be brief"}]}
    first, second = lmms_model.read_messages([system, {"role": "user", "content": content}], options)
    image, between, medium, text = second.parts
    assert first.role == "system" and first.parts == ("be brief",) and (between, text) == ("between", "when?")
    assert image.kind == "image" and image.options == {"max_pixels": 12544}
    assert medium.kind == "video" and medium.options == {**options, "video_start": 1.0, "video_end": 2.5}


def test_sound_is_rejected_by_name() -> None:
    with pytest.raises(KeyeError, match="type audio"):
        list(lmms_model.read_messages([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}], {}))


@pytest.mark.parametrize(("task_sampling", "sampling"), [
    ({"max_new_tokens": 16}, {"temperature": 0.0, "max_tokens": 16}),
    ({"temperature": 0, "do_sample": False, "num_beams": 1, "top_p": None}, {"temperature": 0.0, "max_tokens": 1024}),
    ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 8},
     {"temperature": 0.6, "top_p": 0.9, "max_tokens": 8}),
    ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0, "max_tokens": 1024}),
])  # fmt: skip
def test_options_of_generation(task_sampling: dict[str, object], sampling: dict[str, object]) -> None:
    assert lmms_model.sampling_of(task_sampling) == sampling


def test_replies_end_at_stop_texts() -> None:
    assert lmms_model.cut_reply("A\n\nmore", ["\n\n"]) == "A\n\nmore"  # a separator of examples, not a stop
    assert lmms_model.cut_reply("A USER: b", ["USER:"]) == "A " and lmms_model.cut_reply("A", None) == "A"


def test_unknown_arguments_are_named() -> None:
    with pytest.raises(KeyeError, match="max_frame is not an argument"):
        lmms_model.KeyeLmms("nano", max_frame=3)
    with pytest.raises(KeyeError, match="on_error is 'skip'"):
        lmms_model.KeyeLmms("nano", on_error="skip")


def test_a_failed_request_is_no_empty_reply() -> None:
    class Request:
        args = (
            "",
            lambda document: [{"role": "user", "content": [{"type": "video", "url": "/none.mp4"}]}],
            {},
            0,
            "t",
            "s",
        )

    model = lmms_model.KeyeLmms("nano")
    model.task_dict = {"t": {"s": [{}]}}
    with pytest.raises(KeyeError, match="1 of 1 requests failed"):
        model.generate_until([Request()])
    model = lmms_model.KeyeLmms("nano", on_error="empty")
    model.task_dict = {"t": {"s": [{}]}}
    assert [result.text for result in model.generate_until([Request()])] == [""]
