"""Adapters over HTTP: each is a model by its name, and then every other name is an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import keye
from keye import Keye, KeyeError
from keye.server.app import guarded_app
from keye.server.settings import Settings
from tests.support.adapters import random_pairs, write_adapter
from tests.support.serving import error_of, read_events

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "lm_head")


@pytest.fixture
def own(model: Keye) -> Keye:
    """The model of all tests, loaded again: adapters stay in the layers of the one that they are loaded onto."""
    assert model.runtime.folder is not None
    return keye.load(model.runtime.folder)


@pytest.fixture
def folder(own: Keye, tmp_path: Path) -> Path:
    for seed, name in enumerate(("captions", "counting")):
        write_adapter(tmp_path / name, random_pairs(own.model, LAYERS, seed=seed))
    return tmp_path


@pytest.fixture
def client(own: Keye, folder: Path) -> Iterator[TestClient]:
    with TestClient(guarded_app(own, Settings(adapter_folder=folder)), base_url="http://127.0.0.1") as client:
        yield client


def load(client: TestClient, name: str, path: str | None = None, **fields: Any) -> Any:
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path or name, **fields})


def complete(client: TestClient, model: str | None) -> Any:
    return client.post("/v1/completions", json={
        "model": model, "prompt": "hello", "max_tokens": 6, "temperature": 0, "ignore_eos": True, "logprobs": 0,
    })  # fmt: skip


def chat(client: TestClient, model: str | None, **fields: Any) -> Any:
    messages = [{"role": "user", "content": "hello"}]
    return client.post("/v1/chat/completions", json={"model": model, "messages": messages, "max_tokens": 4, **fields})


def test_requests_choose_adapters_as_models(client: TestClient) -> None:
    before = complete(client, "tiny").json()
    for name in ("captions", "counting"):
        assert load(client, name).text == f"Success: LoRA adapter '{name}' added successfully."
    answers = {name: complete(client, name).json() for name in ("tiny", "captions", "counting")}
    assert {name: answer["model"] for name, answer in answers.items()} == {name: name for name in answers}
    probs = [answer["choices"][0]["logprobs"]["token_logprobs"] for answer in answers.values()]
    assert probs[0] == before["choices"][0]["logprobs"]["token_logprobs"]
    assert probs[0] != probs[1] != probs[2] != probs[0]
    events = read_events(chat(client, "captions", stream=True))
    assert {event["model"] for event in events} == {"captions"}
    models = client.get("/v1/models").json()["data"]
    assert [(entry["id"], entry.get("parent")) for entry in models] == [
        ("tiny", None), ("captions", "tiny"), ("counting", "tiny"),
    ]  # fmt: skip
    assert client.get("/v1/models/captions").json()["id"] == "captions"


def test_with_an_adapter_an_unknown_model_is_an_error(client: TestClient) -> None:
    assert chat(client, "gpt-4o").status_code == 200
    load(client, "captions")
    for answer in (chat(client, "gpt-4o"), complete(client, "gpt-4o")):
        error = error_of(answer, 404)
        assert error["code"] == "model_not_found" and error["param"] == "model" and "captions" in error["message"]
    assert chat(client, "tiny").status_code == chat(client, None).status_code == 200
    unloaded = client.post("/v1/unload_lora_adapter", json={"lora_name": "captions"})
    assert unloaded.status_code == 200 and chat(client, "gpt-4o").status_code == 200
    assert chat(client, "captions").json()["model"] == "tiny"  # any name stands for a single model


def test_searches_reject_adapters(client: TestClient, video: Path) -> None:
    load(client, "captions")
    body = {"model": "captions", "video": {"file_id": upload(client, video)}, "event": "red"}
    error = error_of(client.post("/v1/video/find", json=body))
    assert "is an adapter" in error["message"] and error["param"] == "model"


def test_live_sessions_and_indexes_use_adapters(client: TestClient, video: Path) -> None:
    load(client, "captions")
    file_id = upload(client, video)
    session = client.post("/v1/live", json={"model": "captions"}).json()["id"]
    assert client.post(f"/v1/live/{session}/frames", json={"file_id": file_id}).json()["frames"] == 8
    answer = client.post(f"/v1/live/{session}/ask", json={"question": "what?", "max_tokens": 2})
    assert answer.json()["model"] == "captions"
    index = client.post("/v1/indexes", json={"file_id": file_id, "model": "captions"}).json()["id"]
    parts = [{"type": "file", "file": {"file_id": index}}, {"type": "text", "text": "what?"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 2}
    assert client.post("/v1/chat/completions", json={**body, "model": "captions"}).status_code == 200
    error = error_of(client.post("/v1/chat/completions", json={**body, "model": "tiny"}))
    assert "indexed with another adapter, but the question is asked without an adapter" in error["message"]


def upload(client: TestClient, video: Path) -> str:
    files = {"file": (video.name, video.read_bytes())}
    return client.post("/v1/files", files=files, data={"purpose": "media"}).json()["id"]


def test_an_adapter_is_replaced_in_place(client: TestClient) -> None:
    load(client, "captions")
    first = complete(client, "captions").json()["choices"][0]["logprobs"]
    assert "loaded already" in error_of(load(client, "captions", "counting"))["message"]
    assert load(client, "captions", "counting", load_inplace=True).status_code == 200
    assert complete(client, "captions").json()["choices"][0]["logprobs"] != first


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "missing", "captions/adapter_config.json", "a\0b", "a" * 300])
def test_clients_load_adapters_of_one_folder_only(client: TestClient, folder: Path, path: str) -> None:
    assert "not a folder of adapters" in error_of(load(client, "other", path))["message"]
    (folder / "link").symlink_to("/etc")
    assert "not a folder of adapters" in error_of(load(client, "other", "link"))["message"]


def test_mistakes_in_loading(client: TestClient, folder: Path) -> None:
    assert "name of the model itself" in error_of(load(client, "tiny", "captions"))["message"]
    error = error_of(client.post("/v1/unload_lora_adapter", json={"lora_name": "captions"}), 404)
    assert error["param"] == "lora_name"
    (folder / "captions" / "adapter_model.safetensors").unlink()
    assert "holds no adapter_model.safetensors" in error_of(load(client, "captions"))["message"]


def test_without_a_folder_clients_load_nothing(http: TestClient) -> None:
    for route, fields in (("load", {"lora_path": "a"}), ("unload", {})):
        answer = http.post(f"/v1/{route}_lora_adapter", json={"lora_name": "a", **fields})
        assert "--adapter-folder" in error_of(answer, 403)["message"]


def test_an_adapter_with_a_served_name_is_rejected_at_the_start(own: Keye, folder: Path) -> None:
    own.load_adapter(folder / "captions", "vl")
    with pytest.raises(KeyeError, match="name of the model itself"):
        guarded_app(own, Settings(served_names=("vl",)))
