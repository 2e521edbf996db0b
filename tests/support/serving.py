"""An application behind a socket, and what its answers must look like."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn

import keye
from keye.server.app import guarded_app
from keye.server.settings import Settings

Ask = Callable[..., dict[str, Any]]


class Running:
    """An application behind a socket, in a thread."""

    def __init__(self, model: keye.Keye, settings: Settings) -> None:
        self.app = guarded_app(model, settings)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_level="warning", lifespan="on"))
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        self.socket.close()


def error_of(answer: Any, status: int = 400) -> dict[str, Any]:
    """The error object of an answer that must be one."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def read_events(answer: Any) -> list[dict[str, Any]]:
    """The events of a stream that has ended as it should."""
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
