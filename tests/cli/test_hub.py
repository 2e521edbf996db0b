"""Models by name through the command line, from a hub on this machine."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from keye.commands.shared import inputs
from tests.support.fake_hub import FakeHub, serve


@pytest.fixture
def remote(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that holds the tiny model, named in the environment."""
    with serve(FakeHub(files={path.name: path.read_bytes() for path in model_folder.iterdir()})) as running:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.port}")
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        yield running


def test_a_plan_needs_no_weights(run: Callable, remote: FakeHub, video: Path, tmp_path: Path) -> None:
    result = run("plan", video, "--model", remote.name, "--json")
    assert (result.code, result.data["visual_tokens"]) == (0, 128)
    assert "keye: fetching some-one/their-model: " in result.err
    assert not [path for path in remote.requests if path.endswith("model.safetensors")]
    assert run("ask", video, "what?", "--model", remote.name, "--max-tokens", 1).code == 0
    assert [path for path in remote.requests if path.endswith("model.safetensors")]


def test_what_was_fetched_is_here(run: Callable, remote: FakeHub, video: Path) -> None:
    arguments = ["ask", video, "what?", "--model", f"{remote.name}@main", "--max-tokens", 1]
    assert run(*arguments).code == 0
    remote.status = 500
    result = run(*arguments)
    assert (result.code, result.err) == (0, "")


def test_the_bar_tells_bytes_and_appears_only_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr(inputs, "stderr", lambda: Console(file=output, force_terminal=True, width=120))
    with inputs.download_bar("some-one/their-model"):
        pass
    assert output.getvalue() == ""
    with inputs.download_bar("some-one/their-model") as progress:
        progress(2_000_000, 10_000_000)
    assert "fetching some-one/their-model" in output.getvalue() and "2.0/10.0 MB" in output.getvalue()


def test_a_connection_that_stays_cut_is_one_sentence(
    run: Callable, remote: FakeHub, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    remote.cut_after["tokenizer.json"] = [0] * 50
    result = run("plan", video, "--model", remote.name)
    assert (result.code, result.out) == (2, "")
    note, error = result.err.splitlines()
    assert note.startswith("keye: fetching") and "run the command again (what is here is kept)" in error


def test_names_that_the_hub_does_not_know(run: Callable, remote: FakeHub, video: Path) -> None:
    result = run("plan", video, "--model", "no-one/no-model")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("keye: no-one/no-model is neither a folder here nor a model on the hub")
    assert result.err.count("\n") == 1
