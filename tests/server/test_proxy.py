"""What the server in front sends where, with replicas that are functions."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

pytest.importorskip("fastapi")

from starlette.testclient import TestClient

from keye.server.replicas.processes import LOST_SECONDS, ReplicaLost, Reply, Watch
from keye.server.replicas.proxy import Proxy, proxy_app

NUMBERS = itertools.count(1)


class Fake:
    """A server with uploads of owners. It notes what it is asked; `broken` ends it before it answers."""

    def __init__(self, name: str) -> None:
        self.name, self.is_ready, self.broken = name, False, False
        self.cut_off, self.kind = False, "application/json"
        self.killed = 0
        self.received: list[tuple[str, str, Any]] = []
        self.files: dict[str, tuple[str | None, bytes]] = {}

    async def start(self) -> None:
        self.is_ready = True

    async def wait_ended(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        self.is_ready = False

    async def kill(self) -> None:
        self.killed += 1
        self.is_ready = False

    async def send(
        self, method: str, path: str, headers: Mapping[str, str], content: bytes | AsyncIterator[bytes]
    ) -> Reply:
        if self.broken:
            raise ReplicaLost(self.name)
        body = content if isinstance(content, bytes) else b"".join([piece async for piece in content])
        self.received.append((method, path, body))
        status, answer = self.answer(method, path, headers.get("authorization"), body)

        async def pieces() -> AsyncIterator[bytes]:
            yield answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            if self.cut_off and path != "/health":
                raise ReplicaLost(self.name)

        async def close() -> None: ...

        return Reply(status, {"content-type": self.kind}, pieces(), close)

    def answer(self, method: str, path: str, owner: str | None, body: bytes) -> tuple[int, Any]:
        if (method, path) == ("POST", "/v1/files"):
            name = f"file-{next(NUMBERS):032x}"
            self.files[name] = (owner, body)
            return 200, {"id": name, "created_at": 1}
        named = [part for part in path.split("/") if part.startswith("file-")]
        if named:
            if self.files.get(named[0], (None, b""))[0] != owner or named[0] not in self.files:
                return 404, {"error": {"message": "no file"}}
            if method == "DELETE":
                del self.files[named[0]]
            return 200, self.files.get(named[0], (owner, b""))[1]
        if (method, path) == ("POST", "/v1/responses"):
            return 200, {"id": f"resp_{next(NUMBERS):032x}", "at": self.name}
        if path == "/v1/video/find":
            return 200, {"type": "started", "id": f"find-{next(NUMBERS):032x}"}
        if path == "/v1/files":
            return 200, {
                "data": [{"id": name, "created_at": 1} for name, (who, _) in self.files.items() if who == owner]
            }
        return 200, {"at": self.name}


@pytest.fixture
def fakes() -> list[Fake]:
    return [Fake("a"), Fake("b"), Fake("c")]


@pytest.fixture
def http(fakes: list[Fake]) -> Any:
    with TestClient(proxy_app(fakes)) as client:  # type: ignore[arg-type]
        yield client


def upload(http: Any, key: str = "one") -> str:
    return str(http.post("/v1/files", content=b"bytes", headers={"authorization": key}).json()["id"])


def ask(http: Any, *media: str, key: str = "one") -> Any:
    parts = [{"type": "input_video", "file_id" if item.startswith("file-") else "url": item} for item in media]
    return http.post("/v1/chat/completions", json={"messages": [{"content": parts}]}, headers={"authorization": key})


def test_questions_about_one_address_go_to_one_replica(http: Any) -> None:
    requested = {url: {ask(http, url).json()["at"] for _ in range(3)} for url in (f"https://e/{n}" for n in range(30))}
    assert all(len(at) == 1 for at in requested.values())
    assert set.union(*requested.values()) == {"a", "b", "c"}


def test_uploads_are_spread_and_asked_where_they_lie(http: Any, fakes: list[Fake]) -> None:
    ids = [upload(http) for _ in range(3)]
    assert [len(fake.files) for fake in fakes] == [1, 1, 1]
    for item in ids:
        (home,) = [fake.name for fake in fakes if item in fake.files]
        assert ask(http, item).json()["at"] == home


def test_files_of_two_replicas_are_brought_together_once(http: Any, fakes: list[Fake]) -> None:
    first, second = upload(http), upload(http)
    for _ in range(2):
        assert ask(http, first, second).json() == {"at": "a"}
    assert [len(fake.files) for fake in fakes] == [2, 1, 0]
    sent = json.loads(fakes[0].received[-1][2])["messages"][0]["content"]
    assert sent[0]["file_id"] == first and sent[1]["file_id"] in fakes[0].files
    listed = http.get("/v1/files", headers={"authorization": "one"}).json()["data"]
    assert sorted(item["id"] for item in listed) == sorted([first, second])
    assert http.delete(f"/v1/files/{second}", headers={"authorization": "one"}).status_code == 200
    assert [len(fake.files) for fake in fakes] == [1, 0, 0]


def test_a_response_is_followed_and_read_where_it_was_stored(http: Any, fakes: list[Fake]) -> None:
    for fake in fakes:
        for other in fakes:
            other.is_ready = other is fake  # so that each makes one
        created = http.post("/v1/responses", json={"input": "x"}).json()
        assert created["at"] == fake.name
        for other in fakes:
            other.is_ready = True
        body = {"input": "y", "previous_response_id": created["id"]}
        assert {http.post("/v1/responses", json=body).json()["at"] for _ in range(3)} == {fake.name}
        assert http.get(f"/v1/responses/{created['id']}").json() == {"at": fake.name}


def test_a_search_is_stopped_where_it_runs(http: Any, fakes: list[Fake]) -> None:
    for fake in fakes:
        for other in fakes:
            other.is_ready = other is fake
        search = http.post("/v1/video/find", json={"video": {"url": "https://e/1"}}).json()["id"]
        for other in fakes:
            other.is_ready = True
        assert {http.post(f"/v1/video/find/{search}/stop", json={}).json()["at"] for _ in range(3)} == {fake.name}


def test_another_owner_gets_no_copy_and_spoils_none(http: Any, fakes: list[Fake]) -> None:
    first, second = upload(http), upload(http)
    ask(http, first, second, key="other")
    assert json.loads(fakes[0].received[-1][2])["messages"][0]["content"][1]["file_id"] == second  # its replica says no
    ask(http, first, second)
    assert len(fakes[0].files) == 2


def test_a_replica_that_ends_is_passed_over(http: Any, fakes: list[Fake]) -> None:
    fakes[0].broken = True
    assert {ask(http, f"https://e/{number}").json()["at"] for number in range(20)} == {"b", "c"}
    for fake in fakes:
        fake.broken = True
    answer = ask(http, "https://e/1")
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    for fake in fakes:
        fake.is_ready = False
    assert ask(http, "https://e/1").json()["error"]["code"] == "no_replica"
    assert http.get("/health").status_code == 503


def test_load_is_released(http: Any, fakes: list[Fake]) -> None:
    proxy = http.app.state.proxy
    assert isinstance(proxy, Proxy)
    upload(http)
    ask(http, "https://e/1")
    http.get("/v1/models")
    http.get("/v1/files")
    fakes[1].broken = True
    ask(http, "https://e/2")
    assert set(proxy.loads.values()) == {0}


def test_indexes_of_two_replicas_cannot_be_asked_together(http: Any) -> None:
    proxy = http.app.state.proxy
    ids = [f"index-{number:032x}" for number in (1, 2)]
    proxy.homes |= dict(zip(ids, "ab", strict=True))
    body = {"messages": [{"content": [{"type": "video", "file_id": item} for item in ids]}]}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and "are at different replicas" in answer.json()["error"]["message"]


def test_an_answer_that_is_cut_off_is_asked_of_another(http: Any, fakes: list[Fake]) -> None:
    fakes[0].cut_off = True
    assert {ask(http, f"https://e/{n}").json()["at"] for n in range(9)} == {"b", "c"}
    for fake in fakes:
        fake.cut_off = True
    answer = ask(http, "https://e/1")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_lost")


@pytest.mark.parametrize(
    ("path", "last"),
    [
        ("/v1/chat/completions", ["data: {", "data: [DONE]"]),
        ("/v1/messages", ["event: error", "data: {"]),
        ("/v1/responses", ["event: error", "data: {"]),
    ],
)
def test_a_stream_that_is_cut_off_ends_with_an_error(http: Any, fakes: list[Fake], path: str, last: list[str]) -> None:
    for fake in fakes:
        fake.cut_off, fake.kind = True, "text/event-stream"
    answer = http.post(path, json={"stream": True})
    lines = [line for line in answer.text.splitlines() if line]
    result = [line[:7] if line.startswith("data: {") else line for line in lines[-2:]]
    assert (answer.status_code, result) == (200, last)
    body = json.loads(next(line for line in reversed(lines) if "replica_lost" in line)[6:])
    assert body["type"] == "error" if path != "/v1/chat/completions" else body["error"]["message"]


def test_silent_replicas_are_passed_over_and_ended() -> None:
    now = 0.0

    class Silent(Fake):
        async def send(self, *request: Any) -> Reply:
            nonlocal now
            now += 1.0
            return await super().send(*request)

    fake, watch, heard = Silent("a"), Watch(lambda: now), list[bool]()
    fake.is_ready = True

    async def look() -> None:
        task = asyncio.create_task(watch.watch(fake, pause=0))  # type: ignore[arg-type]
        for broken in (False, True):
            fake.broken = broken
            until = now + 3 if not broken else now + LOST_SECONDS + 5
            while now < until and fake.is_ready:
                await asyncio.sleep(0)
                heard.append(watch.is_silent(fake))  # type: ignore[arg-type]
        task.cancel()

    asyncio.run(look())
    assert heard[0] is False and True in heard
    assert fake.killed == 1


def test_what_a_silent_replica_keeps_is_said_to_be_there_and_the_others_answer(http: Any, fakes: list[Fake]) -> None:
    ids = [upload(http) for _ in range(3)]
    proxy = http.app.state.proxy
    proxy.watch.last_answers["a"] = float("-inf")
    assert http.get("/health").json()["replicas"] == {"a": False, "b": True, "c": True}
    assert {item["id"] for item in http.get("/v1/files", headers={"authorization": "one"}).json()["data"]} == set(
        ids[1:]
    )
    assert 'keye_replica_up{replica="a"} 0' in http.get("/metrics").text
    assert {ask(http).json()["at"] for _ in range(6)} <= {"b", "c"}
    answer = ask(http, ids[0])
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_silent")
