"""Clients that leave: at whatever stage their request is, it ends, and nothing is held for it any more."""

from __future__ import annotations

import gc
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from keye.engine.request import LoadingMedia, Prefilling, Ready, Task
from keye.engine.vision import VisionJob
from tests.support.serving import Running

Reached = Callable[[Task], bool]


def wait_until(running: Running, reached: Callable[[], bool]) -> None:
    """Asks the server for its health, which shows that its loop is free, until something is the case."""
    for _ in range(2000):
        if reached():
            return
        assert httpx.get(f"{running.url}/health").status_code == 200
    raise AssertionError("it did not come to that")


def hold(core: Any, stage: str, patch: pytest.MonkeyPatch, go_on: threading.Event) -> Reached:
    """Keeps requests at a stage, threads that work for them until `go_on`; returns whether one is there."""
    if stage == "queue":
        patch.setattr(core.scheduler, "most_running", 0)
        return lambda task: isinstance(task.state, Ready)
    if stage == "decode":
        lay_out = core.runtime.prompts.lay_out

        def slow(*values: Any, **options: Any) -> Any:
            go_on.wait(20)
            return lay_out(*values, **options)

        patch.setattr(core.runtime.prompts, "lay_out", slow)
        return lambda task: isinstance(task.state, LoadingMedia)
    if stage == "encode":
        patch.setattr(VisionJob, "waiting", property(lambda job: True))
        return lambda task: isinstance(task.state, Prefilling) and not task.state.vision.done
    if stage == "prefill":
        patch.setattr(core.scheduler.timer, "token_budget", lambda *_: 0)
        return lambda task: isinstance(task.state, Prefilling) and task.state.vision.done
    write = core.writer.write
    patch.setattr(core.writer, "write", lambda pairs: write([pair for pair in pairs if not output(pair[0])]))
    return output


def output(task: Task) -> bool:
    return any(len(choice.reply) >= 3 for choice in task.choices)


@pytest.mark.parametrize("stage", ["queue", "decode", "encode", "prefill", "stream"])
def test_who_leaves_gives_everything_back(
    running: Running, video: Any, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    model = running.app.app.state.keye.model
    core = model.core
    gc.collect()
    model.clear_caches()
    before = model.runtime.ledger.accounts()
    uploaded = httpx.post(f"{running.url}/v1/files", files={"file": video.open("rb")}).json()["id"]
    content = [{"type": "video_url", "video_url": {"url": uploaded}}, {"type": "text", "text": f"what is {stage}?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1000, "ignore_eos": True, "stream": True}
    with monkeypatch.context() as patch:
        go_on = threading.Event()
        reached = hold(core, stage, patch, go_on)
        with httpx.stream(
            "POST", f"{running.url}/v1/chat/completions", json={**body, "keye": {"progress": True}}
        ) as answer:
            assert answer.status_code == 200
            wait_until(running, lambda: any(map(reached, list(core.tasks))))
        wait_until(running, core.is_idle)
        go_on.set()
    gc.collect()
    model.clear_caches()
    assert core.is_idle() and model.runtime.ledger.accounts() == before
    httpx.delete(f"{running.url}/v1/files/{uploaded}")


def test_an_index_whose_client_left_is_aborted(running: Running, video: Any) -> None:
    context = running.app.app.state.keye
    core, retained = context.model.core, context.files.used()
    uploaded = httpx.post(f"{running.url}/v1/files", files={"file": video.open("rb")}).json()["id"]
    stored = context.files.used()
    body = f'{{"file_id": "{uploaded}"}}'
    head = (
        "POST /v1/indexes HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    with core.exclusive():  # the index is not computed before its client has left
        with socket.create_connection(running.socket.getsockname()) as client:
            client.sendall("\r\n".join((*head, "", body)).encode())
            wait_until(running, lambda: bool(core.tasks))
        wait_until(running, lambda: not context.indexing.locked())
    wait_until(running, core.is_idle)
    assert context.files.used() == stored
    httpx.delete(f"{running.url}/v1/files/{uploaded}")
    assert context.files.used() == retained
