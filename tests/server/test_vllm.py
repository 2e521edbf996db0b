"""`keye serve --engine vllm`: vLLM as a child behind the guard, with a program that stands for it."""

from __future__ import annotations

import asyncio
import base64
import math
import os
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from keye.cli import main
from keye.errors import KeyeError
from keye.hub import asset
from keye.server.edge.guard import Guard
from keye.server.replicas.processes import LocalReplica, Reply
from keye.server.settings import Settings, guard_settings
from keye.server.vllm.app import DescribedModel, vllm_app
from keye.server.vllm.process import vllm_command

KEY = "sesame-0123456789-abcdef"
#: Answers with what it was asked and how it was started, whole or as two events.
FAKE = """
import json, sys
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

arguments = sys.argv[1:]

async def healthy(request):
    return JSONResponse({})

async def answer(request):
    body = json.loads(await request.body() or b"{}")
    if body.get("stream"):
        events = (f"data: {json.dumps(item)}\\n\\n".encode() for item in ({"n": 1}, "[DONE]"))
        return StreamingResponse(events, media_type="text/event-stream")
    seen = {"path": request.url.path, "body": body, "arguments": arguments, "key": request.headers.get("authorization")}
    return JSONResponse(seen)

app = Starlette(routes=[Route("/health", healthy), Route("/{path:path}", answer, methods=["GET", "POST"])])
uvicorn.run(app, uds=arguments[arguments.index("--uds") + 1], log_level="error")
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a program named vllm."""
    path = tmp_path_factory.mktemp("bin") / "vllm"
    path.write_text(f"#!{sys.executable}\n{FAKE}")
    path.chmod(0o755)
    return path.parent


@pytest.fixture(scope="module")
def client(program: Path) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{program}{os.pathsep}{os.environ['PATH']}")
        command = vllm_command(asset("nano"), ["nano", "keye"], 2, ["--max-model-len", "8192"])
        settings = Settings(keys={"a": KEY}, served_names=("nano", "keye"), media=2, queue=8)
        replica = LocalReplica("vllm", ("-m", "keye.server.vllm.process"), {"command": command})
        guard = guard_settings(settings)
        app = vllm_app(replica, DescribedModel("nano", asset("nano")), settings, salt=guard.keys.salt)
        headers = {"Authorization": f"Bearer {KEY}"}
        with TestClient(Guard(app, guard), "http://127.0.0.1", headers=headers) as client:
            yield client


def chat(client: TestClient, *content: Any, path: str = "/v1/chat/completions", **fields: Any) -> Any:
    message = {"role": "user", "content": list(content)}
    return client.post(path, json={"messages": [message], **fields})


def test_vllm_is_started_with_the_model_its_names_and_ranks(client: TestClient) -> None:
    arguments = chat(client, {"type": "text", "text": "hello"}).json()["arguments"]
    assert arguments[:2] == ["serve", str(asset("nano"))]
    joined = " ".join(arguments)
    assert "--served-model-name nano keye --tensor-parallel-size 2 --allowed-media-domains nothing.invalid" in joined
    assert "--max-model-len 8192 --uds" in joined and "--port" not in joined


def test_the_guard_stands_in_front(client: TestClient) -> None:
    assert client.get("/health", headers={"Authorization": ""}).json() == {"status": "ok", "engine": "vllm"}
    rejected = client.get("/v1/models", headers={"Authorization": "Bearer wrong"})
    assert (rejected.status_code, rejected.json()["error"]["code"]) == (401, "invalid_api_key")
    assert client.get("/v1/models").json()["path"] == "/v1/models"


def test_media_reach_vllm_as_data_urls_with_their_options(client: TestClient) -> None:
    demo = asset("demo.mp4").read_bytes()
    upload = client.post("/v1/files", files={"file": ("demo.mp4", demo)}).json()["id"]
    part = {"type": "input_video", "file_id": upload, "fps": 2}
    answer = chat(client, part, {"type": "text", "text": "when?"}, preprocess_kwargs={"max_frames": 8}, model="nano")
    sent = answer.json()["body"]
    video, text = sent["messages"][0]["content"]
    url = video["video_url"].pop("url")
    assert url.startswith("data:video/mp4;base64,") and base64.b64decode(url.partition(",")[2]) == demo
    assert video == {"type": "video_url", "video_url": {"fps": 2, "max_frames": 8}}
    assert text == {"type": "text", "text": "when?"}
    assert "preprocess_kwargs" not in sent


