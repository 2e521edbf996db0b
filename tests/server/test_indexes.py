"""/v1/indexes: made once from an upload, asked by id, refused and removed like files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.support.serving import error_of

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def index(http: TestClient, file_id: str) -> dict[str, Any]:
    answer = http.post("/v1/indexes", json={"file_id": file_id, "preprocess_kwargs": {"max_frames": 4}})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_index_takes_the_place_of_its_video(http: TestClient, ask: Ask, file_id: str, index: dict[str, Any]) -> None:
    assert (index["object"], index["keye"]["frames"]) == ("keye.index", 4)
    video = {"type": "video_url", "video_url": {"url": file_id, "max_frames": 4}}
    words = {"type": "text", "text": "what is seen?"}
    ours = ask([{"type": "video_url", "video_url": {"url": index["id"]}}, words])
    theirs = ask([video, words])
    assert ours["choices"][0]["message"] == theirs["choices"][0]["message"]
    assert ours["usage"]["prompt_tokens"] == theirs["usage"]["prompt_tokens"]
    assert ours["usage"]["prompt_tokens_details"]["cached_tokens"] >= index["keye"]["tokens"]
    requested = {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": index["id"]}}, words]}]}
    assert http.post("/v1/chat/completions", json={**requested, "max_tokens": 1}).status_code == 200


def test_a_plan_with_an_index_costs_what_the_request_costs(
    http: TestClient, ask: Ask, file_id: str, index: dict[str, Any]
) -> None:
    parts = [{"type": "video_url", "video_url": {"url": item}} for item in (index["id"], file_id)]
    content = [*parts, {"type": "text", "text": "what is seen?"}]
    plan = http.post("/v1/media/plan", json={"content": content}).json()
    usage = ask(content)["usage"]
    assert [item["frames"] for item in plan["media"]] == [item["frames"] for item in usage["media"]]
    assert plan["prompt_tokens"] == usage["prompt_tokens"]


def test_indexes_are_listed_apart_from_files_and_removed(http: TestClient, index: dict[str, Any]) -> None:
    assert index["id"] in [item["id"] for item in http.get("/v1/indexes").json()["data"]]
    assert index["id"] not in [item["id"] for item in http.get("/v1/files").json()["data"]]
    assert http.get(f"/v1/indexes/{index['id']}").json()["bytes"] == index["bytes"]
    assert http.delete(f"/v1/indexes/{index['id']}").json()["deleted"] is True
    error_of(http.get(f"/v1/indexes/{index['id']}"), 404)
    content = [{"type": "video_url", "video_url": {"url": index["id"]}}, {"type": "text", "text": "?"}]
    error_of(http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]}), 404)


def test_what_cannot_be_indexed(http: TestClient, file_id: str, index: dict[str, Any]) -> None:
    error_of(http.post("/v1/indexes", json={"file_id": "file-none"}), 404)
    assert "not a video" in error_of(http.post("/v1/indexes", json={"file_id": index["id"]}))["message"]
    error_of(http.post("/v1/indexes", json={"file_id": file_id, "preprocess_kwargs": {"fps": -1}}))
    error_of(http.post("/v1/indexes", json={"file_id": file_id, "nonsense": 1}))
    nearby = [{"type": "video_url", "video_url": {"url": index["id"], "max_frames": 2}}, {"type": "text", "text": "?"}]
    answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": nearby}]})
    assert "max_frames" in error_of(answer)["message"]
