"""`--decode` of the commands: videos of requests go through the service, mistakes get one sentence."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

import keye
from keye.cli import cli
from keye.cluster.decode_reader import ServiceDecoder
from keye.cluster.service import open_service
from keye.errors import KeyeError
from keye.server.app import create_app
from keye.server.settings import Settings

DEMO = Path(keye.__path__[0]) / "assets/demo.mp4"


async def _ask(app: object, file: Path) -> tuple[str, str]:
    """The reply to a question about an uploaded video, and the page of numbers."""
    transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
    async with (
        app.router.lifespan_context(app),  # type: ignore[attr-defined]
        httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as http,
    ):
        upload = await http.post(
            "/v1/files", files={"file": (file.name, file.read_bytes(), "video/mp4")}, data={"purpose": "user_data"}
        )
        content = [
            {"type": "input_video", "input_video": {"file_id": upload.json()["id"]}},
            {"type": "text", "text": "when is the cyan triangle visible?"},
        ]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 16, "temperature": 0}
        answer = await http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"], (await http.get("/metrics")).text


@pytest.mark.slow
def test_a_server_answers_the_same_and_tells_the_services_numbers() -> None:
    usual, _ = asyncio.run(_ask(create_app(keye.load("nano"), Settings()), DEMO))
    with open_service("local:1") as service:
        model = keye.load("nano", decoder=ServiceDecoder(service))
        served, page = asyncio.run(_ask(create_app(model, Settings(), decode_gauges=service.gauges), DEMO))
    assert served == usual
    assert re.search(r"^keye_decode_workers 1.0$", page, re.MULTILINE)
    done = re.search(r"^keye_decode_done (\S+)$", page, re.MULTILINE)
    assert done is not None and float(done[1]) >= 1


def test_an_address_that_is_none() -> None:
    result = CliRunner().invoke(cli, ["serve", "--port", "0", "--decode", "nowhere"])
    assert isinstance(result.exception, KeyeError) or result.exit_code == 2
    message = result.output + str(result.exception)
    assert "'nowhere' is not an address of a decode service: give local, local:N, ray or ray://host:port" in message
