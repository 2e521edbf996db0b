"""/v1/video/find: events while a search works, its end in every way, turns and limits of owners, shared indexes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

import keye
from keye.errors import KeyeError
from keye.moments import Coverage, FindEvent, FindProgress, FindResult, Moment, MomentsFound
from keye.server import searches
from keye.server.app import guarded_app
from keye.server.settings import Settings
from tests.support.serving import Running, error_of, read_events

MOMENT = Moment("a", 1, 3.0, 8.5, 0.97, "twice")
KEYS = {"ann": "a-key-of-ann-0123456789", "bob": "a-key-of-bob-0123456789"}


class Double:
    """A search that goes from step to step as a test lets it, in place of `Keye.stream_find`. It writes an index."""

    def __init__(self, **options: Any) -> None:
        self.options, self.stopped = options, threading.Event()
        self.go_on, self.begun, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.error: Exception | None = None

    def stop(self) -> None:
        self.stopped.set()
        self.go_on.set()

    def __iter__(self) -> Iterator[FindEvent]:
        try:
            self.begun.set()
            path: Path = self.options["index"]
            path.write_bytes(path.read_bytes() + b"x" * 1000 if path.exists() else b"x" * 1000)
            yield FindProgress("index", 10.0, 60.0, "s", 5.0)
            yield MomentsFound((MOMENT,))
            assert self.go_on.wait(30)
            if self.error is not None:
                raise self.error
            coverage = Coverage(60.0, (), ((10.0, 60.0),), 1, 8, 100, 10)
            yield FindResult(
                self.options["event"], "a.mp4", "tiny", (MOMENT,), (), 0.97, 0.5, coverage, (), {"index": 0.1},
                stopped=self.stopped.is_set(),
            )  # fmt: skip
        finally:
            self.ended.set()


class Doubles(list[Double]):
    """All searches that were begun."""

    waits = True

    def begin(self, source: Any, event: str, **options: Any) -> Double:
        double = Double(source=source, event=event, **options)
        if not self.waits:
            double.go_on.set()
        self.append(double)
        return double


@pytest.fixture
def doubles(model: keye.Keye, monkeypatch: pytest.MonkeyPatch) -> Iterator[Doubles]:
    created = Doubles()
    monkeypatch.setattr(model, "stream_find", created.begin, raising=False)
    yield created
    for double in created:
        double.stop()


@pytest.fixture(scope="module")
def served(model: keye.Keye) -> Iterator[Running]:
    """A server of its own for two keys: searches hold places of owners."""
    server = Running(model, Settings(keys=KEYS))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def files(served: Running, video: Path) -> dict[str, str]:
    """The id of the video, uploaded by each."""
    form: dict[str, Any] = {"files": {"file": ("a.mp4", video.read_bytes())}, "data": {"purpose": "media"}}
    return {owner: str(send(served, owner, "/v1/files", **form).json()["id"]) for owner in KEYS}


@pytest.fixture
def quick_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events repeat at once, not after two seconds."""
    monkeypatch.setattr(searches, "BEAT_SECONDS", 0.05)


def send(served: Running, owner: str, path: str, body: Any = None, **more: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEYS[owner]}"}
    return httpx.post(f"{served.url}{path}", json=body, headers=headers, timeout=30, **more)


