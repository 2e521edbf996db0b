"""Experts on disk compute what experts in memory do, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import keye
from keye.errors import KeyeError
from keye.hub import asset
from keye.models.expert_file import expert_weights
from keye.ops.registry import describe_packing

pytestmark = pytest.mark.skipif(not describe_packing(), reason="the compiled core is not here")
QUESTION = "when is the red circle visible?"


def tokens(model: keye.Keye) -> tuple[str, list[float]]:
    answer = model.ask(asset("demo.mp4"), QUESTION, max_tokens=12, logprobs=0)
    assert answer.logprobs is not None
    return answer.text, [prob.logprob for prob in answer.logprobs]


@pytest.fixture(scope="module")
def in_memory() -> keye.Keye:
    return keye.load("nano", quant="int4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def on_disk(folder: Path) -> keye.Keye:
    return keye.load("nano", quant="int4", experts="disk", experts_folder=folder)


def test_the_same_tokens_and_probabilities_as_in_memory(in_memory: keye.Keye, on_disk: keye.Keye, folder: Path) -> None:
    assert tokens(on_disk) == tokens(in_memory)
    files = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert len(files) == 2
    again = keye.load("nano", quant="int4", experts="disk", experts_folder=folder)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == files
    assert tokens(again) == tokens(in_memory)
    assert again.runtime.fingerprint == in_memory.runtime.fingerprint


@pytest.mark.slow
def test_int8_too(tmp_path: Path) -> None:
    assert tokens(keye.load("nano", quant="int8", experts="disk", experts_folder=tmp_path)) == tokens(
        keye.load("nano", quant="int8")
    )


def test_all_experts_of_a_long_chunk_too(in_memory: keye.Keye, on_disk: keye.Keye) -> None:
    x = torch.randn(300, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    for ours, theirs in zip(on_disk.model.model.layers, in_memory.model.model.layers, strict=True):
        assert torch.equal(ours.mlp(x)[0], theirs.mlp(x)[0])
        sizes = [40] * 7 + [20]
        assert torch.equal(ours.mlp.experts(x, sizes), theirs.mlp.experts(x, sizes))


def test_experts_are_not_in_memory(on_disk: keye.Keye, folder: Path) -> None:
    (file,) = folder.glob("*.bin")
    weights = expert_weights(on_disk.model)
    assert sum(w.packed.nbytes for w in weights.values() if w.packed) <= file.stat().st_size
    with open("/proc/self/maps", encoding="utf-8") as maps:
        ranges = [line.split()[0].split("-") for line in maps if str(file) in line]
    for weight in weights.values():
        assert weight.codes is None and weight.packed is not None
        at = weight.packed.data.data_ptr()
        assert any(int(low, 16) <= at < int(high, 16) for low, high in ranges)


def test_saving_takes_the_weights_from_the_file(in_memory: keye.Keye, on_disk: keye.Keye) -> None:
    ours, theirs = on_disk.model.state_dict(), in_memory.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    keye.load("nano", quant="int4", experts="disk", experts_folder=tmp_path)
    (file,) = tmp_path.glob("*.bin")
    with file.open("r+b") as opened:
        opened.truncate(1 << 20)
    with pytest.raises(KeyeError, match="is damaged: remove both"):
        keye.load("nano", quant="int4", experts="disk", experts_folder=tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}'])
def test_a_damaged_description_is_one_sentence(folder: Path, on_disk: keye.Keye, tmp_path: Path, text: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes() if file.suffix == ".bin" else text.encode())
    with pytest.raises(KeyeError, match="is damaged: remove"):
        keye.load("nano", quant="int4", experts="disk", experts_folder=tmp_path)


def test_a_place_that_is_no_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyeError, match="file cannot hold experts .*: name another folder"):
        keye.load("nano", quant="int4", experts="disk", experts_folder=tmp_path / "file")


def test_what_cannot_lie_on_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyeError, match="experts on disk need experts in int4 or int8"):
        keye.load("nano", experts="disk", experts_folder=tmp_path)
    with pytest.raises(KeyeError, match="choose memory or disk"):
        keye.load("nano", experts="gpu")  # type: ignore[arg-type]
    with pytest.raises(KeyeError, match="set experts to disk as well"):
        keye.load("nano", experts_folder=tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(KeyeError, match="free some, or name another folder"):
        keye.load("nano", quant="int4", experts="disk", experts_folder=tmp_path)
    assert not list(tmp_path.iterdir())
