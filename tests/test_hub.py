"""Names and paths become checkpoint folders; everything else becomes one helpful sentence. No test uses the network."""

from pathlib import Path

import pytest

from keye import hub
from keye.errors import KeyeError


def checkpoint(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file).write_text("{}")
    return folder


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
    ("name", "sentence"),
    [
        ("", "name is empty"),
        ("nanno", "did you mean nano"),
        ("keye-vl-2.0", "did you mean Kwai-Keye/Keye-VL-2.0-30B-A3B"),
        ("gpt", "Unknown model 'gpt': Known names: nano,"),
        ("./gone", "gone does not exist"),
        ("a/b/c", "does not exist"),
        ("x" * 5000, "Unknown model"),
        ("~no-one-here/x y", "does not exist"),
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
    with pytest.raises(KeyeError, match="is a file: give a GGUF file, or the folder"):
        hub.resolve(folder / "notes.txt")
    with pytest.raises(KeyeError, match="holds no config.json"):
        hub.resolve(folder)
    checkpoint(folder, "config.json", "pytorch_model.bin")
    with pytest.raises(KeyeError, match=r"only as pickle files \(pytorch_model.bin\)"):
        hub.resolve(folder)
    assert hub.resolve(folder, weights=False) == folder
