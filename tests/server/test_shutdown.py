"""`keye serve` as a process: SIGTERM lets the answers that are being written end, and takes no more."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

import httpx
import pytest

pytestmark = pytest.mark.slow


def test_sigterm_lets_a_stream_end() -> None:
    command = [sys.executable, "-m", "keye", "serve", "nano", "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found is not None
            url = found[0]
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
