"""What a server gets, what it is asked again, and what its answers become."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")

from PIL import Image

from keye.batch import workers as batch_workers
from keye.batch.workers import Answer, Client, ProcessWorker, ServerWorker, WorkerLost, retry_wait, with_files
from keye.errors import KeyeError
from keye.files import BATCH_PREFIX, PrivateFolder

FINE = {"choices": [{"message": {"content": "yes"}}]}


def client(handler: Callable[[Any], Any], **options: Any) -> Client:
    http = httpx.AsyncClient(transport=httpx.MockTransport(handler), base_url="http://server")
    return Client(http, "http://server", **options)


def answers(*statuses: int) -> Callable[[Any], Any]:
    """A server that answers with these in turn, and wants no waiting."""
    left = list(statuses)

    def handle(request: Any) -> Any:
        status = left.pop(0)
        return httpx.Response(status, json=FINE if status == 200 else {"error": {}}, headers={"retry-after": "0"})

    return handle


def post(item: Client, body: dict[str, Any] | None = None) -> Answer:
    return asyncio.run(item.post(body or {"messages": []}))


def test_a_full_or_failing_server_is_asked_again() -> None:
    assert post(client(answers(429, 503, 500, 200), tries=4)) == Answer(200, FINE)
    assert post(client(answers(503, 503), tries=2)).status == 503
    assert post(client(answers(400, 200), tries=2)).status == 400


def test_a_server_that_is_gone() -> None:
    async def no_pause(seconds: float) -> None: ...

    requested: list[int] = []

    def refuse(request: Any) -> Any:
        requested.append(1)
        raise httpx.ConnectError("refused")

    def break_off(request: Any) -> Any:
        raise httpx.ReadError("reset")

    with pytest.raises(WorkerLost, match=r"http://server does not answer \(refused\)") as lost:
        post(client(refuse, tries=3, pause=no_pause))
    assert len(requested) == 3 and not lost.value.during
    with pytest.raises(WorkerLost) as lost:
        post(client(break_off))
    assert lost.value.during


def test_an_answer_that_is_not_json() -> None:
    answer = post(client(lambda request: httpx.Response(200, text="<html>")))
    assert answer.body["error"]["message"] == "the server answered 200 with something that is not a JSON object"


def test_an_answer_that_cannot_be_unpacked() -> None:
    headers = {"content-encoding": "gzip"}
    answer = post(client(lambda request: httpx.Response(200, stream=httpx.ByteStream(b"plain"), headers=headers)))
    assert answer.body["error"]["code"] == "bad_answer"


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"choices": ' + "1" * 5000 + "}", "7", "\ud800".encode("utf-8", "replace")]
)
def test_an_answer_that_cannot_be_read(text: Any) -> None:
    assert "error" in post(client(lambda request: httpx.Response(200, content=text))).body


def test_numbers_that_json_lacks_become_none() -> None:
    text = '{"choices": [{"message": {}, "logprobs": NaN}], "usage": {"prompt_tokens": -Infinity, "time": 1e999}}'
    body = post(client(lambda request: httpx.Response(200, content=text))).body
    assert body == {"choices": [{"message": {}, "logprobs": None}], "usage": {"prompt_tokens": None, "time": None}}


def test_a_server_that_hangs_is_lost_after_its_time() -> None:
    requested: list[int] = []

    async def hang(request: Any) -> Any:
        requested.append(1)
        await asyncio.Event().wait()

    with pytest.raises(WorkerLost, match=r"http://server gave no answer in 0\.01 s") as lost:
        post(client(hang, tries=5, seconds=0.01))
    assert lost.value.during and len(requested) == 1


@pytest.mark.parametrize("header", ["\xb2", "Wed, 21 Oct 2099 07:28:00 GMT", "-1", "1" * 5000, ""])
def test_retry_after_without_seconds_is_ignored(header: str) -> None:
    assert 0 < retry_wait(0, header) < 1


def test_files_travel_in_the_question_and_addresses_do_not(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    content = [
        {"type": "image", "image": str(tmp_path / "a.png"), "max_pixels": 4096},
        {"type": "video_url", "video_url": {"url": "https://example.org/a.mp4", "fps": 1}},
        {"type": "text", "text": "what?"},
    ]
    body = {"messages": [{"role": "user", "content": content}]}
    before = json.dumps(body)
    sent = with_files(body)["messages"][0]["content"]
    url = sent[0]["image_url"].pop("url")
    assert base64.b64decode(url.removeprefix("data:image/png;base64,")) == (tmp_path / "a.png").read_bytes()
    assert sent[0] == {"type": "image_url", "image_url": {"max_pixels": 4096}}
    assert sent[1:] == content[1:] and json.dumps(body) == before


def test_a_file_that_is_too_large_to_send(tmp_path: Path) -> None:
    path = tmp_path / "long.mp4"
    with path.open("wb") as file:
        file.truncate(batch_workers.INLINE_BYTES + 1)
    body = {"messages": [{"role": "user", "content": [{"type": "video", "video": str(path)}]}]}
    with pytest.raises(KeyeError, match="long.mp4 has 45 MiB, more than the 45 MiB that are sent"):
        with_files(body)


def started(handler: Callable[[Any], Any], **options: Any) -> ServerWorker:
    """A worker on a server that `handler` plays, started."""
    settings = {"model": None, "key": "secret", "slots": 2, "tries": 2, **options}
    worker = ServerWorker("http://server/v1/", **settings, transport=httpx.MockTransport(handler))
    asyncio.run(worker.start())
    return worker


def test_a_server_is_asked_for_its_model_with_the_key() -> None:
    def handle(request: Any) -> Any:
        assert (request.url.path, request.headers["authorization"]) == ("/v1/models", "Bearer secret")
        return httpx.Response(200, json={"data": [{"id": "keye"}]})

    assert started(handle).model == "keye"
    assert started(handle, model="mine").model == "mine"


@pytest.mark.parametrize("tries", [2, 3])
def test_a_server_that_is_slow_to_list_its_models_is_asked_again(tries: int) -> None:
    errors = [TimeoutError(), httpx.DecodingError("not gzip")]
    pauses: list[float] = []

    def handle(request: Any) -> Any:
        if errors:
            raise errors.pop(0)
        return httpx.Response(200, json={"data": [{"id": "keye"}]})

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    server = client(handle, tries=tries, pause=pause)
    if tries == 3:
        assert asyncio.run(server.first_model()) == "keye"
    else:
        with pytest.raises(WorkerLost, match=r"http://server cannot be reached \(not gzip\): check --server"):
            asyncio.run(server.first_model())
    assert not errors and len(pauses) == tries - 1


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (401, {}, "wants another key: set KEYE_API_KEY"),
        (200, {"data": []}, "lists no models at /v1/models"),
        (200, {"data": {"a": 1}}, "lists no models at /v1/models"),
        (200, {"data": ["keye"]}, "lists no models at /v1/models"),
        (404, {}, "lists no models at /v1/models"),
    ],
)
def test_a_server_that_cannot_be_used(status: int, body: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KeyeError, match=sentence):
        started(lambda request: httpx.Response(status, json=body))


def test_an_address_that_is_none() -> None:
    with pytest.raises(KeyeError, match="'localhost:8000' is not the address of a server"):
        ServerWorker("localhost:8000", model=None, key=None, slots=1, tries=1)


def test_folders_of_killed_batches_go_when_the_next_one_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    killed = PrivateFolder(BATCH_PREFIX)
    (killed.path / "rest").write_text("x")
    killed._lock.close()  # what the end of its process does
    worker = ProcessWorker((), {}, slots=1, name="engine")
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("keye-batch-") and folder != killed.path.parent
    asyncio.run(worker.close())
    assert list(tmp_path.iterdir()) == []