class Reading:
    """A stream of /v1/video/find that is read event by event."""

    def __init__(self, served: Running, owner: str, body: dict[str, Any]) -> None:
        headers = {"Authorization": f"Bearer {KEYS[owner]}"}
        self._client = httpx.Client(timeout=30, headers=headers)
        request = self._client.build_request("POST", f"{served.url}/v1/video/find", json={**body, "stream": True})
        self.answer = self._client.send(request, stream=True)
        assert self.answer.status_code == 200, self.answer.read()
        self._lines = self.answer.iter_lines()

    def next(self, wanted: str | Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The next event of a type; those before it are passed over."""
        for line in self._lines:
            if line.startswith("data: {"):
                event: dict[str, Any] = json.loads(line.removeprefix("data: "))
                if event.get("type", "error") == wanted:
                    return event
        raise AssertionError(f"the stream ended without {wanted}")

    def close(self) -> None:
        self.answer.close()
        self._client.close()


def body_of(file_id: str, **more: Any) -> dict[str, Any]:
    return {"video": {"file_id": file_id}, "event": "the red circle", "subtitles": "none", **more}


def test_a_stream_ends_with_the_result(http: TestClient, file_id: str, doubles: Doubles) -> None:
    doubles.waits = False
    events = read_events(http.post("/v1/video/find", json=body_of(file_id, stream=True, top=3, threshold=0.4)))
    assert [event["type"] for event in events] == ["started", "progress", "moments", "result"]
    assert events[1] == {"type": "progress", "stage": "index", "done": 10.0, "total": 60.0, "unit": "s",
                         "seconds_left": 5.0}  # fmt: skip
    assert events[2]["moments"][0]["checked"] == "twice"
    assert events[3]["id"] == events[0]["id"] and events[3]["result"]["coverage"]["unseen"] == [[10.0, 60.0]]
    (double,) = doubles
    assert (double.options["top"], double.options["threshold"], double.options["budget"]) == (3, 0.4, None)
    alone = http.post("/v1/video/find", json=body_of(file_id)).json()
    assert alone["object"] == "keye.find" and alone["result"]["moments"] == events[3]["result"]["moments"]


def test_a_video_is_searched_by_the_model(http: TestClient, file_id: str) -> None:
    """Random weights find nothing in particular; the second question reads no frame of the index again."""
    body = body_of(file_id, preprocess_kwargs={"track": 1})  # an index of its own: doubles write none that can be read
    events = read_events(http.post("/v1/video/find", json={**body, "stream": True}))
    result = events[-1]["result"]
    assert events[0]["type"] == "started" and events[-1]["type"] == "result" and result["query"] == "the red circle"
    assert result["coverage"]["unseen"] == [] and result["coverage"]["frames"] >= 4 and not result["stopped"]
    record = http.get(f"/v1/video/find/{events[0]['id']}/record")
    assert (
        record.headers["content-type"].startswith("text/html") and "attachment" in record.headers["content-disposition"]
    )
    assert "the red circle" in record.text and result["model"] in record.text and "http:" not in record.text
    again = http.post("/v1/video/find", json=body).json()["result"]
    assert again["seconds"]["index"] < result["seconds"]["index"] and again["moments"] == result["moments"]


def test_settings_and_subtitles_reach_the_search(http: TestClient, file_id: str, doubles: Doubles) -> None:
    doubles.waits = False
    text = "1\n00:01 --> 00:02\na red circle\n"
    more: dict[str, Any] = {"subtitles": {"text": text}, "preprocess_kwargs": {"deinterlace": False}}
    more |= {"scenes": False, "effort": "low"}
    result = http.post("/v1/video/find", json=body_of(file_id, budget=10**8, **more)).json()["result"]
    options = doubles[0].options
    assert [line.text for line in options["subtitles"].lines] == ["a red circle"]
    assert options["media_options"] == {"deinterlace": False} and not options["scenes"] and options["effort"] == "low"
    assert options["seconds"] == Settings().find_seconds
    assert options["budget"] == Settings().find_tokens and "budget is lowered" in result["notes"][0]["text"]
    http.post("/v1/video/find", json=body_of(file_id, subtitles="none"))
    assert doubles[1].options["subtitles"] == "none" and options["source"].untrusted


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"event": ""}, 400),
        ({"event": "x" * 10_001}, 400),
        ({"budget": 0}, 400),
        ({"top": 101}, 400),
        ({"threshold": 1.5}, 400),
        ({"effort": "heroic"}, 400),
        ({"subtitles": "some"}, 400),
        ({"nonsense": 1}, 400),
        ({"video": {"file_id": "file-none"}}, 404),
        ({"video": {"url": "/etc/passwd"}}, 400),
        ({"preprocess_kwargs": {"fps": -1}}, 400),
        ({"subtitles": {"text": "no subtitles"}}, 400),
    ],
)
def test_what_is_rejected(
    http: TestClient, file_id: str, doubles: Doubles, change: dict[str, Any], status: int
) -> None:
    error_of(http.post("/v1/video/find", json={**body_of(file_id), **change}), status)
    assert doubles == []


def test_an_error_ends_a_stream_as_an_event(served: Running, files: dict[str, str], doubles: Doubles) -> None:
    stream = Reading(served, "ann", body_of(files["ann"]))
    stream.next("moments")
    doubles[0].error = KeyeError("a.mp4 is damaged; download it again")
    doubles[0].go_on.set()
    assert stream.next("error")["error"]["message"] == "a.mp4 is damaged; download it again"
    stream.close()


@pytest.mark.usefixtures("quick_beat")
def test_progress_comes_again_while_nothing_new_does(served: Running, files: dict[str, str], doubles: Doubles) -> None:
    """The double says nothing after its first moments; the stream goes on."""
    stream = Reading(served, "ann", body_of(files["ann"]))
    stream.next("moments")
    assert stream.next("progress")["done"] == stream.next("progress")["done"] == 10.0
    stream.close()


def test_a_stopped_search_gives_what_it_has_and_only_to_its_owner(
    served: Running, files: dict[str, str], doubles: Doubles
) -> None:
    stream = Reading(served, "ann", body_of(files["ann"]))
    search = stream.next("started")["id"]
    stream.next("moments")
    error_of(send(served, "bob", f"/v1/video/find/{search}/stop"), 404)
    assert not doubles[0].stopped.is_set()
    assert send(served, "ann", f"/v1/video/find/{search}/stop").json()["stopping"] is True
    result = stream.next("result")["result"]
    assert result["stopped"] and result["moments"][0]["start"] == 3.0
    stream.close()
    error_of(send(served, "ann", f"/v1/video/find/{search}/stop"), 404)
    headers = [{"Authorization": f"Bearer {key}"} for key in KEYS.values()]
    records = [httpx.get(f"{served.url}/v1/video/find/{search}/record", headers=own, timeout=30) for own in headers]
    assert records[0].status_code == 200 and error_of(records[1], 404)


def test_a_search_ends_when_its_client_leaves(served: Running, files: dict[str, str], doubles: Doubles) -> None:
    stream = Reading(served, "ann", body_of(files["ann"]))
    stream.next("moments")
    stream.close()
    assert doubles[0].ended.wait(20) and doubles[0].stopped.is_set()
    assert doubles[0].options["index"].stat().st_size >= 1000, "the index stays for the next question"


@pytest.mark.usefixtures("quick_beat")
def test_an_owner_has_one_search_at_a_time_and_others_are_not_held_up(
    served: Running, files: dict[str, str], doubles: Doubles
) -> None:
    first = Reading(served, "ann", body_of(files["ann"]))
    first.next("moments")
    second = Reading(served, "ann", body_of(files["ann"]))
    second.next("waiting")
    others = Reading(served, "bob", body_of(files["bob"]))
    others.next("moments")
    assert len(doubles) == 2 and doubles[0].options["index"] != doubles[1].options["index"], "owners share no index"
    doubles[0].go_on.set()
    first.next("result")
    second.next("moments")
    assert doubles[2].options["index"] == doubles[0].options["index"], "questions about a video share its index"
    for stream in (first, second, others):
        stream.close()


def test_searches_of_one_owner_that_wait_are_few(
    served: Running, files: dict[str, str], doubles: Doubles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searches, "MOST_OPEN", 1)
    stream = Reading(served, "ann", body_of(files["ann"]))
    stream.next("moments")
    for streams in (False, True):
        answer = send(served, "ann", "/v1/video/find", body_of(files["ann"], stream=streams))
        assert error_of(answer, 429)["code"] == "too_many_running" and answer.headers["retry-after"]
    stream.close()


def test_a_waiting_search_that_is_stopped_ends_with_an_error(
    served: Running, files: dict[str, str], doubles: Doubles
) -> None:
    first, second = (Reading(served, "ann", body_of(files["ann"])) for _ in range(2))
    first.next("moments")
    send(served, "ann", f"/v1/video/find/{second.next('started')['id']}/stop")
    assert second.next("error")["error"]["code"] == "stopped" and len(doubles) == 1, "the first still runs"
    first.close()
    second.close()


def test_an_upload_takes_the_room_of_indexes(model: keye.Keye, video: Path, doubles: Doubles) -> None:
    doubles.waits = False
    size = video.stat().st_size
    settings = Settings(stored_bytes=2 * size + 500)
    with TestClient(guarded_app(model, settings), base_url="http://127.0.0.1") as client:
        form = {"files": {"file": ("a.mp4", video.read_bytes())}, "data": {"purpose": "media"}}
        file_id = client.post("/v1/files", **form).json()["id"]
        assert client.post("/v1/video/find", json=body_of(file_id)).status_code == 200
        assert doubles[0].options["index"].exists()
        assert client.post("/v1/files", **form).status_code == 200 and not doubles[0].options["index"].exists()
        error_of(client.post("/v1/files", **form), 429)


def test_indexes_count_as_storage_and_the_oldest_make_room(model: keye.Keye, video: Path, doubles: Doubles) -> None:
    """Of two indexes only one fits beside the upload; of one that is larger alone nothing stays."""
    doubles.waits = False
    size = video.stat().st_size
    settings = Settings(stored_bytes=size + 1500)
    with TestClient(guarded_app(model, settings), base_url="http://127.0.0.1") as client:
        form = {"files": {"file": ("a.mp4", video.read_bytes())}, "data": {"purpose": "media"}}
        file_id = client.post("/v1/files", **form).json()["id"]
        for scenes in (True, False):
            assert client.post("/v1/video/find", json=body_of(file_id, scenes=scenes)).status_code == 200
        assert [double.options["index"].exists() for double in doubles] == [False, True]
        answer = client.post("/v1/video/find", json=body_of(file_id, scenes=False))
        assert error_of(answer, 429)["code"] == "storage_full" and not doubles[1].options["index"].exists()
