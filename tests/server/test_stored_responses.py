"""Responses that are kept: followed, read, deleted; by one key alone, bounded, and for a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import keye
from keye.server.app import guarded_app
from keye.server.edge.errors import ApiError
from keye.server.settings import Settings
from keye.server.stores import FileStore, ResponseStore, StoredResponse, new_response_id
from tests.support.serving import error_of

ALICE, BOB = "key-of-alice-0123456789", "key-of-bob-0123456789"


def respond(http: TestClient, options: Any = "hello", **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/responses", json={"input": options, "max_output_tokens": 4, **fields})
    assert answer.status_code == 200, answer.text
    matches: dict[str, Any] = answer.json()
    return matches


def test_a_stored_response_is_read_and_deleted(http: TestClient) -> None:
    created = respond(http, metadata={"a": "b"})
    path = f"/v1/responses/{created['id']}"
    assert created["store"] is True and created["metadata"] == {"a": "b"}
    assert http.get(path).json() == created
    assert http.delete(path).json() == {"id": created["id"], "object": "response", "deleted": True}
    for answer in (http.get(path), http.delete(path), http.get(f"{path}/input_items")):
        assert error_of(answer, 404)["code"] == "not_found"
    error = error_of(http.post("/v1/responses", json={"input": "x", "previous_response_id": created["id"]}), 404)
    assert error["param"] == "previous_response_id" and error["message"].count(". ") == 0


def test_a_response_that_follows_has_the_whole_conversation(http: TestClient) -> None:
    first = respond(http, "hello", instructions="Be brief.")
    second = respond(http, "and then?", previous_response_id=first["id"])
    reply = first["output"][-1]["content"][0]["text"]
    complete = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": reply},
             {"role": "user", "content": "and then?"}]  # fmt: skip
    assert second["usage"]["input_tokens"] == respond(http, complete)["usage"]["input_tokens"]
    assert second["previous_response_id"] == first["id"]
    third = respond(http, "more", previous_response_id=second["id"])
    assert third["usage"]["input_tokens"] > second["usage"]["input_tokens"]
    items = http.get(f"/v1/responses/{third['id']}/input_items").json()
    assert [item["content"][0]["text"] for item in items["data"]] == ["more"] and items["has_more"] is False


def test_a_stream_is_stored_by_its_last_event(http: TestClient) -> None:
    body = {"input": "hello", "max_output_tokens": 4, "stream": True}
    text = http.post("/v1/responses", json=body).text
    name = text.partition('"id":"')[2].partition('"')[0]
    assert http.get(f"/v1/responses/{name}").json()["status"] in ("completed", "incomplete")
    assert respond(http, "x", previous_response_id=name)["previous_response_id"] == name


def test_what_is_not_to_be_stored_is_not(http: TestClient) -> None:
    created = respond(http, store=False)
    assert created["store"] is False
    error_of(http.get(f"/v1/responses/{created['id']}"), 404)


def test_items_are_listed_in_pages(http: TestClient) -> None:
    options = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    path = f"/v1/responses/{respond(http, options)['id']}/input_items"
    complete = http.get(path, params={"order": "asc"}).json()
    assert [item["content"][0]["text"] for item in complete["data"]] == ["a", "b", "c"]
    page = http.get(path, params={"order": "asc", "limit": 1, "after": complete["first_id"]}).json()
    assert page["data"] == complete["data"][1:2] and page["has_more"] is True
    assert http.get(path).json()["data"] == complete["data"][::-1]
    error_of(http.get(path, params={"after": "nothing"}), 404)
    error_of(http.get(path, params={"limit": 0}), 400)


def test_a_tool_is_called_over_stored_responses(http: TestClient) -> None:
    schema = {"type": "object", "properties": {"where": {"enum": ["left", "right"]}}, "required": ["where"],
              "additionalProperties": False}  # fmt: skip
    tool = {"type": "function", "name": "look", "parameters": schema}
    first = respond(http, tools=[tool], tool_choice="required", parallel_tool_calls=False,
                    max_output_tokens=400)  # fmt: skip
    call = first["output"][-1]
    result = [{"type": "function_call_output", "call_id": call["call_id"], "output": "a cat"}]
    assert respond(http, result, previous_response_id=first["id"], tools=[tool])["output"]


@pytest.fixture(scope="module")
def shared(model: keye.Keye) -> Iterator[TestClient]:
    settings = Settings(keys={"alice": ALICE, "bob": BOB})
    with TestClient(guarded_app(model, settings), base_url="http://127.0.0.1") as client:
        yield client


def test_another_key_never_sees_them(shared: TestClient) -> None:
    def headers(key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"}

    body = {"input": "secret", "max_output_tokens": 2}
    created = shared.post("/v1/responses", json=body, headers=headers(ALICE)).json()
    path = f"/v1/responses/{created['id']}"
    for answer in (
        shared.get(path, headers=headers(BOB)),
        shared.delete(path, headers=headers(BOB)),
        shared.get(f"{path}/input_items", headers=headers(BOB)),
        shared.post("/v1/responses", json={**body, "previous_response_id": created["id"]}, headers=headers(BOB)),
    ):
        error_of(answer, 404)
    assert shared.get(path, headers=headers(ALICE)).json() == created


def stored(previous: str | None = None, text: str = "x") -> StoredResponse:
    response = {
        "id": new_response_id(),
        "previous_response_id": previous,
        "output": [{"type": "message", "text": text}],
    }
    return StoredResponse(response, [{"type": "message", "id": "msg_1", "role": "user", "content": text}])


@pytest.fixture
def files() -> Iterator[FileStore]:
    store = FileStore(Settings(stored_bytes=1_000_000))
    yield store
    store.close()


def names(folder: Path) -> int:
    return len(list(folder.iterdir()))


def test_the_oldest_responses_make_room(files: FileStore) -> None:
    store = ResponseStore(files, 3600, most_bytes=20_000)
    created = [stored(text=str(number)) for number in range(6)]
    assert all(store.keep("alice", entry) for entry in created) and store.keep("bob", stored())
    for old in created[:2]:
        with pytest.raises(ApiError, match="no response has this id"):
            store.get("alice", old.response["id"])
    assert [store.get("alice", entry.response["id"]).items for entry in created[2:]] == [
        entry.items for entry in created[2:]
    ]
    assert names(files.folder) == 5
    assert not store.keep("alice", stored(text="x" * 30_000))
    assert names(files.folder) == 5


def test_responses_count_as_storage_of_their_key(files: FileStore) -> None:
    store = ResponseStore(files, 3600, most_bytes=800_000)
    big = stored(text="x" * 300_000)
    assert store.keep("alice", big)
    path = files.begin("alice")
    with pytest.raises(ApiError, match="no room is left"):
        files.grow(path, 600_000)
    store.delete("alice", big.response["id"])
    files.grow(path, 600_000)
    assert not store.keep("alice", stored(text="x" * 300_000))


def test_responses_go_after_their_time(files: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResponseStore(files, 3600)
    entry = stored()
    store.keep("alice", entry)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    with pytest.raises(ApiError, match="too old"):
        store.get("alice", entry.response["id"])
    store.keep("bob", stored())
    monkeypatch.setattr(time, "time", lambda: now + 9000)
    store.sweep()
    assert names(files.folder) == 0


def test_a_conversation_whose_beginning_is_gone_cannot_go_on(files: FileStore) -> None:
    store = ResponseStore(files, 3600)
    first = stored()
    second = stored(first.response["id"])
    store.keep("alice", first)
    store.keep("alice", second)
    assert len(store.history("alice", second.response["id"], 4)) == 4
    with pytest.raises(ApiError, match="more than 3 items"):
        store.history("alice", second.response["id"], 3)
    store.delete("alice", first.response["id"])
    with pytest.raises(ApiError, match="previous_response_id"):
        store.history("alice", second.response["id"], 4)
