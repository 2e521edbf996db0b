"""Checkpoints come from a hub on this machine: whole, checked, continued after a cut, and only files that hold data."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.file_download
import pytest

from keye import hub
from keye.errors import KeyeError
from keye.weights.gguf.folder import read_link
from tests.support.fake_hub import FakeHub, serve
from tests.support.gguf import write_model
from tests.support.tiny import tiny_folder

COMMIT = "a" * 40
SHARDS = {"model-1.safetensors": os.urandom(5000), "model-2.safetensors": os.urandom(3000)}
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
SMALL = {"config.json": b"{}", "tokenizer.json": b"[]", "merges.txt": b"x", "chat_template.jinja": b"y"}
OTHERS = {
    "modeling_keye.py": b"import os", "pytorch_model.bin": b"p", "extra.pt": b"p", "state.pkl": b"p", "README.md": b"m",
    "onnx/model.safetensors": b"p", "..json": b"{}", "old.safetensors": b"not in the index",
}  # fmt: skip


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with one model; cut connections are tried again at once, in small blocks."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 500)
    monkeypatch.setenv("HF_TOKEN", "secret")
    with serve(FakeHub(files={**SMALL, "model.safetensors.index.json": INDEX, **SHARDS, **OTHERS})) as running:
        yield running


def resolve(remote: FakeHub, cache: Path, name: str | None = None, **options: object) -> Path:
    offline = bool(options.pop("offline", False))
    return hub.resolve(name or remote.name, config=remote.config(cache, offline=offline), **options)  # type: ignore[arg-type]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_only_files_that_hold_data_are_fetched(remote: FakeHub, tmp_path: Path) -> None:
    folder = resolve(remote, tmp_path)
    assert names(folder) == {*SMALL, *SHARDS, "model.safetensors.index.json"}
    assert all((folder / name).read_bytes() == data for name, data in (SMALL | SHARDS).items())
    assert not [path for path in remote.requests if path.endswith((".py", ".bin", ".pt", ".pkl", ".md"))]


def test_without_weights_only_small_files_come(remote: FakeHub, tmp_path: Path) -> None:
    folder = resolve(remote, tmp_path, weights=False)
    assert names(folder) == {*SMALL, "model.safetensors.index.json"}
    assert resolve(remote, tmp_path) == folder
    assert names(folder) >= set(SHARDS)


def test_a_gguf_model_of_a_repository_is_chosen_by_its_type(remote: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "local"
    folder.mkdir()
    model, vision = (path.read_bytes() for path in write_model(tiny_folder(tmp_path / "tiny"), folder, kind="Q8_0"))
    remote.files = {
        "Keye-F16.gguf": model, "Keye-BF16.gguf": b"x" * 2000, "README.md": b"z",
        "mmproj-F16.gguf": vision, "mmproj-BF16.gguf": b"y" * 2000,
    }  # fmt: skip
    chosen = f"{remote.name}:f16"
    link = read_link(resolve(remote, tmp_path / "cache", chosen))
    assert link is not None
    assert [path.name for path in link if path is not None] == ["Keye-F16.gguf", "mmproj-F16.gguf"]
    assert not any("BF16" in request for request in map(str, remote.requests))
    remote.requests.clear()
    assert read_link(resolve(remote, tmp_path / "cache", chosen, offline=True)) == link
    assert remote.requests == []
    for name in (remote.name, f"{remote.name}:Q4_K_M"):
        with pytest.raises(KeyeError, match=r"holds Keye-BF16\.gguf, Keye-F16\.gguf: name one of them, as in some"):
            resolve(remote, tmp_path / "other", name)


def test_what_is_here_is_not_asked_for_again(remote: FakeHub, tmp_path: Path) -> None:
    folder = resolve(remote, tmp_path)
    remote.requests.clear()
    remote.revisions["main"] = "b" * 40
    assert resolve(remote, tmp_path) == resolve(remote, tmp_path, offline=True) == folder
    assert remote.requests == []


def test_published_names(remote: FakeHub, tmp_path: Path) -> None:
    remote.name = "Kwai-Keye/Keye-VL-1_5-8B"
    assert resolve(remote, tmp_path, "1.5") == resolve(remote, tmp_path, "1.5@main") == resolve(remote, tmp_path)


def test_revisions(remote: FakeHub, tmp_path: Path) -> None:
    remote.revisions["v1"] = "c" * 40
    assert resolve(remote, tmp_path).name == COMMIT
    remote.files["config.json"] = b'{"new": 1}'
    tagged = resolve(remote, tmp_path, revision="v1")
    assert (tagged.name, (tagged / "config.json").read_bytes()) == ("c" * 40, b'{"new": 1}')
    assert resolve(remote, tmp_path, f"{remote.name}@{'c' * 40}") == tagged
    assert (resolve(remote, tmp_path) / "config.json").read_bytes() == b"{}"


def test_a_cut_connection_is_continued(remote: FakeHub, tmp_path: Path) -> None:
    remote.cut_after["model-1.safetensors"] = [2000, 1500]
    folder = resolve(remote, tmp_path)
    assert (folder / "model-1.safetensors").read_bytes() == SHARDS["model-1.safetensors"]
    assert remote.ranges == ["model-1.safetensors bytes=2000-", "model-1.safetensors bytes=3500-"]


def test_another_run_goes_on_where_the_last_was_cut(remote: FakeHub, tmp_path: Path) -> None:
    remote.cut_after["model-1.safetensors"] = [2000, 0, 0, 0, 0, 0, 0]
    with pytest.raises(KeyeError, match="not complete on this machine and the hub cannot be reached"):
        resolve(remote, tmp_path)
    remote.ranges.clear()
    remote.cut_after.clear()
    seen: list[tuple[int, int]] = []
    folder = resolve(remote, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert remote.ranges == ["model-1.safetensors bytes=2000-"]
    assert (folder / "model-1.safetensors").read_bytes() == SHARDS["model-1.safetensors"]
    total = sum(map(len, [*SMALL.values(), INDEX, *SHARDS.values()]))
    assert seen[0] == (total - 6000, total) and seen[-1] == (total, total)
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_server_that_cannot_continue_starts_again(remote: FakeHub, tmp_path: Path) -> None:
    remote.cut_after["model-1.safetensors"] = [2000]
    remote.ignore_range = True
    seen: list[int] = []
    folder = resolve(remote, tmp_path, progress=lambda done, total: seen.append(total - done))
    assert (folder / "model-1.safetensors").read_bytes() == SHARDS["model-1.safetensors"]
    assert seen[-1] == 0


@pytest.mark.parametrize("name", ["config.json", "model-2.safetensors"])
def test_a_damaged_file_is_deleted(name: str, remote: FakeHub, tmp_path: Path) -> None:
    remote.corrupt.add(name)
    with pytest.raises(KeyeError, match=f"{name} of {remote.name} arrived damaged"):
        resolve(remote, tmp_path)
    assert not list(tmp_path.rglob("*.incomplete"))
    remote.corrupt.clear()
    resolve(remote, tmp_path)


def test_a_file_of_another_size_is_missing(remote: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = FakeHub.info

    def lying(self: FakeHub, commit: str) -> dict[str, object]:
        info = honest(self, commit)
        next(entry for entry in info["siblings"] if entry["rfilename"] == "merges.txt")["size"] = 900  # type: ignore[attr-defined]
        return info

    monkeypatch.setattr(FakeHub, "info", lying)
    with pytest.raises(KeyeError, match=r"could not be fetched \(Consistency check failed.* what is here is kept"):
        resolve(remote, tmp_path)


def test_the_token_goes_to_the_hub_alone(remote: FakeHub, tmp_path: Path) -> None:
    resolve(remote, tmp_path)
    assert f"/{remote.name}/resolve/{COMMIT}/model-1.safetensors" in remote.authorized
    assert not [path for path in remote.authorized if path.startswith("/storage/")]


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (401, "RepoNotFound", "is neither a folder here nor a model on the hub"),
        (404, "RepoNotFound", "is neither a folder here nor a model on the hub"),
        (403, "GatedRepo", "needs its terms accepted: do so on huggingface.co/some-one/their-model"),
        (401, "GatedRepo", "needs its terms accepted"),
        (403, "", "refuses access to some-one/their-model: run `hf auth login`"),
        (500, "", "answered with an error"),
    ],
)
def test_refusals_are_one_sentence(status: int, code: str, sentence: str, remote: FakeHub, tmp_path: Path) -> None:
    remote.status, remote.error_code = status, code
    with pytest.raises(KeyeError, match=re.escape(sentence)) as caught:
        resolve(remote, tmp_path)
    assert "\n" not in str(caught.value)


def test_files_may_be_gated_though_the_listing_is_not(remote: FakeHub, tmp_path: Path) -> None:
    resolve(remote, tmp_path, weights=False)
    remote.status, remote.error_code = 403, "GatedRepo"
    with pytest.raises(KeyeError, match="needs its terms accepted"):
        resolve(remote, tmp_path)


@pytest.mark.parametrize(
    ("revision", "sentence"),
    [("v9", "has no revision 'v9'"), ("../../x", "cannot be a revision"), ("a\nb", "cannot be a revision")],
)
def test_unknown_revisions(revision: str, sentence: str, remote: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(KeyeError, match=sentence):
        resolve(remote, tmp_path, revision=revision)
    with pytest.raises(KeyeError, match="names a revision already"):
        resolve(remote, tmp_path, f"{remote.name}@v1", revision="v2")


def test_repositories_without_a_checkpoint(remote: FakeHub, tmp_path: Path) -> None:
    remote.files = {"config.json": b"{}", "pytorch_model.bin": b"p"}
    with pytest.raises(KeyeError, match="holds no safetensors weights; keye opens no pickle"):
        resolve(remote, tmp_path)
    remote.files = {"model.safetensors": b"p"}
    with pytest.raises(KeyeError, match="holds no config.json"):
        resolve(remote, tmp_path)
    remote.files = {**SMALL, "model.safetensors.index.json": INDEX, "model-1.safetensors": b"p"}
    with pytest.raises(KeyeError, match="names model-2.safetensors, which the repository lacks"):
        resolve(remote, tmp_path)


def test_without_a_network(remote: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(KeyeError, match=r"hub is set offline \(HF_HUB_OFFLINE\)"):
        resolve(remote, tmp_path, offline=True)
    unreachable = replace(remote.config(tmp_path), endpoint="http://127.0.0.1:9")
    with pytest.raises(KeyeError, match="hub cannot be reached"):
        hub.resolve(remote.name, config=unreachable)
    assert remote.requests == []


def test_what_another_program_fetched_serves_offline(remote: FakeHub, tmp_path: Path) -> None:
    storage = tmp_path / "models--some-one--their-model"
    snapshot = storage / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (storage / "refs").mkdir()
    (storage / "refs/main").write_text(COMMIT)
    (snapshot / "config.json").write_text("{}")
    assert resolve(remote, tmp_path, weights=False, offline=True) == snapshot
    with pytest.raises(KeyeError, match="is not complete"):
        resolve(remote, tmp_path, offline=True)
    (snapshot / "model.safetensors").write_text("p")
    assert resolve(remote, tmp_path, offline=True) == snapshot


def test_a_full_disk_is_reported_before(remote: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keye.hub.download.shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(KeyeError, match="B left: free some space, or set HF_HOME"):
        resolve(remote, tmp_path)


def test_without_links_files_are_moved(remote: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder = resolve(remote, tmp_path)
    assert not any(path.is_symlink() for path in folder.iterdir()) and names(folder) >= set(SHARDS)
    remote.requests.clear()
    assert resolve(remote, tmp_path) == folder and remote.requests == []


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from keye.config import HubConfig, hub_config

    for name in ("HF_ENDPOINT", "HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    assert hub_config() == HubConfig(cache=Path("~/.cache/huggingface/hub").expanduser())
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror/")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_config() == HubConfig("http://mirror", tmp_path / "hub", offline=True)
