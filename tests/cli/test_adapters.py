"""`--adapter`: a folder that PEFT wrote, for all that a command computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import keye
from keye.commands.shared.options import adapter_settings
from keye.errors import KeyeError
from tests.support.adapters import random_pairs, write_adapter

LAYERS = ("model.layers.0.self_attn.v_proj", "lm_head")


@pytest.fixture
def adapter(model_folder: Path, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "captions", random_pairs(keye.load(model_folder).model, LAYERS))


def test_a_command_answers_with_its_adapter(run: Callable, model_folder: Path, video: Path, adapter: Path) -> None:
    words = ["ask", video, "what?", "--max-tokens", 8, "--temperature", 0, "--model", model_folder, "--json"]
    base, adapted = run(*words).data["text"], run(*words, "--adapter", adapter).data["text"]
    model = keye.load(model_folder, adapters={"mine": adapter}, adapter="mine")
    assert base != adapted == model.ask(video, "what?", max_tokens=8, temperature=0).text


def test_an_index_belongs_to_its_adapter(
    run: Callable, model_folder: Path, video: Path, adapter: Path, tmp_path: Path
) -> None:
    index, model = tmp_path / "video.keye", ["--model", model_folder, "--adapter", f"mine={adapter}"]
    assert run("index", video, "-o", index, *model).code == 0
    words = ["ask", index, "what?", "--max-tokens", 2]
    assert run(*words, *model).code == 0
    other = run(*words, "--model", model_folder)
    assert other.code == 2 and "other weights" in other.err
    loaded = keye.load(model_folder, adapters={"mine": adapter})
    loaded.index(video, tmp_path / "base.keye")
    with pytest.raises(KeyeError, match="indexed without one, but the question is asked with the adapter mine"):
        loaded.ask(tmp_path / "base.keye", "what?", adapter="mine")


def test_a_mistake_is_found_before_loading(run: Callable, own_model: Path, video: Path, tmp_path: Path) -> None:
    (own_model / "model.safetensors").write_bytes(b"")
    result = run("ask", video, "what?", "--model", own_model, "--adapter", tmp_path)
    assert result.code == 2 and "holds no adapter_config.json" in result.err


def test_names_of_the_command_line(tmp_path: Path) -> None:
    here = Path.cwd()
    assert adapter_settings("runs/captions") == {
        "adapters": {"captions": str(here / "runs/captions")}, "adapter": "captions",
    }  # fmt: skip
    assert adapter_settings(("a=x", "b=/y")) == {"adapters": {"a": str(here / "x"), "b": "/y"}}
    assert adapter_settings(None) == adapter_settings(()) == {}
    assert adapter_settings("x=runs/lr=1e-4")["adapters"] == {"x": str(here / "runs/lr=1e-4")}
    (tmp_path / "lr=1e-4").mkdir()
    assert adapter_settings(str(tmp_path / "lr=1e-4")) == {
        "adapters": {"lr=1e-4": str(tmp_path / "lr=1e-4")}, "adapter": "lr=1e-4",
    }  # fmt: skip
    assert adapter_settings(".")["adapter"] == here.name
    with pytest.raises(KeyeError, match="twice"):
        adapter_settings(("a=x", "a=y"))


def test_settings_that_change_nothing_are_rejected(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text('{"question": "hi"}\n')
    words = ["batch", tmp_path / "questions.jsonl", "-o", tmp_path / "out.jsonl", "--server", "http://127.0.0.1:1"]
    rejected = run(*words, "--adapter", tmp_path)
    assert rejected.code == 2 and "name the adapter that the server has with --model" in rejected.err
    rejected = run("serve", "--adapter-folder", tmp_path / "missing", "--port", 0)
    assert rejected.code == 2 and "missing is not a folder" in rejected.err


def test_a_name_that_none_can_have_is_rejected_before_loading(
    run: Callable, own_model: Path, video: Path, tmp_path: Path
) -> None:
    (own_model / "model.safetensors").write_bytes(b"")
    result = run("ask", video, "hello", "--model", own_model, "--adapter", f"two words={tmp_path}")
    assert result.code == 2 and "'two words' is not a name for an adapter" in result.err
