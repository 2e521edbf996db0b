"""/v1/live: frames are added while questions are asked; sessions are their owner's, and end."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import pytest
from PIL import Image
from starlette.testclient import TestClient

from keye.server.context import MAX_SESSIONS, LiveSessions
from tests.support.serving import error_of, read_events


def picture(colour: str) -> str:
    out = io.BytesIO()
    Image.new("RGB", (56, 56), colour).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


@pytest.fixture
def session(http: TestClient) -> Iterator[str]:
    name = http.post("/v1/live", json={}).json()["id"]
    yield name
    http.delete(f"/v1/live/{name}")


def test_frames_and_questions_in_turn(http: TestClient, session: str, file_id: str) -> None:
    frames = {"frames": [picture("red"), picture("blue")], "timestamps": [0.0, 0.5]}
    read_events = http.post(f"/v1/live/{session}/frames", json=frames).json()
    assert (read_events["frames"], read_events["dropped"]) == (2, 0)
    answer = http.post(f"/v1/live/{session}/ask", json={"question": "what is seen?", "max_tokens": 2})
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] <= 2
    more = http.post(f"/v1/live/{session}/frames", json={"file_id": file_id, "offset": 1.0}).json()
    assert more["frames"] == 10 and more["tokens"] > read_events["tokens"]
    late = {"frames": [picture("red")], "timestamps": [0.1]}
    assert "ascend" in error_of(http.post(f"/v1/live/{session}/frames", json=late))["message"]


def test_an_answer_can_be_read_while_it_is_written(http: TestClient, session: str, file_id: str) -> None:
    http.post(f"/v1/live/{session}/frames", json={"file_id": file_id})
    requested = {"question": "what is seen?", "max_tokens": 30, "temperature": 2.0, "seed": 1}
    complete = http.post(f"/v1/live/{session}/ask", json=requested).json()
    *chunks, last = read_events(http.post(f"/v1/live/{session}/ask", json={**requested, "stream": True}))
    assert last["object"] == "keye.live.answer" and last["text"] == complete["text"]
    assert "".join(chunk.get("delta", {}).get("content", "") for chunk in chunks) == complete["text"] != ""


def test_mistakes(http: TestClient, session: str, file_id: str) -> None:
    error_of(http.post(f"/v1/live/{session}/frames", json={}))
    error_of(http.post(f"/v1/live/{session}/frames", json={"frames": [picture("red")], "file_id": file_id}))
    error_of(http.post(f"/v1/live/{session}/frames", json={"frames": ["/etc/passwd"], "timestamps": [0.0]}))
    error_of(http.post(f"/v1/live/{session}/ask", json={"question": "what?"}))
    error_of(http.post("/v1/live/live-none/ask", json={"question": "what?"}), 404)
    error_of(http.post("/v1/live", json={"preprocess_kwargs": {"nonsense": 1}}))


def test_sessions_are_counted_and_end(http: TestClient) -> None:
    opened = [http.post("/v1/live", json={}).json()["id"] for _ in range(MAX_SESSIONS)]
    answer = http.post("/v1/live", json={})
    assert "end one first" in error_of(answer, 429)["message"]
    for name in opened:
        assert http.delete(f"/v1/live/{name}").json()["deleted"]
    error_of(http.delete(f"/v1/live/{opened[0]}"), 404)


def test_an_unused_process_ends_by_itself(http: TestClient) -> None:
    store: LiveSessions = http.app.app.state.keye.live  # type: ignore[attr-defined]
    name = http.post("/v1/live", json={}).json()["id"]
    store.sweep(idle=0.0)
    error_of(http.delete(f"/v1/live/{name}"), 404)
