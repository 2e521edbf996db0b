"""`keye serve` as a process: SIGTERM lets the answers that are being written end, and takes no more."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from contextlib import ExitStack

import httpx
import pytest

pytestmark = pytest.mark.slow


def test_sigterm_lets_a_stream_end() -> None:
    command = [sys.executable, "-m", "keye", "serve", "nano", "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            result = re.search(r"http://\S+", process.stdout.readline())
            assert result is not None
            url = result[0]
            body = {
                "messages": [{"role": "user", "content": "hello"}],
                "max_tokens": 300,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
                lines = answer.iter_lines()
                first = next(lines)
                process.send_signal(signal.SIGTERM)
                data = [line.removeprefix("data: ") for line in (first, *lines) if line.startswith("data: ")]
            assert data[-1] == "[DONE]"
            assert json.loads(data[-2])["usage"]["completion_tokens"] == 300
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/health")
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_answers_that_take_too_long_after_sigterm_end_with_an_error() -> None:
    code = (
        "import keye, socket; from keye.server.run import run_server; from keye.server.settings import Settings; "
        "run_server(keye.load('nano'), Settings(drain_seconds=0.2), socket.create_server(('127.0.0.1', 0)))"
    )
    paths = {"/v1/chat/completions": "messages", "/v1/responses": "input", "/v1/messages": "messages"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            result = re.search(r"http://\S+", process.stdout.readline())
            assert result is not None
            with httpx.Client(base_url=result[0], timeout=60) as http, ExitStack() as stack:
                streams = {}
                for path, field in paths.items():
                    body = {field: [{"role": "user", "content": "hello"}], "ignore_eos": True, "stream": True}
                    most = "max_output_tokens" if field == "input" else "max_tokens"
                    answer = stack.enter_context(http.stream("POST", path, json=body | {most: 20_000}))
                    streams[path] = answer.iter_lines()
                    next(streams[path])
                process.send_signal(signal.SIGTERM)
                last = {path: [line for line in lines if line][-2:] for path, lines in streams.items()}
            assert last["/v1/chat/completions"][1] == "data: [DONE]"
            chat = json.loads(last["/v1/chat/completions"][0][6:])["error"]
            assert chat["code"] == "server_stopping"
            for path in ("/v1/responses", "/v1/messages"):
                assert last[path][0] == "event: error"
                assert json.loads(last[path][1][6:])["type"] == "error"
            assert json.loads(last["/v1/responses"][1][6:])["code"] == "server_stopping"
            assert process.wait(30) == 0
        finally:
            process.kill()
