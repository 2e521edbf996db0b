"""Requests to the server as it stands behind its guard: settings of media, thinking, mistakes, clients that leave."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

import keye
from keye.server.app import guarded_app
from keye.server.edge.audit import Audit
from keye.server.settings import Settings
from tests.support.clips import write_with_sound
from tests.support.serving import Ask, Running, error_of, read_events

HELLO = [{"role": "user", "content": "hello"}]


def medium(file_id: str, **settings: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": file_id, **settings}}


def test_settings_of_media_are_honoured_and_echoed(ask: Ask, file_id: str) -> None:
    inside = medium(file_id, max_frames=4)
    nearby = {"type": "video_url", "video_url": {"url": file_id}, "preprocess_kwargs": {"nframes": 2}}
    first, second = ask([inside, nearby, {"type": "text", "text": "?"}])["usage"]["media"]
    assert (first["frames"], first["options"]) == (4, {"max_frames": 4})
    assert (second["frames"], second["options"]) == (2, {"nframes": 2})


def test_a_plan_costs_what_the_request_costs(http: TestClient, ask: Ask, file_id: str) -> None:
    content = [medium(file_id, max_frames=4), {"type": "text", "text": "hello"}]
    plan = http.post("/v1/media/plan", json={"content": content}).json()
    usage = ask(content)["usage"]
    assert plan["fits"] and plan["prompt_tokens"] == usage["prompt_tokens"]
    assert plan["visual_tokens"] == usage["prompt_tokens_details"]["media_tokens"]


def test_notes_about_a_file_reach_plans_answers_and_live_sessions(http: TestClient, ask: Ask, tmp_path: Path) -> None:
    path = write_with_sound(tmp_path / "late.mp4", video_start=1.5)
    file = http.post("/v1/files", files={"file": (path.name, path.read_bytes())}, data={"purpose": "media"}).json()
    sentence = "its first frame is shown at 1.5 s; all times count from the start of the file, as players do"
    assert file["keye"]["notes"] == [sentence] and file["keye"]["start_offset"] == 1.5
    content = [medium(file["id"], max_frames=4, video_end=60), {"type": "text", "text": "hello"}]
    plan = http.post("/v1/media/plan", json={"content": content}).json()
    assert plan["media"][0]["timestamps"][0] == plan["media"][0]["start_offset"] == 1.5
    beyond = '"video_end": 60 lies after the end of late.mp4 at 5.5 s; the part ends there'
    assert plan["keye"]["notes"] == [beyond, f"late.mp4: {sentence}"]
    assert ask(content)["keye"]["notes"] == plan["keye"]["notes"]
    session = http.post("/v1/live", json={}).json()["id"]
    added = http.post(f"/v1/live/{session}/frames", json={"file_id": file["id"]}).json()
    assert added["keye"]["notes"] == [f"late.mp4: {sentence}"]
    http.delete(f"/v1/live/{session}")


def test_ground_and_clips(http: TestClient, file_id: str) -> None:
    result = http.post("/v1/video/ground", json={"video": medium(file_id), "event": "the red circle", "max_tokens": 2})
    assert result.status_code == 200 and isinstance(result.json()["intervals"], list)
    coverage = result.json()["keye"]["coverage"]
    assert coverage["duration"] == 4.0 and coverage["unseen"] == [] and coverage["frames"] == 8
    item = http.post("/v1/clips", json={"file_id": file_id, "intervals": [[0, 1]]})
    assert (item.headers["content-type"], item.content[4:8]) == ("video/mp4", b"ftyp")
    two = http.post("/v1/clips", json={"file_id": file_id, "intervals": [[0, 1], [2, 3]]})
    assert (two.headers["content-type"], two.content[:2]) == ("application/zip", b"PK")
    requested = {"file_id": file_id, "intervals": [[0, 1]], "preprocess_kwargs": {"track": 2}}
    assert "has no video track 2; give track one of 1: " in error_of(http.post("/v1/clips", json=requested))["message"]


def test_what_the_model_does_not_know_is_noted_with_a_code(http: TestClient, file_id: str) -> None:
    body = {"video": medium(file_id), "event": "the zebra", "max_tokens": 2}
    fields = http.post("/v1/video/ground", json=body).json()["keye"]
    (note,) = [note for note in fields["coded_notes"] if note["code"] == "scope"]
    assert "'zebra'" in note["text"] and note["place"] == "question" and note["text"] not in fields.get("notes", ())
    known = http.post("/v1/video/ground", json={**body, "event": "the red circle"}).json()["keye"]["coded_notes"]
    assert [note for note in known if note["code"] == "scope"] == []


def test_a_track_that_is_not_there(http: TestClient, file_id: str) -> None:
    rejected = http.post("/v1/media/plan", json={"content": [medium(file_id, track=2)]})
    assert "has no video track 2; give track one of 1: " in error_of(rejected)["message"]


def test_ground_as_a_stream_ends_with_the_whole(http: TestClient, file_id: str) -> None:
    requested = {"video": medium(file_id, max_frames=4), "event": "the red circle", "max_tokens": 8}
    complete = http.post("/v1/video/ground", json=requested).json()
    *chunks, last = read_events(http.post("/v1/video/ground", json={**requested, "stream": True}))
    phases = [chunk["keye"]["progress"]["phase"] for chunk in chunks if "keye" in chunk]
    assert phases[0] == "media" and phases[-1] == "prefill"
    assert "".join(chunk.get("delta", {}).get("content", "") for chunk in chunks) == complete["text"] == last["text"]
    assert last["intervals"] == complete["intervals"] and last["usage"]["media"] == complete["usage"]["media"]


def test_what_goes_wrong_in_a_stream_of_ground_is_its_last_event(http: TestClient, file_id: str) -> None:
    late = {"video": medium(file_id, video_start=1e6), "event": "the red circle", "stream": True}
    answer = http.post("/v1/video/ground", json=late)
    assert read_events(answer)[-1]["error"]["type"] == "invalid_request_error"


def test_progress_comes_before_the_answer(http: TestClient, file_id: str) -> None:
    body = {"messages": [{"role": "user", "content": [medium(file_id)]}], "max_tokens": 2, "stream": True}
    chunks = read_events(http.post("/v1/chat/completions", json={**body, "keye": {"progress": True, "evidence": True}}))
    assert "progress" in chunks[0]["keye"]
    assert chunks[-1]["choices"] == [] and set(chunks[-1]["keye"]["evidence"]) == {"reason", "steps", "media"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": HELLO, "temperature": -1}, "temperature"),
        ({"messages": HELLO, "n": 1000}, "n"),
        ({"messages": HELLO, "temprature": 1}, "temprature"),
        ({"messages": HELLO, "keye": {"nonsense": True}}, "keye.nonsense"),
        ({"messages": HELLO, "stream": True, "stream_options": {"includ_usage": 1}}, "stream_options.includ_usage"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "usr", "content": "hello"}]}, "messages[0].role"),
        ({"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": HELLO, "max_tokens": "many"}, "max_tokens"),
    ],
)
def test_mistakes_name_their_field(http: TestClient, body: dict[str, Any], param: str) -> None:
    assert error_of(http.post("/v1/chat/completions", json=body))["param"] == param


@pytest.mark.parametrize("url", ["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/x.mp4", "file-unknown"])
def test_nothing_else_is_opened(http: TestClient, url: str) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [medium(url)]}]})
    assert answer.status_code in (400, 404) and "root:" not in answer.text


def test_a_client_that_leaves_gives_everything_back(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is held after a few tokens until the server has noticed that the client is gone."""
    body = {"messages": HELLO, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    core, noticed = running.app.app.state.keye.model.core, threading.Event()
    write, before = core.writer.write, core.computed["reply"]

    def reserved(tasks: Any) -> Any:
        if any(len(choice.reply) >= 5 for task in tasks for choice in task.choices):
            noticed.wait(20)
        return write(tasks)

    monkeypatch.setattr(core.writer, "write", reserved)
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())
    for _ in range(2000):
        if core.is_idle() or any(task.aborted for task in list(core.tasks)):
            break
        httpx.get(f"{running.url}/health")
    noticed.set()
    for _ in range(2000):
        if core.is_idle():
            break
        httpx.get(f"{running.url}/health")
    assert core.is_idle() and core.computed["reply"] - before < 20


def test_small_routes(http: TestClient) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert "keye_prompt_tokens_total" in http.get("/metrics").text
    for path in ("/health", "/ping", "/v1/models", "/metrics"):
        answer = http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert http.post("/tokenize", json={"prompt": "hello"}).json()["count"] > 0
    assert http.get("/openapi.json").json()["info"]["title"] == "keye"
    assert error_of(http.get("/nothing"), 404)


def test_the_audit_log_counts_tokens_and_tells_no_words(model: keye.Keye) -> None:
    lines: list[str] = []
    with TestClient(guarded_app(model, Settings(), Audit(lines.append)), base_url="http://127.0.0.1") as client:
        for stream in (False, True):
            body = {"messages": HELLO, "max_tokens": 3, "ignore_eos": True, "stream": stream}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
        assert client.head("/").status_code == 200
    records = [json.loads(line) for line in lines]
    assert [(item["completion_tokens"], item["prompt_tokens"] > 3) for item in records[:2]] == [(3, True)] * 2
    assert not any("hello" in line.lower() for line in lines)