@pytest.mark.parametrize(
    ("source", "status"),
    [("file:///etc/passwd", 400), ("/etc/passwd", 400), ("http://127.0.0.1:1/a.mp4", 400), ("file-" + "0" * 32, 404)],
)
def test_what_may_not_be_opened_never_reaches_vllm(client: TestClient, source: str, status: int) -> None:
    for path in ("/v1/chat/completions", "/v1/messages"):
        answer = chat(client, {"type": "video_url", "video_url": {"url": source}}, path=path)
        assert answer.status_code == status, answer.text
    body = {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": source}]}]}
    assert client.post("/v1/responses", json=body).status_code == status
    anthropic = {"type": "image", "source": {"type": "url", "url": source}}
    assert chat(client, anthropic, path="/v1/messages").status_code == 501
    assert chat(client, {"type": "tool_result", "content": [anthropic]}, path="/v1/messages").status_code == 501
    body = {"system": [anthropic], "messages": [{"role": "user", "content": "hello"}]}
    assert client.post("/v1/messages", json=body).status_code == 501
    part = {"type": "input_image", "image_url": source}
    body = {"input": [{"type": "function_call_output", "call_id": "c", "output": [part]}]}
    assert client.post("/v1/responses", json=body).status_code == status


def test_streams_pass_as_they_come(client: TestClient) -> None:
    answer = chat(client, {"type": "text", "text": "hello"}, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text == 'data: {"n": 1}\n\ndata: "[DONE]"\n\n'


def test_another_name_of_the_model_is_taken_for_it(client: TestClient) -> None:
    assert chat(client, {"type": "text", "text": "x"}, model="gpt-4o").json()["body"]["model"] == "nano"
    assert chat(client, {"type": "text", "text": "x"}, model="keye").json()["body"]["model"] == "keye"


def test_what_needs_the_own_engine_is_501(client: TestClient) -> None:
    video = {"url": "data:video/mp4;base64," + base64.b64encode(asset("demo.mp4").read_bytes()).decode()}
    needing = [
        client.post("/v1/video/find", json={"video": video, "event": "the red circle"}),
        client.post("/v1/video/ground", json={"video": video, "event": "the red circle"}),
        client.post("/v1/live", json={}),
        client.post("/generate", json={"text": "x"}),
        chat(client, {"type": "text", "text": "x"}, keye={"evidence": True}),
        chat(client, {"type": "text", "text": "x"}, attention="dense"),
    ]
    for answer in needing:
        assert answer.status_code == 501, answer.text
        assert answer.json()["error"]["code"] == "needs_keye_engine"
        assert "start keye serve without --engine vllm" in answer.json()["error"]["message"]


def test_what_needs_no_model_works(client: TestClient) -> None:
    url = "data:video/mp4;base64," + base64.b64encode(asset("demo.mp4").read_bytes()).decode()
    pictures = client.post("/v1/video/frames", json={"video": {"url": url}, "times": [1.0], "height": 32})
    assert pictures.json()["data"][0]["url"].startswith("data:image/jpeg")
    content = [{"type": "video_url", "video_url": {"url": url}}]
    plan = client.post("/v1/media/plan", json={"content": content})
    assert plan.status_code == 200, plan.text
    assert plan.json()["visual_tokens"] > 0 and plan.json()["fits"]


def test_mistakes_in_bodies_are_the_servers_own_sentences(client: TestClient) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    assert "not an image that keye reads" in chat(client, picture).json()["error"]["message"]
    many = [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA", "fsp": 1}}]
    assert "fsp" in chat(client, *many).json()["error"]["message"]
    assert client.post("/v1/chat/completions", json=[1]).status_code == 400


def test_without_vllm_one_sentence_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KeyeError, match=r"pip install -e \. -e 'plugins/keye-vllm\[vllm\]'"):
        vllm_command(asset("nano"), ["nano"], 1)
    assert main(["serve", "nano", "--engine", "vllm", "--port", "0"]) == 2
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tp-size", "2"], "give --engine vllm"),
        (["--engine", "vllm", "--kv", "int8"], "--kv is an option of keye"),
        (["--engine", "vllm", "--engine-option=--lora_modules=a=/a"], "--lora-modules gives vLLM names"),
    ],
)
def test_options_of_the_other_engine_are_refused(
    arguments: list[str], sentence: str, program: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", f"{program}{os.pathsep}{os.environ['PATH']}")
    assert main(["serve", "nano", *arguments]) == 2
    assert sentence in capfd.readouterr().err


class Busy:
    """A vLLM that answers, but not whether it is healthy."""

    name, is_ready = "vllm", True

    async def start(self) -> None: ...

    async def wait_ended(self) -> None:
        await asyncio.Event().wait()

    async def send(self, method: str, path: str, headers: Mapping[str, str], content: Any) -> Reply:
        if path == "/health":
            await asyncio.Event().wait()

        async def pieces() -> AsyncIterator[bytes]:
            yield b"{}"

        return Reply(200, {"content-type": "application/json"}, pieces(), self.start)

    async def kill(self) -> None: ...

    async def close(self) -> None: ...


def test_a_busy_vllm_is_sent_requests() -> None:
    app = vllm_app(Busy(), DescribedModel("nano", asset("nano")), Settings())
    with TestClient(app, "http://127.0.0.1") as client:
        app.state.proxy.watch.last_answers["vllm"] = -math.inf
        assert client.get("/health").status_code == 503
        assert chat(client, {"type": "text", "text": "x"}).status_code == 200


def test_a_vllm_that_cannot_start_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    replica = LocalReplica("vllm", ("-m", "keye.server.vllm.process"), {"command": command})
    app = vllm_app(replica, DescribedModel("nano", asset("nano")), Settings())
    with pytest.raises(KeyeError, match="replica vllm could not start"), TestClient(app):
        pass
