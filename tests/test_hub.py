"""Names and paths become checkpoint folders; everything else becomes one helpful sentence. No test uses the network."""

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from keye import hub
from keye.errors import KeyeError

Snapshot = Callable[[str, bool], Path]


def checkpoint(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file).write_text("{}")
    return folder


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Snapshot], list[bool]]:
    """Replace the hub library's download by a function; returns the log of its `local_files_only`."""

    def install(snapshot: Snapshot) -> list[bool]:
        calls: list[bool] = []

        def download(name: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool) -> str:
            assert not {"*.py", "*.bin", "*.pt", "*.pkl", "*"} & set(allow_patterns)
            calls.append(local_files_only)
            return str(snapshot(name, local_files_only))

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return calls

    return install


def test_a_folder_is_itself(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "mine", "config.json", "model.safetensors", "optimizer.pt")
    assert hub.resolve(folder) == folder
    assert hub.resolve(str(folder)) == folder


@pytest.mark.parametrize("name", ["nano", "keye-nano", "NANO"])
def test_packaged_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "assets" / "nano", "config.json")
    monkeypatch.setattr("keye.hub.resources.files", lambda package: tmp_path)
    assert hub.resolve(name) == folder


def test_a_missing_asset_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keye.hub.resources.files", lambda package: tmp_path)
    with pytest.raises(KeyeError, match="nano is missing from this installation"):
        hub.resolve("nano")


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("2.0", "Kwai-Keye/Keye-VL-2.0-30B-A3B"),
        ("Preview", "Kwai-Keye/Keye-VL-8B-Preview"),
        ("some-one/their-model", "some-one/their-model"),
    ],
)
def test_a_whole_cached_snapshot_needs_no_network(
    name: str, repository: str, tmp_path: Path, serve: Callable[[Snapshot], list[bool]]
) -> None:
    calls = serve(lambda asked, local: checkpoint(tmp_path / asked, "config.json", "model.safetensors"))
    assert hub.resolve(name) == tmp_path / repository
    assert calls == [True]


@pytest.mark.parametrize("index", [json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}), "{"])
def test_a_partial_cached_snapshot_is_completed(
    index: str, tmp_path: Path, serve: Callable[[Snapshot], list[bool]]
) -> None:
    partial = checkpoint(tmp_path / "partial", "config.json", "one.safetensors")
    (partial / "model.safetensors.index.json").write_text(index)
    whole = checkpoint(tmp_path / "whole", "config.json", "one.safetensors", "two.safetensors")
    calls = serve(lambda _, local: partial if local else whole)
    assert hub.resolve("2.0") == whole
    assert calls == [True, False]


def test_without_network_or_cache(serve: Callable[[Snapshot], list[bool]]) -> None:
    def unreachable(name: str, local: bool) -> Path:
        raise LocalEntryNotFoundError("no such snapshot")

    serve(unreachable)
    with pytest.raises(KeyeError, match="hub cannot be reached"):
        hub.resolve("1.5")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OfflineModeIsEnabled("offline"), "unset HF_HUB_OFFLINE"),
        (OSError("No space left on device\nmore lines"), r"No space left on device\): check the network"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_errors_of_the_hub_are_one_sentence(
    error: Exception, sentence: str, serve: Callable[[Snapshot], list[bool]]
) -> None:
    def fail(name: str, local: bool) -> Path:
        raise error

    serve(fail)
    with pytest.raises(KeyeError, match=sentence) as caught:
        hub.resolve("one/two")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("", "name is empty"),
        ("nanno", "did you mean nano"),
        ("keye-vl-2.0", "did you mean Kwai-Keye/Keye-VL-2.0-30B-A3B"),
        ("gpt", "Unknown model 'gpt': Known names: nano,"),
        ("./gone", "gone does not exist"),
        ("a/b/c", "does not exist"),
        ("x" * 5000, "Unknown model"),
        ("~nobody-here/x y", "does not exist"),
    ],
)
def test_unknown_names(name: str, sentence: str) -> None:
    with pytest.raises(KeyeError, match=sentence):
        hub.resolve(name)


def test_a_path_object_is_never_a_name() -> None:
    with pytest.raises(KeyeError, match="one/two does not exist"):
        hub.resolve(Path("one/two"))


def test_what_cannot_be_a_checkpoint(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", "notes.txt")
    with pytest.raises(KeyeError, match="is a file: give the checkpoint folder"):
        hub.resolve(folder / "notes.txt")
    with pytest.raises(KeyeError, match="holds no config.json"):
        hub.resolve(folder)
    checkpoint(folder, "config.json", "pytorch_model.bin")
    with pytest.raises(KeyeError, match=r"only as pickle files \(pytorch_model.bin\)"):
        hub.resolve(folder)
